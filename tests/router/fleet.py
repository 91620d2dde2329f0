"""A dispatcher with workers that do nothing by themselves: each test says what they answer."""

from __future__ import annotations

from collections import Counter
from itertools import count
from pathlib import Path
from typing import TypeVar

import msgspec

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import SampledToken, SamplingParams
from kvferry.common.router_config import RouterConfig
from kvferry.router.dispatch.dispatcher import Dispatcher
from kvferry.router.placement import make_policy
from kvferry.router.placement.least_loaded import LeastLoaded
from kvferry.router.placement.policy import RoutingPolicy
from kvferry.router.state.outcome import ServiceOutcome
from kvferry.router.state.predictor import Predictor
from kvferry.router.state.request import RouterRequest
from kvferry.router.state.token_stream import ChoiceUpdate, TokenStream
from kvferry.tests.fake_clock import FakeClock
from kvferry.wire.fields import Message
from kvferry.wire.grants import GrantId, GrantInfo
from kvferry.wire.results import (
    ChoiceTokens,
    FirstToken,
    Grant,
    HandoffDone,
    HandoffFailed,
    NoCapacity,
    RequestTokens,
    StepTokens,
)
from kvferry.wire.tasks import LocalTask, PrefillTask, ReserveKV
from kvferry.wire.workers import TransferReport, WorkerHello, WorkerStatus

BLOCK_SIZE = 16
SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=2, head_dim=8, block_size=BLOCK_SIZE, dtype="float32")
_READY = WorkerStatus(
    seq=0,
    state="ready",
    num_running=0,
    num_waiting=0,
    waiting_tokens=0,
    num_free_blocks=64,
    num_cached_blocks=0,
    num_granted_blocks=0,
    num_quarantined_blocks=0,
    num_blocks=64,
    steps=0,
    busy_for_s=0.0,
)

M = TypeVar("M", bound=Message)


def hello(worker_id: str, role: str, **changes: object) -> WorkerHello:
    base = WorkerHello(
        worker_id=worker_id,
        role=role,
        incarnation=1,
        version="0",
        model="m",
        spec=SPEC,
        tp_size=1,
        num_blocks=64,
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        kv_address="127.0.0.1:1",
        pid=1,
        transport="local",
    )
    return msgspec.structs.replace(base, **changes)


def status(**changes: object) -> WorkerStatus:
    return msgspec.structs.replace(_READY, **changes)


def token(choice: int, index: int) -> SampledToken:
    """What every worker samples there."""
    return SampledToken(1000 * (choice + 1) + index)


def tokens(choice: int, first: int, number: int, finish: str | None = None) -> ChoiceTokens:
    return ChoiceTokens(choice, first, tuple(token(choice, first + i) for i in range(number)), finish)


def config(**changes: object) -> RouterConfig:
    """A policy that always hands over, unless a test says otherwise: most are about handoffs."""
    base = RouterConfig(model_dir=Path("m"), served_model_name="m", policy="least_loaded")
    return base.model_copy(update=changes)


class Recorder:
    """An observer that counts."""

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.finished: list[RouterRequest] = []
        self.outcomes: list[ServiceOutcome] = []
        self.placed: Counter[tuple[str, str]] = Counter()
        self.transfers: list[TransferReport] = []
        self.fallbacks: Counter[str] = Counter()
        self.retries: Counter[tuple[str, str]] = Counter()
        self.dropped: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.resumed: Counter[str] = Counter()
        self.num_poisoned = 0
        self.num_exhausted = 0
        self.num_drains = 0

    def on_finished(self, request: RouterRequest) -> None:
        self.finished.append(request)

    def on_submitted(self, request: RouterRequest) -> None:
        self.submitted.append(request.request_id)

    def on_outcome(self, outcome: ServiceOutcome) -> None:
        self.outcomes.append(outcome)

    def on_placed(self, policy: str, reason: str) -> None:
        self.placed[policy, reason] += 1

    def on_transfer(self, report: TransferReport) -> None:
        self.transfers.append(report)

    def on_fallback(self, kind: str) -> None:
        self.fallbacks[kind] += 1

    def on_retry(self, stage: str, reason: str) -> None:
        self.retries[stage, reason] += 1

    def on_dropped(self, kind: str) -> None:
        self.dropped[kind] += 1

    def on_rejected(self, reason: str) -> None:
        self.rejected[reason] += 1

    def on_poisoned(self) -> None:
        self.num_poisoned += 1

    def on_budget_exhausted(self) -> None:
        self.num_exhausted += 1

    def on_resumed(self, result: str) -> None:
        self.resumed[result] += 1

    def on_drain(self) -> None:
        self.num_drains += 1


class Link:
    """A worker's session: keeps what the router sends."""

    def __init__(self, worker_id: str, number: int) -> None:
        self.worker_id = worker_id
        self.number = number
        self.sent: list[Message] = []
        self.dropped = ""

    def send(self, message: Message) -> None:
        if not self.dropped:
            self.sent.append(message)

    def drop(self, reason: str) -> None:
        self.dropped = reason

    def take(self, kind: type[M]) -> M:
        """The oldest message, which must be of this kind."""
        message = self.sent.pop(0)
        assert isinstance(message, kind), message
        return message


def transferred(transfer_s: float, exposed_s: float) -> TransferReport:
    """A report of a gigabyte that crossed."""
    return TransferReport(
        request_id="r",
        attempt=0,
        decode_worker="d-0",
        num_bytes=10**9,
        num_blocks=1,
        transfer_s=transfer_s,
        exposed_s=exposed_s,
        clean=True,
    )


class Fleet:
    """The dispatcher, its clock and what it told the observer."""

    def __init__(self, router: RouterConfig | None = None) -> None:
        self.config = router if router is not None else config()
        self.clock = FakeClock(100.0)
        self.observer = Recorder()
        self.predictor = predictor = Predictor()
        policy: RoutingPolicy = LeastLoaded(
            local_prefill=self.config.local_prefill,
            max_local_prefill_tokens=self.config.max_local_prefill_tokens,
            expect_prefill=self.config.expect_prefill,
        )
        if self.config.policy != LeastLoaded.name:
            policy = make_policy(self.config, predictor)
        self.blameless: list[str] = []  # workers that were lost with a suspect
        self.dispatcher = Dispatcher(
            self.config,
            policy,
            self.clock,
            self.observer,
            predictor=predictor,
            on_blameless=lambda life: self.blameless.append(life[0]),
        )
        self._numbers = count(1)
        self._names = count()
        self._epochs = count(1)

    def join(self, worker_id: str, **changes: object) -> Link:
        """A worker named p-... or d-... joins and is ready."""
        role = "prefill" if worker_id.startswith("p") else "decode"
        link = Link(worker_id, next(self._numbers))
        self.dispatcher.worker_joined(link, hello(worker_id, role, **changes))
        self.dispatcher.on_message(link, status())
        return link

    def beat(self, *links: Link, **changes: object) -> None:
        for link in links:
            self.dispatcher.on_message(link, status(**changes))

    def wait(self, seconds: float, *alive: Link, **changes: object) -> None:
        """Time passes in ticks; `alive` workers go on with their heartbeats."""
        for _ in range(round(seconds * 10)):
            self.clock.advance(0.1)
            self.beat(*(link for link in alive if not link.dropped), **changes)
            self.dispatcher.tick()

    def submit(self, num_prompt_tokens: int = 20, *, max_tokens: int = 8, **changes: object) -> TokenStream:
        sampling = SamplingParams(max_tokens=max_tokens, prompt_logprobs=changes.pop("prompt_logprobs", None))  # type: ignore[arg-type]
        request = RouterRequest(f"r-{next(self._names)}", list(range(num_prompt_tokens)), sampling, **changes)  # type: ignore[arg-type]
        return self.dispatcher.submit(request)

    # --- what workers answer --------------------------------------------------------------------------------

    def grant(self, decode: Link) -> ReserveKV:
        """The decode worker grants what it was asked for last."""
        ask = decode.take(ReserveKV)
        number = SPEC.num_blocks_for(ask.spec.num_prompt_tokens)
        info = GrantInfo(
            grant_id=GrantId(decode.worker_id, 1, next(self._epochs)),
            spec=SPEC,
            kv_address="127.0.0.1:1",
            block_ids=tuple(range(number)),
            num_tokens=ask.spec.num_prompt_tokens,
            num_computed_tokens=0,
            ranks=(),
            open_within_s=2.0,
            mac=b"",
        )
        message = Grant(request_id=ask.spec.request_id, attempt=ask.spec.attempt, grant=info)
        self.dispatcher.on_message(decode, message)
        return ask

    def refuse(self, decode: Link, reason: str = "blocks") -> ReserveKV:
        ask = decode.take(ReserveKV)
        self.dispatcher.on_message(
            decode, NoCapacity(request_id=ask.spec.request_id, attempt=ask.spec.attempt, reason=reason)
        )
        return ask

    def first_token(self, prefill: Link, task: PrefillTask, finish: str | None = None) -> None:
        self.dispatcher.on_message(
            prefill,
            FirstToken(
                request_id=task.spec.request_id,
                attempt=task.spec.attempt,
                choices=tuple(tokens(choice, 0, 1, finish) for choice in task.spec.choices),
                num_cached_tokens=0,
                prefill_s=0.1,
                queue_s=0.0,
            ),
        )

    def arrived(self, decode: Link, task: PrefillTask) -> None:
        self.dispatcher.on_message(decode, HandoffDone(request_id=task.spec.request_id, attempt=task.spec.attempt))

    def failed(self, decode: Link, task: PrefillTask, blame: str = "link", peer: str = "p-0") -> None:
        self.dispatcher.on_message(
            decode,
            HandoffFailed(
                request_id=task.spec.request_id,
                attempt=task.spec.attempt,
                reason="a write failed",
                blame=blame,
                worker_id=peer,
            ),
        )

    def step(self, decode: Link, task: PrefillTask | LocalTask | ReserveKV, *choices: ChoiceTokens) -> None:
        update = RequestTokens(task.spec.request_id, task.spec.attempt, choices)
        self.dispatcher.on_message(decode, StepTokens(updates=(update,)))

    def start(self, prefill: Link, decode: Link, **changes: object) -> tuple[TokenStream, PrefillTask]:
        """A request whose task the prefill worker has."""
        stream = self.submit(**changes)  # type: ignore[arg-type]
        self.grant(decode)
        return stream, prefill.take(PrefillTask)

    def decode(self, prefill: Link, decode: Link, **changes: object) -> tuple[TokenStream, PrefillTask]:
        """A request that has its first token and whose KV has arrived."""
        stream, task = self.start(prefill, decode, **changes)
        self.first_token(prefill, task)
        self.arrived(decode, task)
        return stream, task


def received(stream: TokenStream) -> list[ChoiceUpdate]:
    """Every update that is there."""
    updates = []
    while (update := stream.next_nowait()) is not None:
        updates.append(update)
    return updates


def text(stream: TokenStream, choice: int = 0) -> list[int]:
    """Token indices of a choice in the updates that are there."""
    ids = [t.token_id for update in received(stream) if update.choice == choice for t in update.tokens]
    return [token_id - 1000 * (choice + 1) for token_id in ids]
