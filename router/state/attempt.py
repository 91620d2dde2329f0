"""One attempt of a request: from its placement to its end, on a decode worker and, with a handoff, a prefill worker.

    reserve ─ ReserveKV ─> ASKED ─ Grant, PrefillTask ─> SENT ─> BEGUN ─ FirstToken ─> COMPUTED ─> ARRIVED ─> STEPPED
    run_locally ─ LocalTask ──────────────────────────> SENT ────────────────────────────────────> ARRIVED ─> STEPPED
    run_locally ─ EmbedTask ──────────────────────────> SENT ─ Embedding ─> the request has ended
    leave ─ Abort ─> whoever may hold something

An embedding needs one worker of either role. It stands as `decode`, as where a decode worker computes a prompt alone.

`Attempt` sends its messages and keeps the workers' books (bound loads, awaited answers); the decisions are the
dispatcher's. Nothing of an attempt outlives it: whoever ends one drops the object.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from ...common.served import UNSERVED
from ...kvcache.frames import handed_frames
from ...wire.codec import RequestMessage
from ...wire.grants import GrantInfo
from ...wire.results import (
    Embedding,
    FirstToken,
    Grant,
    HandoffDone,
    HandoffFailed,
    NoCapacity,
    PromptLogprobs,
    TaskRefused,
    WorkerFailure,
)
from ...wire.tasks import Abort, EmbedTask, FetchFrom, LocalTask, PrefillTask, ReserveKV
from .demand import Prediction
from .failures import Blame
from .predictor import Way
from .request import RequestStatus, RouterRequest
from .views import RequestLoad
from .worker import RouterWorker

ANSWER_WITHIN_S = 3.5  # a decode worker's answer to ReserveKV, or to an Abort that asks


class AttemptState(IntEnum):
    """The stages of an attempt. A state implies all before it, and none is left for an earlier one."""

    ASKED = 0  # the decode worker was asked for blocks, or nothing was sent yet
    SENT = 1  # whoever computes the prompt has the task
    BEGUN = 2  # the prefill worker is known to have shipped some of the prompt
    COMPUTED = 3  # the prefill worker's first tokens came
    ARRIVED = 4  # the decode worker has all of the KV, or has computed it
    STEPPED = 5  # tokens came from the decode worker


@dataclass(slots=True, eq=False)
class Attempt:
    """One placement of a request. The fields up to `whole_prompt_on` are the placer's."""

    request: RouterRequest
    decode: RouterWorker
    deadline_s: float | None  # the request's
    placed_s: float
    prediction: Prediction | None = None  # what the policy expects of this placement
    fetch: FetchFrom | None = None  # what whoever computes the prompt reads from another worker
    tokens_behind: int | None = None  # of others that wait in the queue for `decode`; None: for prefill workers
    decode_retains: bool | None = None  # which worker caches the prompt's KV for others; None: both do
    whole_prompt_on: int | None = None  # the prefill session that has cached the whole prompt in an earlier attempt
    prefill: RouterWorker | None = None  # None: the decode worker computes the prompt
    state: AttemptState = AttemptState.ASKED
    choices: tuple[int, ...] = field(init=False)  # those that the workers were sent
    grant: GrantInfo | None = None
    grant_s: float = 0.0
    answer_due_s: float | None = None  # the decode worker owes an answer until then
    lost_prefill: Blame | None = None  # it died after it got the task; the decode worker was asked what it has
    task_s: float = 0.0  # when the task was sent
    arrived_s: float | None = None  # since when the decode worker has the KV
    gap_s: float | None = None  # since when an early token waits
    num_steps: int = 0  # messages that brought new tokens

    def __post_init__(self) -> None:
        self.choices = self.request.unfinished
        self.request.decode_worker = self.decode.worker_id if self.embedder is None else None

    # --- what is known of it -------------------------------------------------------------------------------

    def has_part(self, worker: RouterWorker) -> bool:
        """Return whether the worker takes part in this attempt."""
        return worker is self.decode or worker is self.prefill

    @property
    def is_prefilling_remotely(self) -> bool:
        """True while a prefill worker has the task and the decode worker has not said that the KV is there."""
        return self.prefill is not None and self.request.status is RequestStatus.PREFILLING

    @property
    def embedder(self) -> RouterWorker | None:
        """The prefill worker that embeds the prompt; None: no embedding is wanted, or a decode worker makes it."""
        is_embedded = self.request.pooling is not None and self.decode.role == "prefill"
        return self.decode if is_embedded else None

    @property
    def way(self) -> Way:
        return Way.LOCAL if self.prefill is None else Way.HANDOFF

    @property
    def workers(self) -> tuple[RouterWorker, ...]:
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)

    @property
    def pair(self) -> str:
        """The workers' names, for texts."""
        return " -> ".join([worker.worker_id for worker in self.workers])

    @property
    def pair_sessions(self) -> tuple[int, int] | None:
        """The sessions of the prefill and the decode worker; None where there is no handoff."""
        return None if self.prefill is None else (self.prefill.link.number, self.decode.link.number)

    @property
    def stage(self) -> str:
        """The stage that a failure now is counted for."""
        match self.request.status:
            case RequestStatus.RESERVED:
                return "reserve"
            case RequestStatus.PREFILLING:
                return "transfer" if self.state >= AttemptState.COMPUTED else "prefill"
            case _:
                return "decode"

    def expects(self, worker: RouterWorker, message: RequestMessage) -> bool:
        """Return whether the sender's part in this attempt, and the attempt's state, allow the message."""
        status = self.request.status
        match message:
            case Grant() | NoCapacity():
                return status is RequestStatus.RESERVED and worker is self.decode
            case TaskRefused(reason=reason):
                doer = self.decode if self.prefill is None else self.prefill
                is_late = reason in UNSERVED and worker is self.decode  # its grammar or adapter has failed
                return is_late or (status is RequestStatus.PREFILLING and worker is doer)
            case HandoffDone():
                return self.is_prefilling_remotely and worker is self.decode
            case HandoffFailed():
                # Without a prefill worker it is about a grant that a local prefill has replaced.
                return self.prefill is not None and status is not RequestStatus.RESERVED and worker is self.decode
            case Embedding():
                return status is RequestStatus.PREFILLING and self.request.pooling is not None
            case FirstToken():
                return worker is self.prefill and status is not RequestStatus.RESERVED
            case PromptLogprobs() | WorkerFailure():
                return True

    def prompt_cache(self) -> tuple[int, bool] | None:
        """Return the prefill session whose cache has the prompt's KV, and whether all of it; None: none that is known.

        Asked when the attempt has failed, so that the next one ships the prompt from there.
        """
        if self.prefill is None or self.lost_prefill is not None:
            return None
        is_whole = self.state >= AttemptState.COMPUTED
        is_computing = self.is_prefilling_remotely and self.prefill.computes_prompt_of(self.request.request_id)
        if is_whole or self.state is AttemptState.BEGUN or is_computing:
            return self.prefill.link.number, is_whole
        return None

    # --- its steps -----------------------------------------------------------------------------------------

    def note(self, state: AttemptState) -> None:
        """Note that it has got so far; news of an earlier state changes nothing."""
        if state > self.state:
            self.state = state

    def reserve(self, prefill: RouterWorker, *, max_local_tokens: int, queue_if_full: bool) -> None:
        """Take the prefill worker's credit, then ask the decode worker for blocks."""
        now_s = self.placed_s
        self._bind_decode(num_tokens=0)
        self._bind_prefill(prefill, now_s)
        self.request.advance(RequestStatus.RESERVED, now_s)
        self.answer_due_s = now_s + ANSWER_WITHIN_S
        message = ReserveKV(
            spec=self.request.spec(self._remaining_s(now_s)),
            max_local_tokens=max_local_tokens,
            queue_if_full=queue_if_full,
            retains_prefix=self.decode_retains is not False,
        )
        self.decode.link.send(message)

    def run_locally(self, now_s: float) -> None:
        """Let the decode worker compute the prompt: at once, or where it answers a ReserveKV that it can as well."""
        self.return_credit()
        self.prefill = None
        self.request.prefill_worker = self.embedder.worker_id if self.embedder is not None else None
        if self.request.status is RequestStatus.QUEUED:
            self._bind_decode(num_tokens=self.request.num_prompt_tokens)
        self.answer_due_s = None
        self._note_task(now_s)
        spec, pooling = self.request.spec(self._remaining_s(now_s)), self.request.pooling
        if pooling is None:
            behind, mask = self.tokens_behind, self.request.first_mask
            self.decode.link.send(LocalTask(spec=spec, fetch=self.fetch, tokens_behind=behind, first_mask=mask))
        else:
            self.decode.link.send(EmbedTask(spec=spec, pooling=pooling, fetch=self.fetch))

    def take_grant(self, grant: GrantInfo, now_s: float) -> None:
        """Note the decode worker's answer to ReserveKV."""
        self.grant, self.grant_s, self.answer_due_s = grant, now_s, None

    def send_task(self, now_s: float, other: RouterWorker | None = None) -> None:
        """Hand the grant to the prefill worker, or to `other` if that one cannot."""
        assert self.grant is not None
        if other is not None:
            self.return_credit()
            self._bind_prefill(other, now_s)
        assert self.prefill is not None
        self._note_task(now_s)
        task = PrefillTask(
            spec=self.request.spec(self._remaining_s(now_s)),
            grant=self.grant,
            sample=not self.request.is_resume,
            fetch=self.fetch,
            retains_prefix=self.decode_retains is not True,
            first_mask=self.request.first_mask,
        )
        self.prefill.link.send(task)

    def ask_if_arrived(self, now_s: float) -> None:
        """Ask the decode worker what it has: the prefill worker is lost or silent, and that decides."""
        self.answer_due_s = now_s + ANSWER_WITHIN_S
        self.decode.link.send(self._abort(unless_arrived=True))

    def drop_choice(self, choice: int) -> None:
        """Tell the workers that they need not go on with a choice that has ended here."""
        for worker in self._holders():
            worker.link.send(self._abort(choices=(choice,)))

    def arrive(self, now_s: float) -> None:
        """Note that the decode worker has all of the KV. A first token may still come from the prefill worker."""
        self.return_credit()
        self.decode.note_prefilled(self.request.request_id)
        self.note(AttemptState.ARRIVED)
        self.answer_due_s = None
        self.arrived_s = now_s
        self.request.advance(RequestStatus.DECODING, now_s)

    def leave(self, *, tell: bool = True) -> None:
        """End the attempt on every worker that may hold something of it, and in the workers' books."""
        if tell:
            for worker in self._holders():
                worker.link.send(self._abort())
        self.return_credit()
        self.decode.release(self.request.request_id)

    def return_credit(self) -> None:
        """Note that the prefill worker computes nothing for this request any more. Idempotent."""
        if self.prefill is not None:
            self.prefill.release(self.request.request_id)

    def _note_task(self, now_s: float) -> None:
        self.note(AttemptState.SENT)
        self.task_s = now_s
        if self.request.status is not RequestStatus.PREFILLING:
            self.request.advance(RequestStatus.PREFILLING, now_s)

    def _bind_decode(self, *, num_tokens: int) -> None:
        request, decode = self.request, self.decode
        longest = max(len(request.choices[choice].tokens) for choice in self.choices)
        spec = decode.hello.spec
        blocks = spec.num_blocks_for(request.num_prompt_tokens + longest) + len(self.choices) - 1
        if not num_tokens:  # it computes no prompt: that comes, and most of it thin
            blocks = handed_frames(spec, blocks, request.num_prompt_tokens)
        is_row = request.pooling is None  # in decode steps, later
        context = len(self.choices) * (request.num_prompt_tokens + longest) if is_row else 0
        work_s = self._work_s() if num_tokens else 0.0
        load = RequestLoad(num_tokens, len(self.choices), blocks, self.placed_s, work_s, context, request.pace)
        decode.bind(request.request_id, load)

    def _bind_prefill(self, prefill: RouterWorker, now_s: float) -> None:
        request = self.request
        self.prefill, request.prefill_worker = prefill, prefill.worker_id
        spec, num_tokens = prefill.hello.spec, request.num_prompt_tokens
        blocks = spec.num_blocks_for(num_tokens)
        if prefill.link.number == self.whole_prompt_on:
            num_tokens = min(num_tokens, spec.block_size)  # the rest is in its prefix cache
        load = RequestLoad(num_tokens, len(request.unfinished), blocks, now_s, self._work_s())
        prefill.bind(request.request_id, load)

    def _work_s(self) -> float:
        """Return the time to compute the prompt, as the policy has said or as it would be on an empty worker."""
        return self.prediction.prefill_s if self.prediction is not None else self.request.unloaded_s

    def _remaining_s(self, now_s: float) -> float | None:
        return None if self.deadline_s is None else max(0.0, self.deadline_s - now_s)

    def _holders(self) -> tuple[RouterWorker, ...]:
        """Return the workers that may hold something: the prefill worker until the KV has arrived."""
        return self.workers if self.state < AttemptState.ARRIVED else (self.decode,)

    def _abort(self, *, unless_arrived: bool = False, choices: tuple[int, ...] = ()) -> Abort:
        return Abort(
            request_id=self.request.request_id,
            attempt=self.request.attempt_number,
            unless_arrived=unless_arrived,
            choices=choices,
        )
