"""Requests are looked at when something of theirs is due, and what is judged then is carried out."""

from __future__ import annotations

from ..queue.admission import Admission
from ..state.errors import StreamError
from ..state.failures import Blame
from ..state.request import RequestStatus
from ..state.tracked_request import TrackedRequest
from .deadlines import CHECK_AGAIN_S, Deadlines, DeadlineVerdict, forgive
from .in_flight import InFlightRequests
from .placer import Placer
from .relay import Relay


class DueChecks:
    """`DueChecks` ends, retries and asks after requests as `Deadlines` judges, and says when each is due again."""

    def __init__(
        self, in_flight: InFlightRequests, placer: Placer, admission: Admission, relay: Relay, deadlines: Deadlines
    ) -> None:
        self._in_flight = in_flight
        self._placer = placer
        self._admission = admission
        self._relay = relay
        self._deadlines = deadlines

    def run(self, now_s: float) -> None:
        """Look at all that is due."""
        self._deadlines.check_pools(now_s)
        for tracked in self._in_flight.due_times.due(now_s):
            self._check(tracked, now_s)
            if not tracked.request.is_finished:
                self._in_flight.due_times.schedule(tracked, self._next_check_s(tracked, now_s))

    def forgive(self, now_s: float) -> None:
        """Wait anew for what workers and attempts are waited for.

        What they have sent meanwhile lies unread, and one that stood still as well has yet to send.
        """
        self._deadlines.forgive_workers(now_s)
        for tracked in self._in_flight:
            if tracked.attempt is not None:
                forgive(tracked.attempt, now_s)

    def _check(self, tracked: TrackedRequest, now_s: float) -> None:
        self._relay.check_held(tracked, now_s)
        if not tracked.request.unfinished:
            self._in_flight.finish_unless_held(tracked)
            return
        match self._deadlines.judge_deadline(tracked, now_s):
            case StreamError() as error:
                self._in_flight.fail(tracked, error)
            case Blame() as blame:
                self._in_flight.retry(tracked, blame)
            case DeadlineVerdict.ASK:
                assert tracked.attempt is not None
                tracked.attempt.ask_if_arrived(now_s)
            case DeadlineVerdict.TRY_AGAIN:
                tracked.search.forgive_pairs()
            case None:
                self._in_flight.settle(tracked, now_s)
                if tracked.request.status is RequestStatus.QUEUED:
                    self._placer.is_too_late(tracked, now_s)

    def _next_check_s(self, tracked: TrackedRequest, now_s: float) -> float:
        at_s = self._deadlines.next_check_s(tracked, now_s)
        late_s = self._admission.late_s(tracked) if tracked.request.status is RequestStatus.QUEUED else None
        return at_s if late_s is None else min(at_s, max(late_s, now_s + CHECK_AGAIN_S))
