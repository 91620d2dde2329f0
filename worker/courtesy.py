"""A worker's processes give way to others on the same cores by their niceness."""

from __future__ import annotations

import contextlib
import os
import re
import resource
from pathlib import Path

_MAX_NICENESS = 19

_NICENESS_OF_LIMIT = 20  # RLIMIT_NICE counts down from it

_CAP_SYS_NICE = 23


class Courtesy:
    """Lets others compute first, or not: every thread of some processes. Linux; elsewhere nothing happens."""

    def __init__(self, niceness: int, *pids: int) -> None:
        """`niceness`: on top of what this process has now."""
        self._pids = pids
        self._own = os.getpriority(os.PRIO_PROCESS, 0)
        self._polite = min(_MAX_NICENESS, self._own + niceness)
        self._now = self._own
        self.is_revocable = self._may_return()

    def _may_return(self) -> bool:
        """Tell whether a process that has become polite may become as before: for most users that is denied."""
        limit = resource.getrlimit(resource.RLIMIT_NICE)[0]
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        match = re.search(r"^CapEff:\s+([0-9a-f]+)", status, re.MULTILINE)
        is_capable = match is not None and bool(int(match[1], 16) >> _CAP_SYS_NICE & 1)
        return is_capable or limit == resource.RLIM_INFINITY or _NICENESS_OF_LIMIT - limit <= self._own

    def set(self, on: bool) -> None:
        """Give way or not; stay as it is where the way back is denied."""
        wanted = self._polite if on else self._own
        if wanted == self._now or (wanted < self._now and not self.is_revocable):
            return
        self._now = wanted
        for pid in self._pids:
            for task in Path(f"/proc/{pid}/task").glob("[0-9]*"):
                with contextlib.suppress(OSError):  # it ended meanwhile
                    os.setpriority(os.PRIO_PROCESS, int(task.name), wanted)
