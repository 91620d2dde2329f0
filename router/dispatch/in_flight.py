"""Every request that is not terminal, and the ways in which an attempt and a request end.

    add ─> queued ─(placer)─> an attempt ─┬─> finish, fail, abort: its one terminal state
             ^                            │
             └────────── retry ───────────┘   unless attempts or budget are used up, or it ends workers (verdicts.py)

Whatever ends, everything that it holds on workers is given back first, and the placer is told to look again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import structlog

from ...common.clock import Clock
from ..queue.request_queue import RequestQueue
from ..state.attempt import Attempt
from ..state.errors import StreamError
from ..state.failures import DRAINED, NOTICE_S, WORKER_LOST, Blame, WorkerLife
from ..state.history import RequestHistory
from ..state.observer import Observer
from ..state.request import RequestStatus
from ..state.tracked_request import TrackedRequest
from ..state.worker import RouterWorker
from .due_times import DueTimes
from .retries import RetryBudget
from .running_steps import may_have_ended, suspicion_of
from .verdicts import Verdicts

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class RequestTally:
    """Requests since the start: admitted = running + finished + failed + aborted."""

    admitted: int = 0
    finished: int = 0
    failed: int = 0
    aborted: int = 0


class InFlightRequests:
    """`InFlightRequests` owns the requests that are not terminal, and the queue."""

    def __init__(
        self,
        clock: Clock,
        observer: Observer,
        budget: RetryBudget,
        *,
        max_queue: int,
        max_attempts: int,
        by_arrival: bool = False,
        on_blameless: Callable[[WorkerLife], None] = lambda life: None,
    ) -> None:
        """`by_arrival`: the order in which requests are served (`RequestQueue`).

        `on_blameless`: a worker was lost with a suspect.
        """
        self.queue = RequestQueue(max_queue, by_arrival=by_arrival)
        self.is_due = False  # something changed that may let a queued request go
        self.tally = RequestTally()
        self.history = RequestHistory()
        self.due_times = DueTimes()
        self.verdicts = Verdicts(max_attempts, observer)
        self._clock = clock
        self._observer = observer
        self._budget = budget
        self._on_blameless = on_blameless
        self._tracked: dict[str, TrackedRequest] = {}
        self._idle = asyncio.Event()

    def __len__(self) -> int:
        return len(self._tracked)

    def __iter__(self) -> Iterator[TrackedRequest]:
        return iter(list(self._tracked.values()))

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._tracked

    def get(self, request_id: str) -> TrackedRequest | None:
        return self._tracked.get(request_id)

    def add(self, tracked: TrackedRequest) -> None:
        assert tracked.request.request_id not in self._tracked, tracked.request.request_id
        self._tracked[tracked.request.request_id] = tracked
        self.tally.admitted += 1
        self._budget.on_admitted()
        self.enqueue(tracked)

    def enqueue(self, tracked: TrackedRequest) -> None:
        now = self._clock.now()
        self.queue.add(tracked, apart=tracked.must_run_alone or tracked.is_put_off(now))
        self.due_times.schedule(tracked, now)
        self.is_due = True

    # --- an attempt fails -----------------------------------------------------------------------------------

    def retry(self, tracked: TrackedRequest, blame: Blame) -> None:
        """End the attempt everywhere; queue the next one, or give up."""
        request, attempt, now = tracked.request, tracked.attempt, self._clock.now()
        assert attempt is not None, request.request_id
        if not request.unfinished:  # its tokens are all here: what it is held for has a limit of its own
            return
        number, stage = request.attempt_number, attempt.stage
        sessions = frozenset(worker.link.number for worker in attempt.workers)
        self._take_back(tracked, attempt, now)
        log.warning("attempt_failed", request_id=request.request_id, attempt=number, stage=stage, reason=blame.text)
        self._observer.on_retry(stage, blame.reason)
        if blame.is_counted:
            request.num_failures += 1
            tracked.failures[blame.text] = tracked.failures.get(blame.text, 0) + 1
        if blame.strike is not None:
            self._strike(tracked, blame.strike)
        if (error := self.verdicts.error(tracked, now, blame)) is not None:
            self.fail(tracked, error)
            return
        tracked.is_resuming = tracked.is_resuming or (request.is_resume and blame.reason in (WORKER_LOST, DRAINED))
        self._put_off(tracked, blame, sessions, now)
        self._queue_again(tracked, now)

    def _take_back(self, tracked: TrackedRequest, attempt: Attempt, now_s: float) -> None:
        """End an attempt that is not the last one; note who computed it, and where the prompt's KV is."""
        tracked.suspicion = suspicion_of(attempt, now_s) or tracked.suspicion
        cache = attempt.prompt_cache()
        if cache is not None:
            tracked.search.computed_on, tracked.search.computed_whole = cache
        self._leave(tracked)

    def _queue_again(self, tracked: TrackedRequest, now_s: float) -> None:
        request = tracked.request
        request.attempt_number += 1
        for choice in request.choices:
            choice.forget_early()
        tracked.event_s = now_s
        request.advance(RequestStatus.QUEUED, now_s)
        self.enqueue(tracked)

    # --- a background request makes way -----------------------------------------------------------------------

    def suspend(self, tracked: TrackedRequest, now_s: float) -> None:
        """Take a request back from its workers; it goes on from its accepted tokens when it is resumed."""
        if not tracked.request.unfinished:  # its tokens are all here
            return
        tracked.is_suspended = True
        tracked.search.note_hope()  # it looks for no worker until it goes on
        if tracked.attempt is not None:
            self.interrupt(tracked, now_s)
        else:
            self.queue.remove(tracked)
            self.enqueue(tracked)

    def interrupt_on(self, workers: Sequence[RouterWorker], now_s: float) -> None:
        """Take back what runs on any of these workers."""
        for tracked in self:
            if tracked.attempt is not None and not set(workers).isdisjoint(tracked.attempt.workers):
                self.interrupt(tracked, now_s)

    def interrupt(self, tracked: TrackedRequest, now_s: float) -> None:
        """Take a request back from its workers, through no fault of anybody's; it is queued again."""
        if tracked.attempt is not None and tracked.request.unfinished:
            self._take_back(tracked, tracked.attempt, now_s)
            self._queue_again(tracked, now_s)

    def resume(self, tracked: TrackedRequest) -> None:
        """Let a suspended request be placed again."""
        tracked.is_suspended = False
        self.is_due = True

    def _strike(self, tracked: TrackedRequest, life: WorkerLife) -> None:
        if tracked.strikes - {life}:
            self._on_blameless(life)
        tracked.strikes.add(life)
        tracked.lost_with.add(life)

    def let_others_first(self, until_s: float) -> None:
        """Suspects that are queued wait until then, if anybody else is here."""
        if all(tracked.strikes for tracked in self):
            return
        for tracked in self:
            if tracked.strikes and tracked.request.status is RequestStatus.QUEUED:
                tracked.not_before_s = max(tracked.not_before_s, until_s)
                self.queue.remove(tracked)
                self.enqueue(tracked)

    def _put_off(self, tracked: TrackedRequest, blame: Blame, sessions: frozenset[int], now_s: float) -> None:
        """Charge the retry, and decide when it may begin."""
        if not blame.is_charged:
            return
        tracked.num_same = tracked.num_same + 1 if tracked.last_reason == blame.reason else 1
        tracked.last_reason = blame.reason
        tracked.not_before_s = now_s + self._budget.pause_s(tracked.num_same)
        tracked.charge = self._budget.charge(sessions, now_s)

    def explain(self, worker: RouterWorker) -> None:
        """The worker is lost: errors that its peers reported a moment ago were this loss, and so may others be."""
        now, session = self._clock.now(), worker.link.number
        for tracked in self:
            charge = tracked.charge
            if charge is not None and charge.is_explained_by(session, now):
                if charge.is_paid:
                    self._budget.give_back()
                tracked.charge, tracked.not_before_s, self.is_due = None, now, True
                tracked.lost_with.add(worker.life)
            suspicion = tracked.suspicion
            if suspicion is None or worker.has_said_goodbye or now - suspicion.at_s > NOTICE_S:
                continue
            if may_have_ended(suspicion, worker):
                self._strike_late(tracked, worker.life, now)

    def _strike_late(self, tracked: TrackedRequest, life: WorkerLife, now_s: float) -> None:
        """Give a strike for an attempt that has ended before."""
        self._strike(tracked, life)
        if (error := self.verdicts.error(tracked, now_s)) is not None:
            self.fail(tracked, error)
        elif tracked.request.status is RequestStatus.QUEUED:  # from now on it may wait for a worker of its own
            self.queue.remove(tracked)
            self.enqueue(tracked)

    def settle(self, tracked: TrackedRequest, now_s: float) -> None:
        """A retry without a token gets one now, waits on, or is given up."""
        if tracked.charge is None or tracked.charge.is_paid or self._budget.pay(tracked.charge, now_s):
            return
        if now_s - tracked.charge.at_s >= NOTICE_S:
            self._observer.on_budget_exhausted()
            text = f"too many retries for now; this request's last attempt failed: {tracked.last_reason}"
            self.fail(tracked, StreamError(text, "retry_budget_exhausted", 503))

    # --- a request ends -------------------------------------------------------------------------------------

    def finish(self, tracked: TrackedRequest) -> None:
        """Every choice has ended. Its last worker knows it, unless one ended elsewhere."""
        knows = tracked.request.status is RequestStatus.DECODING or bool(tracked.request.embedding)
        self._leave(tracked, tell=not knows or bool(tracked.ended_here))
        self.tally.finished += 1
        self._close(tracked, RequestStatus.FINISHED, "ok")

    def finish_unless_held(self, tracked: TrackedRequest) -> None:
        """Finish a request of which every choice has ended, unless something of its answer is yet to come."""
        if not tracked.request.unfinished and not tracked.stream.is_held:
            self.finish(tracked)

    def fail(self, tracked: TrackedRequest, error: StreamError) -> None:
        """The client gets what was accepted, then the error."""
        self._leave(tracked)
        tracked.request.error_code = error.code
        log.error("request_failed", request_id=tracked.request.request_id, code=error.code, error=str(error))
        self.tally.failed += 1
        self._close(tracked, RequestStatus.FAILED, "failed")
        tracked.stream.fail(error)

    def abort(self, tracked: TrackedRequest) -> None:
        """The client left. Idempotent."""
        if not tracked.request.is_finished:
            self._leave(tracked)
            self.tally.aborted += 1
            self._close(tracked, RequestStatus.ABORTED, "aborted")

    async def wait_idle(self) -> None:
        """Wait until no request lives."""
        while self._tracked:
            self._idle.clear()
            await self._idle.wait()

    def _leave(self, tracked: TrackedRequest, *, tell: bool = True) -> None:
        tracked.end_attempt(tell=tell)
        self.is_due = True

    def _close(self, tracked: TrackedRequest, status: RequestStatus, resume_result: str) -> None:
        self.queue.remove(tracked)
        if tracked.is_resuming:
            self._observer.on_resumed(resume_result)
        tracked.request.advance(status, self._clock.now())
        self._observer.on_outcome(self.history.add(tracked.request))
        del self._tracked[tracked.request.request_id]
        tracked.stream.wake()
        self._observer.on_finished(tracked.request)
        if not self._tracked:
            self._idle.set()
