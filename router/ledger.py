"""Every request that is not terminal, and the ways in which an attempt and a request end.

    add ─> queued ─(placer)─> an attempt ─┬─> finish, fail, abort: its one terminal state
             ^                            │
             └────────── retry ───────────┘

Whatever ends, everything that it holds on workers is given back first, and the placer is told to look again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import structlog

from ..common.clock import Clock
from .live import Blame, Live
from .observer import Observer
from .queue import RequestQueue
from .request import RequestStatus, StreamError

log = structlog.get_logger(__name__)


class Ledger:
    """Owns the live requests and the queue."""

    def __init__(self, clock: Clock, observer: Observer, *, max_queue: int, max_attempts: int) -> None:
        self.queue = RequestQueue(max_queue)
        self.is_due = False  # something changed that may let a queued request go
        self._clock = clock
        self._observer = observer
        self._max_attempts = max_attempts
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
        self.enqueue(live)

    def enqueue(self, live: Live) -> None:
        self.queue.add(live)
        self.is_due = True

    def retry(self, live: Live, blame: Blame) -> None:
        """End the attempt everywhere; queue the next one, or give up."""
        request, stage, attempt, now = live.request, live.stage, live.request.attempt, self._clock.now()
        self._leave(live)
        log.warning("attempt_failed", request_id=request.request_id, attempt=attempt, stage=stage, reason=blame.text)
        self._observer.on_retry(stage, blame.reason)
        request.num_failures += blame.is_counted
        if request.num_failures >= self._max_attempts:
            status = 503 if blame.reason in ("worker_lost", "no_answer") else 500
            text = f"{request.num_failures} attempts failed; the last one: {blame.text}"
            self.fail(live, StreamError(text, blame.reason, status))
            return
        request.attempt += 1
        for choice in request.choices:
            choice.forget_early()
        live.event_s = now
        request.advance(RequestStatus.QUEUED, now)
        self.enqueue(live)

    def finish(self, live: Live) -> None:
        """Every choice has ended. The decode worker knows it, unless one ended elsewhere."""
        self._leave(live, tell=live.request.status is not RequestStatus.DECODING or bool(live.ended_here))
        self._close(live, RequestStatus.FINISHED)

    def fail(self, live: Live, error: StreamError) -> None:
        """The client gets what was accepted, then the error."""
        self._leave(live)
        log.error("request_failed", request_id=live.request.request_id, code=error.code, error=str(error))
        self._close(live, RequestStatus.FAILED)
        live.stream.fail(error)

    def abort(self, live: Live) -> None:
        """The client left. Idempotent."""
        if not live.request.is_finished:
            self._leave(live)
            self._close(live, RequestStatus.ABORTED)

    async def wait_idle(self) -> None:
        """Until no request lives."""
        while self._live:
            self._idle.clear()
            await self._idle.wait()

    def _leave(self, live: Live, *, tell: bool = True) -> None:
        live.leave(tell=tell)
        self.is_due = True

    def _close(self, live: Live, status: RequestStatus) -> None:
        self.queue.remove(live)
        live.request.advance(status, self._clock.now())
        del self._live[live.request.request_id]
        live.stream.wake()
        self._observer.on_finished(live.request)
        if not self._live:
            self._idle.set()
