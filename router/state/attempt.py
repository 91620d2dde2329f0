"""One request on its way through the workers: who holds what of it, and the messages of its current attempt.

    reserve ─ ReserveKV ─> decode worker ─ Grant ─> send_task ─ PrefillTask ─> prefill worker
    run_locally ─ LocalTask ─> decode worker
    leave ─ Abort ─> whoever may hold something

`TrackedRequest` sends and keeps the books (bound loads, awaited answers, what was learned about workers); the
decisions are the dispatcher's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ...common.messages import (
    Abort,
    FetchFrom,
    FirstToken,
    Grant,
    GrantInfo,
    HandoffDone,
    HandoffFailed,
    LocalTask,
    NoCapacity,
    PrefillTask,
    PromptLogprobs,
    ReserveKV,
    TaskRefused,
    WorkerFailure,
)
from .demand import Demand, Placement, Prediction, Promise
from .failures import STRIKES_UNTIL_ALONE, Blame, Charge, WorkerLife
from .pools import Pools
from .predictor import Way
from .request import RequestStatus, RouterRequest, TokenStream
from .views import RequestLoad
from .worker import RouterWorker

ANSWER_WITHIN_S = 3.5  # a decode worker's answer to ReserveKV, or to an Abort that asks
QUEUE_IF_FULL_AFTER_S = 0.25  # then a worker is asked that another router keeps full
_STALE_REFUSAL_S = 0.5  # ask again after this, though no new heartbeat came

RequestMessage = (
    Grant | NoCapacity | TaskRefused | HandoffDone | HandoffFailed | FirstToken | PromptLogprobs | WorkerFailure
)


class WorkerRefusal(NamedTuple):
    """A worker had no room."""

    at_s: float
    retry_s: float


@dataclass(slots=True, eq=False)
class TrackedRequest:
    """A request that is not terminal."""

    request: RouterRequest
    stream: TokenStream
    deadline_s: float | None
    prefill: RouterWorker | None = None
    decode: RouterWorker | None = None
    prefill_over: bool = True  # the prefill worker's loss would not matter
    prompt_computed: bool = False  # its first tokens came in this attempt
    prompt_begun: bool = False  # some of it was shipped
    grant: GrantInfo | None = None
    grant_s: float = 0.0
    answer_due_s: float | None = None  # the decode worker owes an answer until then
    lost_prefill: Blame | None = None  # died after it got the task; the decode worker was asked what it has
    task_s: float = 0.0  # when this attempt's task was sent
    arrived_s: float | None = None  # since when the decode worker has this attempt's KV
    has_stepped: bool = False  # tokens of this attempt came from the decode worker
    event_s: float = 0.0  # the last message about this attempt, or its start
    gap_s: float | None = None  # since when an early token waits
    lacks_s: float | None = None  # since when every pair has failed
    waits_s: float | None = None  # since when it has found no room
    sent_choices: tuple[int, ...] = ()  # of this attempt
    check_at_s: float = float("inf")  # when its time limits are looked at next (due_times.py)
    # --- of all attempts
    promise: Promise | None = None  # when its first token was expected, at its admission
    is_charged: bool = False  # its tenant was: it has left the queue for an attempt
    prediction: Prediction | None = None  # of its latest placement
    fetch: FetchFrom | None = None  # the same: what whoever computes the prompt reads from another worker
    placed_s: float = 0.0
    num_cached: int = 0  # prompt tokens that some worker held when places were last looked for
    decode_retains: bool | None = None  # which of the two caches the prompt's KV for others; None: both do
    strikes: set[WorkerLife] = field(default_factory=set)  # workers that were lost while they computed it
    computed_on: int | None = None  # the prefill session that has the prompt's KV in its cache
    computed_whole: bool = False  # all of it
    is_resuming: bool = False  # its stream has paused: tokens came, and the worker was lost
    charge: Charge | None = None  # for the retry that comes or runs
    not_before_s: float = 0.0  # the next attempt is put off until then
    last_reason: str = ""  # of the last failure that was charged
    num_same: int = 0  # failures in a row for that reason
    failed_pairs: dict[tuple[int, int], str] = field(default_factory=dict)  # sessions: what happened
    late_pairs: set[tuple[int, int]] = field(default_factory=set)  # whose grant was not opened in time
    refusals: dict[int, WorkerRefusal] = field(default_factory=dict)
    unfit: set[int] = field(default_factory=set)
    ended_here: set[int] = field(default_factory=set)  # choices whose stop string was found
    ungranted: set[int] = field(default_factory=set)

    # --- what the policy must know -------------------------------------------------------------------------

    def demand(self, pools: Pools, claimed: frozenset[int], now_s: float) -> Demand:
        request = self.request
        most = max((len(choice.tokens) for choice in request.choices if choice.finish is None), default=0)
        cached = self.cached(pools)
        self.num_cached = max(cached.values(), default=0)
        limit_s, waited_s = self.ttft_limit_s, now_s - request.timestamps.get("queued", now_s)
        return Demand(
            num_prompt_tokens=request.num_prompt_tokens,
            num_tokens=request.num_prompt_tokens + most,
            max_num_tokens=max_num_tokens(request, pools),
            num_choices=len(request.unfinished),
            busy=self._busy(pools, claimed, now_s),
            unfit=frozenset(self.unfit),
            ungranted=frozenset(self.ungranted),
            failed_pairs=frozenset(self.failed_pairs),
            computed_on=self.computed_on,
            queue_if_full=self.queue_if_full(now_s),
            cached=cached,
            objectives=request.objectives,
            ttft_limit_s=limit_s,
            waited_s=waited_s,
            expected_output=pools.predictor.expected_output(request.sampling.max_tokens),
            may_miss=request.is_resume or (limit_s is not None and waited_s + self.fastest_s > limit_s),
        )

    @property
    def unloaded_s(self) -> float:
        """What its first token takes on empty workers."""
        return self.request.unloaded_s

    @property
    def fastest_s(self) -> float:
        """The same, where most of the prompt's beginning is held already."""
        return self.unloaded_s * (1.0 - self.num_cached / max(1, self.request.num_prompt_tokens))

    @property
    def ttft_limit_s(self) -> float | None:
        return self.request.objectives.ttft_limit_s(self.request.unloaded_s)

    def cached(self, pools: Pools) -> dict[int, int]:
        """Session: leading tokens of the prompt that the worker holds."""
        request = self.request
        if not request.block_hashes or request.sampling.prompt_logprobs is not None:
            return {}
        size = pools.block_size
        return {session: blocks * size for session, blocks in pools.prefix_index.match(request.block_hashes).items()}

    def _busy(self, pools: Pools, claimed: frozenset[int], now_s: float) -> frozenset[int]:
        refusing = [
            session
            for session in self.refusals
            if (worker := pools.at(session)) is not None and self.is_refused_by(worker, now_s)
        ]
        return claimed.union(refusing, pools.claimed) if refusing or pools.claimed else claimed

    def is_refused_by(self, worker: RouterWorker, now_s: float) -> bool:
        refusal = self.refusals.get(worker.link.number)
        if refusal is None or now_s >= max(refusal.retry_s, refusal.at_s + _STALE_REFUSAL_S):
            return False
        return now_s < refusal.retry_s or worker.status_s <= refusal.at_s

    def note_refusal(self, worker: RouterWorker, retry_after_s: float, now_s: float) -> None:
        self.refusals[worker.link.number] = WorkerRefusal(now_s, now_s + retry_after_s)
        worker.has_refused = True

    def note_failed_pair(self, what: str) -> None:
        if self.prefill is not None and self.decode is not None:
            self.failed_pairs[self.prefill.link.number, self.decode.link.number] = what

    def is_late_again(self) -> bool:
        """The pair's grant was not opened in time, and it is not the first: what one says may not reach the other."""
        assert self.prefill is not None and self.decode is not None
        pair = (self.prefill.link.number, self.decode.link.number)
        is_known = pair in self.late_pairs
        self.late_pairs.add(pair)
        return is_known

    @property
    def must_run_alone(self) -> bool:
        """It was in the running step of two workers when they were lost."""
        return len(self.strikes) >= STRIKES_UNTIL_ALONE

    def queue_if_full(self, now_s: float) -> bool:
        """It has waited for room: now workers are asked that other routers seem to fill."""
        return self.waits_s is not None and now_s - self.waits_s >= QUEUE_IF_FULL_AFTER_S

    def is_put_off(self, now_s: float) -> bool:
        """Its retry waits: for the end of a pause, or for a token of the retry budget."""
        return now_s < self.not_before_s or (self.charge is not None and not self.charge.is_paid)

    @property
    def is_prefilling_remotely(self) -> bool:
        """A prefill worker has the task, and the decode worker has not said that the KV is there."""
        return self.request.status is RequestStatus.PREFILLING and not self.prefill_over

    @property
    def pair(self) -> str:
        names = [worker.worker_id for worker in (self.prefill, self.decode) if worker is not None]
        return " -> ".join(names)

    @property
    def stage(self) -> str:
        match self.request.status:
            case RequestStatus.RESERVED:
                return "reserve"
            case RequestStatus.PREFILLING:
                return "transfer" if self.prompt_computed else "prefill"
            case _:
                return "decode"

    def remaining_s(self, now_s: float) -> float | None:
        return None if self.deadline_s is None else max(0.0, self.deadline_s - now_s)

    def expects(self, worker: RouterWorker, message: RequestMessage) -> bool:
        """Do the sender's part in this attempt, and the attempt's state, allow the message?"""
        status = self.request.status
        match message:
            case Grant() | NoCapacity():
                return status is RequestStatus.RESERVED and worker is self.decode
            case TaskRefused():
                doer = self.decode if self.prefill is None else self.prefill
                return status is RequestStatus.PREFILLING and worker is doer
            case HandoffDone():
                return self.is_prefilling_remotely and worker is self.decode
            case HandoffFailed():
                # Without a prefill worker it is about a grant that a local prefill has replaced.
                return self.prefill is not None and status is not RequestStatus.RESERVED and worker is self.decode
            case FirstToken():
                return worker is self.prefill and status is not RequestStatus.RESERVED
            case PromptLogprobs() | WorkerFailure():
                return True

    # --- the attempt's steps -------------------------------------------------------------------------------

    def note_placement(self, placement: Placement, now_s: float) -> None:
        """What was expected of it, for whoever compares."""
        self.prediction, self.placed_s = placement.prediction, now_s

    @property
    def way(self) -> Way:
        return Way.LOCAL if self.prefill is None else Way.HANDOFF

    def reserve(self, prefill: RouterWorker, decode: RouterWorker, max_local_tokens: int, now_s: float) -> None:
        """Take the prefill worker's credit, then ask the decode worker for blocks."""
        queue_if_full = self.queue_if_full(now_s)
        self._begin(decode, num_tokens=0, now_s=now_s)
        self._bind_prefill(prefill, now_s)
        self.request.advance(RequestStatus.RESERVED, now_s)
        self.answer_due_s = now_s + ANSWER_WITHIN_S
        spec = self.request.spec(self.remaining_s(now_s))
        message = ReserveKV(
            spec=spec,
            max_local_tokens=max_local_tokens,
            queue_if_full=queue_if_full,
            keeps=self.decode_retains is not False,
        )
        decode.link.send(message)

    def run_locally(self, decode: RouterWorker, now_s: float) -> None:
        """Let the decode worker compute the prompt. It may hold this attempt's grant, or say that it has the KV."""
        self.return_credit()
        self.prefill = self.request.prefill_worker = None
        self.prefill_over = True
        if self.decode is None:
            self._begin(decode, num_tokens=self.request.num_prompt_tokens, now_s=now_s)
        self.answer_due_s = None
        self.task_s, self.waits_s = now_s, None
        self.request.advance(RequestStatus.PREFILLING, now_s)
        decode.link.send(LocalTask(spec=self.request.spec(self.remaining_s(now_s)), fetch=self.fetch))

    def send_task(self, now_s: float, other: RouterWorker | None = None) -> None:
        """Hand the grant to the prefill worker, or to `other` if that one cannot."""
        assert self.grant is not None
        if other is not None:
            self.return_credit()
            self._bind_prefill(other, now_s)
        assert self.prefill is not None
        if self.request.status is RequestStatus.RESERVED:
            self.request.advance(RequestStatus.PREFILLING, now_s)
        self.task_s, self.waits_s = now_s, None
        task = PrefillTask(
            spec=self.request.spec(self.remaining_s(now_s)),
            grant=self.grant,
            sample=not self.request.is_resume,
            fetch=self.fetch,
            keeps=self.decode_retains is not True,
        )
        self.prefill.link.send(task)

    def ask_if_arrived(self, now_s: float) -> None:
        """The prefill worker is gone or silent. What the decode worker has now decides."""
        assert self.decode is not None
        self.answer_due_s = now_s + ANSWER_WITHIN_S
        self.decode.link.send(self._abort(unless_arrived=True))

    def drop_choice(self, choice: int) -> None:
        """The choice has ended here: the workers need not go on with it."""
        for worker in self._holders():
            worker.link.send(self._abort(choices=(choice,)))

    def arrive(self, now_s: float) -> None:
        """The decode worker has all of the KV, or has computed it. A first token may still come from the other one."""
        assert self.decode is not None
        self.return_credit()
        self.decode.note_prefilled(self.request.request_id)
        self.prefill_over = True
        self.answer_due_s = None
        self.arrived_s = now_s
        self.request.advance(RequestStatus.DECODING, now_s)

    def leave(self, *, tell: bool = True) -> None:
        """End the attempt on every worker that may hold something of it, and in the books."""
        if tell:
            for worker in self._holders():
                worker.link.send(self._abort())
        self.return_credit()
        if self.decode is not None:
            self.decode.release(self.request.request_id)
        self.prefill = self.decode = self.grant = self.answer_due_s = self.gap_s = self.lost_prefill = None

    def note_cache(self) -> None:
        """The attempt has failed: remember who has the prompt's KV, so that the next one ships it from there."""
        if self.prefill is None or self.lost_prefill is not None:
            return
        whole = self.prompt_computed or self.arrived_s is not None
        is_computing = self.is_prefilling_remotely and self.prefill.computes_prompt_of(self.request.request_id)
        if whole or self.prompt_begun or is_computing:
            self.computed_on, self.computed_whole = self.prefill.link.number, whole

    def return_credit(self) -> None:
        """The prefill worker computes nothing for this request any more."""
        if self.prefill is not None:
            self.prefill.release(self.request.request_id)

    def _begin(self, decode: RouterWorker, *, num_tokens: int, now_s: float) -> None:
        request = self.request
        self.event_s = now_s
        self.arrived_s = None
        self.prompt_computed = self.prompt_begun = self.has_stepped = False
        self.sent_choices = request.unfinished
        self.decode, request.decode_worker = decode, decode.worker_id
        longest = max(len(request.choices[choice].tokens) for choice in self.sent_choices)
        blocks = decode.hello.spec.num_blocks_for(request.num_prompt_tokens + longest) + len(self.sent_choices) - 1
        context = len(self.sent_choices) * (request.num_prompt_tokens + longest)
        work_s = self._work_s() if num_tokens else 0.0
        decode.bind(request.request_id, RequestLoad(num_tokens, len(self.sent_choices), blocks, now_s, work_s, context))

    def _bind_prefill(self, prefill: RouterWorker, now_s: float) -> None:
        request = self.request
        self.prefill, request.prefill_worker = prefill, prefill.worker_id
        self.prefill_over = False
        spec, num_tokens = prefill.hello.spec, request.num_prompt_tokens
        blocks = spec.num_blocks_for(num_tokens)
        if prefill.link.number == self.computed_on and self.computed_whole:
            num_tokens = min(num_tokens, spec.block_size)  # the rest is in its prefix cache
        prefill.bind(
            request.request_id, RequestLoad(num_tokens, len(request.unfinished), blocks, now_s, self._work_s())
        )

    def _work_s(self) -> float:
        """To compute the prompt, where the policy has said it."""
        return self.prediction.prefill_s if self.prediction is not None else self.request.unloaded_s

    def _holders(self) -> list[RouterWorker]:
        prefill = None if self.prefill_over else self.prefill
        return [worker for worker in (prefill, self.decode) if worker is not None]

    def _abort(self, *, unless_arrived: bool = False, choices: tuple[int, ...] = ()) -> Abort:
        request = self.request
        return Abort(
            request_id=request.request_id,
            attempt=request.attempt_number,
            unless_arrived=unless_arrived,
            choices=choices,
        )


def max_num_tokens(request: RouterRequest, pools: Pools) -> int:
    """Prompt and longest possible answer."""
    model_len = pools.least_model_len
    total = request.num_prompt_tokens + request.sampling.max_tokens
    return total if model_len is None else min(total, max(model_len, request.num_prompt_tokens))
