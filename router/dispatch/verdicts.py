"""Verdicts on requests whose attempts fail: one more attempt, or none.

    MAX_STRIKES workers lost while they computed it    refused: it ends them
    max_attempts failures                              given up

Both hold for a fleet that loses workers with this request alone. One that loses as many without it proves less: a
third worker may be lost with it by chance. For every two such losses within STORM_S a request may have one more
strike and one more failure, up to MAX_EXTRA. Losses for which a request was refused speak for nobody.
"""

from __future__ import annotations

from ..state.errors import StreamError
from ..state.failures import MAX_STRIKES, WORKER_LOST, Blame, WorkerLife
from ..state.observer import Observer
from ..state.tracked_request import TrackedRequest

STORM_S = 300.0  # longer: what a host's reboot cost an hour ago lets a poison end more workers
MAX_EXTRA = 3  # of workers, that a poison may end amid others' losses
_LOSSES_FOR_ONE = 2
_MOST_TOLD = 5  # failures in the error of a request that has no attempt left, the last ones


class Verdicts:
    """Time is the caller's."""

    def __init__(self, max_attempts: int, observer: Observer) -> None:
        self._max_attempts = max_attempts
        self._observer = observer
        self._lost_s: dict[WorkerLife, float] = {}

    def note_loss(self, life: WorkerLife, now_s: float) -> None:
        """Note that a worker is lost that had not said goodbye."""
        self._forget_old(now_s)
        self._lost_s[life] = now_s

    def note_return(self, life: WorkerLife) -> None:
        """Note that a lost worker is back: it was away, not dead."""
        self._lost_s.pop(life, None)

    def error(self, tracked: TrackedRequest, now_s: float, blame: Blame | None = None) -> StreamError | None:
        """Return why there is no next attempt after what `blame` tells, or after one more strike; None: there is."""
        self._forget_old(now_s)
        num_others = len(self._lost_s.keys() - tracked.lost_with)
        tracked.num_extra = max(tracked.num_extra, min(MAX_EXTRA, num_others // _LOSSES_FOR_ONE))
        if self.has_ended_workers(tracked):
            self._observer.on_poisoned()
            for life in tracked.strikes:
                self._lost_s.pop(life, None)
            return _poison(tracked)
        if blame is not None and self.has_no_attempt_left(tracked):
            return _last_straw(tracked, blame)
        return None

    def has_ended_workers(self, tracked: TrackedRequest) -> bool:
        return len(tracked.strikes) >= MAX_STRIKES + tracked.num_extra

    def has_no_attempt_left(self, tracked: TrackedRequest) -> bool:
        return tracked.request.num_failures >= self._max_attempts + tracked.num_extra

    def _forget_old(self, now_s: float) -> None:
        self._lost_s = {life: at_s for life, at_s in self._lost_s.items() if now_s - at_s <= STORM_S}


def _poison(tracked: TrackedRequest) -> StreamError:
    names = ", ".join(sorted({worker_id for worker_id, _ in tracked.strikes}))
    text = f"{len(tracked.strikes)} workers were lost while they computed this request, the last one alone: {names}"
    return StreamError(text, "poison_request", 500)


def _last_straw(tracked: TrackedRequest, blame: Blame) -> StreamError:
    status = 503 if blame.reason in (WORKER_LOST, "no_answer") else 500
    each = [text if count == 1 else f"{text} ({count} times)" for text, count in tracked.failures.items()]
    text = f"{tracked.request.num_failures} attempts failed: {'; '.join(each[-_MOST_TOLD:])}"
    return StreamError(text, blame.reason, status)
