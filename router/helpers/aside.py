"""Long work is tried where a core would be idle first, in a fork: streams of the same machine do not notice it there.

    fork ─> [where a core would be idle] the work ─> its answer
     └─> nobody leaves it a core: it is killed, and the work is begun anew, with this process's priority

A niceness is no substitute: even the highest has its turns, each of some milliseconds, in which a step whose thread has
just woken waits. And a thread that runs only where a core is idle might keep the GIL while there is none.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable

import psutil

from ...common.priority import CoreOffers, give_way

_LOOK_S = 0.2  # larger: work waits longer on a busy machine; smaller: a burst of steps passes for one
_LEAST_SHARE = 0.1  # of a core since the last look
_PR_SET_PDEATHSIG = 1


def done_aside(work: Callable[[], bytes]) -> bytes:
    """Return what `work` does, which must not fail. For a process of one thread; where it is no Linux, nobody forks."""
    if sys.platform != "linux":
        return work()
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as answers:
        pid = os.fork()
        if pid == 0:
            _be_aside(work, writer)
        os.close(writer)
        try:
            answer = _awaited(answers.fileno(), pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return answer or work()


def _be_aside(work: Callable[[], bytes], writer: int) -> None:
    """Do the work in the fork, and end with it."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # its parent may be killed at any time
        give_way(os.getpid())
        CoreOffers(os.getpid())
        with os.fdopen(writer, "wb") as answer:
            answer.write(work())
        code = 0
    finally:
        os._exit(code)


def _awaited(answers: int, pid: int) -> bytes:
    """Return the fork's answer; empty: it has ended without one, or finds no core."""
    found, process, seen_s = b"", psutil.Process(pid), 0.0
    while True:
        began = time.monotonic()
        if not select.select([answers], [], [], _LOOK_S)[0]:
            spent_s = process.cpu_times().user
            if spent_s - seen_s < _LEAST_SHARE * (time.monotonic() - began):
                return b""
            seen_s = spent_s
        elif part := os.read(answers, 1 << 16):
            found += part
        else:
            return found
