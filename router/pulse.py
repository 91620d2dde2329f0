"""The router's event loop says all the time that it moves, and the lifeline's thread looks whether it does.

A loop that is held up for a while is busy, and the launcher waits; one that stands still for longer is ended by it.
Either way the log says where it stands: that is what somebody has to mend.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType

import structlog

from ..common.clock import Clock

SLOW_S = 1.0
_FRAMES = 8  # of the stack, the innermost ones

log = structlog.get_logger(__name__)


class Pulse:
    """The pulse of the loop that runs on the thread that makes this."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._thread = threading.get_ident()
        self._moved_s = clock.now()
        self._told_s = float("-inf")  # when the stop began that the log has

    def moved(self) -> None:
        """Called on the loop, several times a second."""
        self._moved_s = self._clock.now()

    def lag_s(self) -> float:
        """Return the seconds since the loop moved. From any other thread."""
        moved_s = self._moved_s
        lag_s = self._clock.now() - moved_s
        if lag_s > SLOW_S and self._told_s != moved_s:
            self._told_s = moved_s
            log.warning("event_loop_stands", lag_s=round(lag_s, 2), where=_where(self._thread))
        return lag_s


def _where(thread: int) -> str:
    """The innermost calls of a thread, outermost first."""
    calls: list[str] = []
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None and len(calls) < _FRAMES:
        calls.append(f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " > ".join(reversed(calls))
