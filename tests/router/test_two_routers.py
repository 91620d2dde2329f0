"""Two routers over the same workers: each sees the other's load in heartbeats alone, and neither starves."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest

from kvferry.common.request import RequestSpec
from kvferry.router.state.request import RequestStatus
from kvferry.router.state.token_stream import TokenStream
from kvferry.tests.fake_clock import FakeClock
from kvferry.wire.grants import GrantId, GrantInfo
from kvferry.wire.results import ChoiceTokens, FirstToken, Grant, HandoffDone, NoCapacity, RequestTokens, StepTokens
from kvferry.wire.tasks import Abort, LocalTask, PrefillTask, ReserveKV

from .fleet import SPEC, Fleet, Link, config, status, token

Key = tuple[int, str]  # router, request


@dataclass
class SharedWorker:
    """A worker with a session with each router. It does what it is asked in the order of the asking."""

    name: str
    fleets: list[Fleet]
    num_blocks: int = 64
    tokens_per_s: float = 1000.0
    links: list[Link] = field(default_factory=list)
    held: dict[Key, int] = field(default_factory=dict)  # blocks
    reserved: dict[Key, RequestSpec] = field(default_factory=dict)
    running: dict[Key, list[float]] = field(default_factory=dict)  # time of the end, tokens so far
    prompts: deque[tuple[Key, PrefillTask | LocalTask, list[float]]] = field(default_factory=deque)
    waiting: list[tuple[int, int, RequestSpec, float]] = field(default_factory=list)  # arrival, router, until when
    steps: int = 0
    num_asked: int = 0

    def join(self, **changes: object) -> None:
        hello = {"num_blocks": self.num_blocks, "max_num_seqs": 4, "max_num_batched_tokens": 64, **changes}
        self.links = [fleet.join(self.name, **hello) for fleet in self.fleets]

    def read(self) -> None:
        for router, link in enumerate(self.links):
            while link.sent:
                message = link.sent.pop(0)
                match message:
                    case ReserveKV(spec=spec):
                        self.num_asked += 1
                        self.reserve(router, spec, queue_if_full=message.queue_if_full)
                    case PrefillTask(spec=spec) | LocalTask(spec=spec):
                        self.prompts.append(((router, spec.request_id), message, [float(spec.num_prompt_tokens)]))
                    case Abort():
                        self.forget((router, message.request_id))
                    case _:
                        pass

    def forget(self, key: Key) -> None:
        self.held.pop(key, None)
        self.reserved.pop(key, None)
        self.running.pop(key, None)
        self.waiting = [w for w in self.waiting if (w[1], w[2].request_id) != key]

    @property
    def num_free(self) -> int:
        return self.num_blocks - sum(self.held.values())

    def retry(self) -> None:
        """Blocks came free: the oldest first, and nobody passes it in what it needs."""
        waiting, self.waiting = sorted(self.waiting, key=lambda w: w[0]), []
        for _, router, spec, until_s in waiting:
            self.reserve(router, spec, queue_if_full=self.fleets[0].clock.now() < until_s, until_s=until_s)

    def reserve(self, router: int, spec: RequestSpec, *, queue_if_full: bool, until_s: float | None = None) -> None:
        dispatcher, link = self.fleets[router].dispatcher, self.links[router]
        number = SPEC.num_blocks_for(spec.num_prompt_tokens) + 1
        kept = sum(SPEC.num_blocks_for(w[2].num_prompt_tokens) + 1 for w in self.waiting if w[0] < spec.arrival)
        if number + len(self.running) + kept > self.num_free:
            if queue_if_full and all(w[1] != router for w in self.waiting):
                until_s = until_s or self.fleets[0].clock.now() + 2.0
                self.waiting.append((spec.arrival, router, spec, until_s))
                return
            dispatcher.on_message(link, NoCapacity(request_id=spec.request_id, attempt=spec.attempt, reason="blocks"))
            return
        self.held[router, spec.request_id], self.reserved[router, spec.request_id] = number, spec
        info = GrantInfo(
            grant_id=GrantId(self.name, 1, self.num_asked),
            spec=SPEC,
            kv_address="",
            block_ids=(),
            num_tokens=spec.num_prompt_tokens,
            num_computed_tokens=0,
            ranks=(),
            open_within_s=2.0,
            mac=b"",
        )
        dispatcher.on_message(link, Grant(request_id=spec.request_id, attempt=spec.attempt, grant=info))

    def compute(self, seconds: float, decodes: dict[str, SharedWorker]) -> None:
        """Prompts in turn, then their first tokens and arrivals."""
        budget = self.tokens_per_s * seconds
        while self.prompts and budget > 0:
            key, task, left = self.prompts[0]
            done = min(budget, left[0])
            left[0] -= done
            budget -= done
            if left[0] > 0:
                return
            self.prompts.popleft()
            self.steps += 1
            router, spec = key[0], task.spec
            if isinstance(task, LocalTask):
                self.held[key] = SPEC.num_blocks_for(spec.num_prompt_tokens) + 1
                self.run(router, spec)
                continue
            first = ChoiceTokens(0, 0, (token(0, 0),))
            self.fleets[router].dispatcher.on_message(
                self.links[router],
                FirstToken(
                    request_id=spec.request_id,
                    attempt=spec.attempt,
                    choices=(first,),
                    num_cached_tokens=0,
                    prefill_s=0.1,
                    queue_s=0.0,
                ),
            )
            decode = decodes[task.grant.grant_id.worker_id]
            if decode.reserved.pop(key, None) is not None:
                decode.fleets[router].dispatcher.on_message(
                    decode.links[router], HandoffDone(request_id=spec.request_id, attempt=spec.attempt)
                )
                decode.run(router, spec)

    def run(self, router: int, spec: RequestSpec) -> None:
        self.running[router, spec.request_id] = [self.fleets[0].clock.now() + 0.5, 0]
        self.tell(router, spec.request_id, spec.attempt, ChoiceTokens(0, 0, (token(0, 0),)))

    def tell(self, router: int, request_id: str, attempt: int, tokens: ChoiceTokens) -> None:
        update = RequestTokens(request_id, attempt, (tokens,))
        self.fleets[router].dispatcher.on_message(self.links[router], StepTokens(updates=(update,)))

    def finish(self) -> None:
        now = self.fleets[0].clock.now()
        for key, (end_s, _) in list(self.running.items()):
            if end_s <= now:
                self.forget(key)
                router, request_id = key
                tracked = self.fleets[router].dispatcher._in_flight.get(request_id)
                attempt = tracked.request.attempt_number if tracked is not None else 0
                self.steps += 1
                self.tell(router, request_id, attempt, ChoiceTokens(0, 1, (token(0, 1),), "stop"))

    def beat(self) -> None:
        for fleet, link in zip(self.fleets, self.links, strict=True):
            fleet.dispatcher.on_message(
                link,
                status(
                    num_running=len(self.running) + (1 if self.prompts else 0),
                    num_waiting=max(0, len(self.prompts) - 1),
                    waiting_tokens=int(sum(left[0] for _, _, left in self.prompts)),
                    num_free_blocks=self.num_free,
                    num_blocks=self.num_blocks,
                    steps=self.steps,
                    step_tokens=64,
                    step_s=64 / self.tokens_per_s,
                ),
            )


class Cluster:
    """Two dispatchers, one clock."""

    def __init__(
        self, *, prefill: int = 1, decode: int = 1, num_blocks: int = 64, tokens_per_s: float = 1000.0
    ) -> None:
        self.clock = FakeClock(100.0)
        self.fleets = [Fleet(config(expect_prefill=prefill > 0, local_prefill=prefill == 0)) for _ in range(2)]
        for fleet in self.fleets:
            fleet.clock = self.clock
            fleet.dispatcher._clock = self.clock  # one time for both
            fleet.dispatcher._in_flight._clock = self.clock
            fleet.dispatcher._time_us = lambda: round(self.clock.now() * 1e6)
        names = [f"p-{i}" for i in range(prefill)] + [f"d-{i}" for i in range(decode)]
        self.workers = {
            name: SharedWorker(name, self.fleets, num_blocks=num_blocks, tokens_per_s=tokens_per_s) for name in names
        }
        for worker in self.workers.values():
            worker.join()
        self.streams: list[list[TokenStream]] = [[], []]
        self._serial = 0

    def submit(self, router: int, num_tokens: int = 30) -> TokenStream:
        self._serial += 1
        stream = self.fleets[router].submit(num_tokens)
        self.streams[router].append(stream)
        return stream

    def run(self, seconds: float, *, keep: tuple[int, int] = (0, 0), num_tokens: int = 30) -> None:
        """Time passes. `keep`: so many requests each router always has."""
        for tick in range(round(seconds * 100)):
            for router, wanted in enumerate(keep):
                while self.fleets[router].dispatcher.view().num_in_flight < wanted:
                    self.submit(router, num_tokens)
            self.clock.advance(0.01)
            for worker in self.workers.values():
                worker.read()
                worker.compute(0.01, self.workers)
                worker.finish()
                worker.retry()
            if tick % 10 == 0:
                for worker in self.workers.values():
                    worker.beat()
                for fleet in self.fleets:
                    fleet.dispatcher.tick()
                    assert not fleet.dispatcher.breaches()

    def num_finished(self, router: int) -> int:
        return sum(stream.request.status is RequestStatus.FINISHED for stream in self.streams[router])


def test_a_router_under_flood_does_not_starve_the_other_at_the_prefill_pool() -> None:
    cluster = Cluster(tokens_per_s=200.0, num_blocks=512)
    cluster.run(2.0, keep=(30, 0), num_tokens=60)
    quiet = [cluster.submit(1, 60) for _ in range(3)]
    cluster.run(20.0, keep=(30, 0), num_tokens=60)
    assert all(stream.request.status is RequestStatus.FINISHED for stream in quiet)
    assert all(stream.request.num_failures == 0 for streams in cluster.streams for stream in streams)


def test_a_router_under_flood_does_not_starve_the_other_at_the_decode_pool() -> None:
    cluster = Cluster(tokens_per_s=10_000.0)
    cluster.run(2.0, keep=(30, 0))
    quiet = [cluster.submit(1) for _ in range(3)]
    cluster.run(10.0, keep=(30, 0))
    assert all(stream.request.status is RequestStatus.FINISHED for stream in quiet)


def test_the_same_without_a_prefill_pool() -> None:
    cluster = Cluster(prefill=0, tokens_per_s=1000.0)
    cluster.run(2.0, keep=(30, 0))
    quiet = [cluster.submit(1) for _ in range(3)]
    cluster.run(10.0, keep=(30, 0))
    assert all(stream.request.status is RequestStatus.FINISHED for stream in quiet)


@pytest.mark.slow
@pytest.mark.parametrize("prefill", [0, 1, 2])
def test_two_busy_routers_share_and_nothing_is_lost_between_them(prefill: int) -> None:
    cluster = Cluster(prefill=prefill, decode=2, tokens_per_s=1000.0)
    cluster.run(20.0, keep=(20, 20))
    first, second = cluster.num_finished(0), cluster.num_finished(1)
    assert first + second > 150 and 0.4 < first / second < 2.5
    cluster.run(10.0)
    assert cluster.num_finished(0) + cluster.num_finished(1) == sum(map(len, cluster.streams))
    assert not any(worker.held for worker in cluster.workers.values())


def test_a_large_prompt_is_not_starved_by_the_small_ones_of_the_other_router() -> None:
    cluster = Cluster(tokens_per_s=10_000.0, num_blocks=16)
    cluster.run(2.0, keep=(30, 0))
    large = cluster.submit(1, 160)
    before = cluster.workers["d-0"].num_asked
    cluster.run(5.0, keep=(30, 0))
    assert large.request.status is RequestStatus.FINISHED
    assert cluster.workers["d-0"].num_asked - before < 40 * 5  # and nobody asks all the time


def test_requests_of_two_routers_are_ordered_by_their_arrival() -> None:
    cluster = Cluster()
    first = cluster.submit(0).request.arrival
    cluster.clock.advance(0.001)
    second = cluster.submit(1).request.arrival
    assert first < second < cluster.submit(1).request.arrival  # though no time has passed
