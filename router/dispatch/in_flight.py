"""Every request that is not terminal, and the ways in which an attempt and a request end.

    add ─> queued ─(placer)─> an attempt ─┬─> finish, fail, abort: its one terminal state
             ^                            │
             └────────── retry ───────────┘   unless attempts or budget are used up, or it has killed three workers

Whatever ends, everything that it holds on workers is given back first, and the placer is told to look again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import structlog

from ...common.clock import Clock
from ..queue.request_queue import RequestQueue
from ..state.attempt import Live
from ..state.errors import StreamError
from ..state.failures import DRAINED, MAX_STRIKES, NOTICE_S, WORKER_LOST, Blame, WorkerLife
from ..state.history import RequestHistory
from ..state.observer import Observer
from ..state.request import RequestStatus
from ..state.worker import RouterWorker
from .due_times import DueTimes
from .retries import RetryBudget

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class RequestTally:
    """Requests since the start: admitted = running + finished + failed + aborted."""

    admitted: int = 0
    finished: int = 0
    failed: int = 0
    aborted: int = 0


class InFlightRequests:
    """Owns the live requests and the queue."""

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
        self.max_attempts = max_attempts
        self._clock = clock
        self._observer = observer
        self._budget = budget
        self._on_blameless = on_blameless
        self._live: dict[str, Live] = {}
        self._idle = asyncio.Event()

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Live]:
        return iter(list(self._live.values()))

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._live

    def get(self, request_id: str) -> Live | None:
        return self._live.get(request_id)

    def add(self, live: Live) -> None:
        assert live.request.request_id not in self._live, live.request.request_id
        self._live[live.request.request_id] = live
        self.tally.admitted += 1
        self._budget.on_admitted()
        self.enqueue(live)

    def enqueue(self, live: Live) -> None:
        now = self._clock.now()
        self.queue.add(live, apart=live.must_run_alone or live.is_put_off(now))
        self.due_times.schedule(live, now)
        self.is_due = True

    # --- an attempt fails -----------------------------------------------------------------------------------

    def retry(self, live: Live, blame: Blame) -> None:
        """End the attempt everywhere; queue the next one, or give up."""
        request, stage, attempt, now = live.request, live.stage, live.request.attempt, self._clock.now()
        sessions = frozenset(worker.link.number for worker in (live.prefill, live.decode) if worker is not None)
        live.note_cache()
        self._leave(live)
        log.warning("attempt_failed", request_id=request.request_id, attempt=attempt, stage=stage, reason=blame.text)
        self._observer.on_retry(stage, blame.reason)
        request.num_failures += blame.is_counted
        if blame.strike is not None:
            self._strike(live, blame.strike)
        error = self._poison(live) or self._last_straw(live, blame)
        if error is not None:
            self.fail(live, error)
            return
        live.is_resuming = live.is_resuming or (request.is_resume and blame.reason in (WORKER_LOST, DRAINED))
        self._put_off(live, blame, sessions, now)
        request.attempt += 1
        for choice in request.choices:
            choice.forget_early()
        live.event_s = now
        request.advance(RequestStatus.QUEUED, now)
        self.enqueue(live)

    def _strike(self, live: Live, life: WorkerLife) -> None:
        if live.strikes - {life}:
            self._on_blameless(life)
        live.strikes.add(life)

    def let_others_first(self, until_s: float) -> None:
        """Suspects that are queued wait until then, if anybody else is here."""
        if all(live.strikes for live in self):
            return
        for live in self:
            if live.strikes and live.request.status is RequestStatus.QUEUED:
                live.not_before_s = max(live.not_before_s, until_s)
                self.queue.remove(live)
                self.enqueue(live)

    def _poison(self, live: Live) -> StreamError | None:
        if len(live.strikes) < MAX_STRIKES:
            return None
        self._observer.on_poisoned()
        names = ", ".join(sorted({worker_id for worker_id, _ in live.strikes}))
        text = f"{len(live.strikes)} workers were lost while they computed this request, the last one alone: {names}"
        return StreamError(text, "poison_request", 500)

    def _last_straw(self, live: Live, blame: Blame) -> StreamError | None:
        """Why there is no next attempt."""
        failures = live.request.num_failures
        if failures < self.max_attempts:
            return None
        status = 503 if blame.reason in (WORKER_LOST, "no_answer") else 500
        return StreamError(f"{failures} attempts failed; the last one: {blame.text}", blame.reason, status)

    def _put_off(self, live: Live, blame: Blame, sessions: frozenset[int], now_s: float) -> None:
        """What the retry costs, and when it may begin."""
        live.charge = None
        if not blame.is_charged:
            return
        live.num_same = live.num_same + 1 if live.last_reason == blame.reason else 1
        live.last_reason = blame.reason
        live.not_before_s = now_s + self._budget.pause_s(live.num_same)
        live.charge = self._budget.charge(sessions, now_s, blame.suspect)

    def explain(self, worker: RouterWorker) -> None:
        """The worker is lost: errors that its peers reported a moment ago were this loss."""
        now, session = self._clock.now(), worker.link.number
        for live in self:
            charge = live.charge
            if charge is None or not charge.is_explained_by(session, now):
                continue
            if charge.is_paid:
                self._budget.give_back()
            live.charge, live.not_before_s, self.is_due = None, now, True
            if charge.suspect == worker.life and not worker.has_said_goodbye:
                self._strike(live, worker.life)
                if (error := self._poison(live)) is not None:
                    self.fail(live, error)
                elif live.request.status is RequestStatus.QUEUED:  # from now on it may wait for a worker of its own
                    self.queue.remove(live)
                    self.enqueue(live)

    def settle(self, live: Live, now_s: float) -> None:
        """A retry without a token gets one now, waits on, or is given up."""
        if live.charge is None or live.charge.is_paid or self._budget.pay(live.charge, now_s):
            return
        if now_s - live.charge.at_s >= NOTICE_S:
            self._observer.on_budget_exhausted()
            text = f"too many retries for now; this request's last attempt failed: {live.last_reason}"
            self.fail(live, StreamError(text, "retry_budget_exhausted", 503))

    # --- a request ends -------------------------------------------------------------------------------------

    def finish(self, live: Live) -> None:
        """Every choice has ended. The decode worker knows it, unless one ended elsewhere."""
        self._leave(live, tell=live.request.status is not RequestStatus.DECODING or bool(live.ended_here))
        self.tally.finished += 1
        self._close(live, RequestStatus.FINISHED, "ok")

    def fail(self, live: Live, error: StreamError) -> None:
        """The client gets what was accepted, then the error."""
        self._leave(live)
        live.request.error_code = error.code
        log.error("request_failed", request_id=live.request.request_id, code=error.code, error=str(error))
        self.tally.failed += 1
        self._close(live, RequestStatus.FAILED, "failed")
        live.stream.fail(error)

    def abort(self, live: Live) -> None:
        """The client left. Idempotent."""
        if not live.request.is_finished:
            self._leave(live)
            self.tally.aborted += 1
            self._close(live, RequestStatus.ABORTED, "aborted")

    async def wait_idle(self) -> None:
        """Until no request lives."""
        while self._live:
            self._idle.clear()
            await self._idle.wait()

    def _leave(self, live: Live, *, tell: bool = True) -> None:
        live.leave(tell=tell)
        self.is_due = True

    def _close(self, live: Live, status: RequestStatus, resume_result: str) -> None:
        self.queue.remove(live)
        if live.is_resuming:
            self._observer.on_resumed(resume_result)
        live.request.advance(status, self._clock.now())
        self._observer.on_outcome(self.history.add(live.request))
        del self._live[live.request.request_id]
        live.stream.wake()
        self._observer.on_finished(live.request)
        if not self._live:
            self._idle.set()
