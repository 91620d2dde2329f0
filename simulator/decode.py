"""The decode half of a simulated worker: the real scheduler, and what `decode.role` does around it.

    ReserveKV ─> Grant ─> ... shipped ... ─> arrived ─> adopted ─┐
    LocalTask ─────────────> waiting ─> prompt computed here ────┴─> running ─> finished

Tokens leave when somebody can tell the difference: the first one, the first decoded one, and all others with the last.
A worker that dies says before what it would have streamed by then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from ..common.batch import Batch, StepOutput
from ..common.clock import Clock
from ..common.errors import CapacityError
from ..common.kv_spec import KVCacheSpec
from ..common.messages import (
    Abort,
    ChoiceTokens,
    FetchFrom,
    Grant,
    HandoffDone,
    HandoffFailed,
    Message,
    NoCapacity,
    RequestTokens,
    ReserveKV,
    StepTokens,
    TaskRefused,
    WorkerFailure,
)
from ..common.request import FinishReason, RequestSpec, Sequence
from ..decode.scheduler import DecodeScheduler
from ..decode.waiting import WaitingReservations
from ..kvcache.blocks import BlockPool
from ..kvcache.prefix_cache import PrefixCache
from ..transfer.receive.receiver import KVReceiver
from .fetches import SimFetches
from .jobs import TOKEN, Job, TokenCount
from .reservations import Reservation, Reservations


@dataclass(slots=True, eq=False)
class Answer:
    """A request that decodes (or computes its prompt) here."""

    spec: RequestSpec
    job: Job
    seq: Sequence
    num_told: int  # of its tokens, those that the router has

    @property
    def num_outputs(self) -> int:
        return len(self.seq.token_ids) - self.job.num_prompt_tokens

    @property
    def num_missing(self) -> int:
        return self.job.num_output_tokens - self.num_outputs


class DecodePart:
    """Books of requests, reservations and sequences. The engine asks it for batches."""

    def __init__(
        self,
        pool: BlockPool,
        spec: KVCacheSpec,
        clock: Clock,
        job_of: Callable[[str], Job],
        to_router: Callable[[Message], None],
        *,
        fetches: SimFetches,
        cache: PrefixCache,
        worker_id: str,
        life: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        tpot_objective_s: float | None,
    ) -> None:
        self.scheduler = DecodeScheduler(
            pool,
            spec,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            tpot_objective_s=tpot_objective_s,
            cache=cache,
        )
        self.reservations = Reservations(pool, spec, clock, job_of, worker_id, life)
        self.answers: dict[str, Answer] = {}  # by request id
        self._pool = pool
        self._job_of = job_of
        self._fetches = fetches
        self.to_router = to_router
        self._waiting = WaitingReservations(
            cast("KVReceiver", self.reservations), pool, spec, clock, lambda: self.scheduler.growth_reserve
        )
        self.num_sampled = 0  # tokens, since start

    @property
    def num_unfinished(self) -> int:
        return len(self.answers) + len(self.reservations) + len(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Requests that want a step and are in none."""
        return self.scheduler.num_waiting + len(self.reservations.arrived)

    @property
    def has_deadlines(self) -> bool:
        """Some promise may lapse, or somebody waits for blocks."""
        return bool(len(self.reservations) or len(self._waiting))

    @property
    def prefix_queries(self) -> int:
        return self.scheduler.blocks.prefix_queries + self.reservations.prefix_queries

    @property
    def prefix_hits(self) -> int:
        return self.scheduler.blocks.prefix_hits + self.reservations.prefix_hits

    def set_active(self, on: bool) -> None:
        """Take new work, or not."""
        self.reservations.is_active = on
        self._answer(self._waiting.retry())

    # --- messages -------------------------------------------------------------------------------------------

    def on_reserve(self, message: ReserveKV) -> bool:
        """True: it waits for blocks, until a step ends after `MAX_WAIT_S`."""
        if self._is_old(message.spec):
            return False
        answers = self._waiting.reserve("", message)
        self._answer(answers)
        return self._waiting.holds(message.spec.request_id)

    def _answer(self, answers: list[tuple[str, Grant | NoCapacity]]) -> None:
        for _, answer in answers:
            self.to_router(answer)

    def on_local(self, spec: RequestSpec, fetch: FetchFrom | None) -> None:
        if self._is_old(spec):
            return
        self._forget(spec.request_id, spec.attempt)
        if self.reservations.draining:
            self.refuse(spec, "draining")
            return
        job = self._job_of(spec.request_id)
        seq = job.sequence(spec, _num_outputs(spec))
        seq.pending_choices = spec.choices if not spec.is_resume else ()
        try:
            self.scheduler.add(seq)
        except CapacityError as error:
            self.refuse(spec, "never_fits", str(error))
            return
        self.answers[spec.request_id] = Answer(spec, job, seq, _num_outputs(spec))
        if fetch is not None:
            self._fetches.begin(seq, fetch)

    def _is_old(self, spec: RequestSpec) -> bool:
        """A new attempt ends the one before it."""
        known = self.answers.get(spec.request_id)
        if known is not None and known.spec.attempt >= spec.attempt:
            return True
        if known is not None:
            self._end(known)
        return False

    def refuse(self, spec: RequestSpec, reason: str, detail: str = "") -> None:
        self.to_router(TaskRefused(request_id=spec.request_id, attempt=spec.attempt, reason=reason, detail=detail))

    def on_abort(self, message: Abort) -> None:
        request_id, attempt = message.request_id, message.attempt
        answer = self.answers.get(request_id)
        if answer is not None and answer.spec.attempt > attempt:
            return
        if message.unless_arrived:
            self._abort_unless_arrived(message, answer)
        elif answer is not None:
            self._end(answer)
        else:
            self._forget(request_id, attempt)

    def _abort_unless_arrived(self, message: Abort, answer: Answer | None) -> None:
        request_id, attempt = message.request_id, message.attempt
        reservation = self.reservations.get(request_id)
        if answer is not None or (reservation is not None and reservation.has_arrived):
            self.to_router(HandoffDone(request_id=request_id, attempt=attempt))
            return
        self._forget(request_id, attempt)
        self._fail(request_id, attempt, "aborted before it arrived", "abort", "")

    def _fail(self, request_id: str, attempt: int, reason: str, blame: str, worker_id: str) -> None:
        self.to_router(
            HandoffFailed(request_id=request_id, attempt=attempt, reason=reason, blame=blame, worker_id=worker_id)
        )

    def _forget(self, request_id: str, attempt: int) -> None:
        """Forget a request whose prompt has not been taken over."""
        reservation = self.reservations.get(request_id)
        if reservation is not None and reservation.spec.attempt <= attempt:
            self.reservations.drop(reservation)
        self._waiting.drop(request_id, attempt)

    def _end(self, answer: Answer) -> None:
        del self.answers[answer.spec.request_id]
        self.scheduler.remove(answer.seq)

    # --- handoffs -------------------------------------------------------------------------------------------

    def arrive(self, reservation: Reservation, num_first_tokens: int, num_bytes: int) -> None:
        """A shipment is complete."""
        self.reservations.arrive(reservation, num_first_tokens)
        spec = reservation.spec
        self.to_router(HandoffDone(request_id=spec.request_id, attempt=spec.attempt, num_bytes=num_bytes))

    def on_writer_lost(self, writer: str, worker_id: str) -> None:
        for reservation in self.reservations.written_by(writer):
            spec = reservation.spec
            self.reservations.drop(reservation)
            self._fail(spec.request_id, spec.attempt, f"connection to {worker_id} lost", "peer", worker_id)

    def tick(self) -> None:
        for reservation in self.reservations.lapsed():
            spec = reservation.spec
            self.reservations.drop(reservation)
            self._fail(spec.request_id, spec.attempt, "no prefill worker opened the grant in time", "expired", "")
        self._answer(self._waiting.retry())

    def drain(self) -> None:
        self.reservations.draining = True
        self._answer(self._waiting.retry())

    # --- steps ----------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        for reservation in list(self.reservations.arrived):
            self._adopt(reservation)
        batch = self.scheduler.schedule()
        self._end_misfits()
        self._answer(self._waiting.retry())
        return batch

    def _adopt(self, reservation: Reservation) -> None:
        spec = reservation.spec
        blocks = self.reservations.adopt(reservation)
        job = self._job_of(spec.request_id)
        num_outputs = max(_num_outputs(spec), reservation.num_first_tokens)
        seq = job.sequence(spec, num_outputs)
        seq.is_retained_elsewhere = not reservation.retains_prefix
        self.answers[spec.request_id] = Answer(spec, job, seq, num_outputs)
        self.scheduler.blocks.deal([seq], spec.num_prompt_tokens, blocks, [])
        self.scheduler.adopt(seq)

    def _end_misfits(self) -> None:
        while self.scheduler.misfits:
            seq = self.scheduler.misfits[0]
            answer = self.answers[seq.request_id]
            reason = f"{seq.num_tokens} tokens do not fit into {self._pool.num_blocks} blocks"
            spec = answer.spec
            self.to_router(WorkerFailure(request_id=spec.request_id, attempt=spec.attempt, reason=reason))
            self._end(answer)

    def complete(self, batch: Batch, step_s: float, swap_s: float) -> None:
        """The step is over: one token for each row that fed its last known one."""
        samples = [row.samples for row in batch.rows]
        self.scheduler.observe(batch, StepOutput([], step_s, batch.num_tokens, swap_s))
        alive = self.scheduler.complete(batch)
        updates = []
        for row, has_sampled, is_alive in zip(batch.rows, samples, alive, strict=True):
            if not (is_alive and has_sampled):
                continue
            answer = self.answers[row.seq.request_id]
            row.seq.token_ids.append(0)
            row.seq.pending_choices = ()
            self.num_sampled += 1
            finished = answer.num_missing <= 0
            if finished or answer.num_told <= _FIRST_TOLD:
                updates.append(self.tell(answer, finished=finished))
            if finished:
                self._end(answer)
        if updates:
            self.to_router(StepTokens(updates=tuple(updates)))

    def tell(self, answer: Answer, *, finished: bool = False, beyond: int = 0) -> RequestTokens:
        """Return what the router does not have yet, with `beyond` tokens that running steps have surely yielded."""
        count = answer.num_outputs + beyond - answer.num_told
        reason = FinishReason.STOP if finished else None
        # The first one that was decoded repeats the one before it: the prefill worker's message may be lost.
        first = answer.num_told - 1 if answer.num_told == 1 and not answer.spec.is_resume else answer.num_told
        tokens = ChoiceTokens(0, first, (TOKEN,) * (count + answer.num_told - first), reason)
        answer.num_told += count
        return RequestTokens(answer.spec.request_id, answer.spec.attempt, (tokens,), answer.seq.num_cached_tokens)

    def skip(self, batch: Batch, num_steps: int) -> None:
        """Every row has gone through so many more decode steps, and is in the next one."""
        blocks = self.scheduler.blocks
        caches = self._pool.enable_prefix_caching
        for row in batch.rows:
            seq = row.seq
            seq.num_computed_tokens += num_steps
            cast(TokenCount, seq.token_ids).count += num_steps
            while not blocks.has_slot(seq):
                blocks.grow(seq)
            if caches:
                blocks.publish(seq)
        self.num_sampled += num_steps * len(batch.rows)


_FIRST_TOLD = 1  # tokens: the first one and the first decoded one are told at once


def _num_outputs(spec: RequestSpec) -> int:
    return len(spec.outputs[0]) // 4 if spec.outputs else 0
