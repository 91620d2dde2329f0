"""Threads whose work can wait, beside those that somebody waits for."""

from __future__ import annotations

import contextlib
import os
import sys


def give_way(thread_id: int) -> None:
    """Have a thread (its native id) run only where a core would be idle, from now on. Linux; elsewhere nothing happens.

    A policy and not a niceness: the process's niceness may change meanwhile (`worker/courtesy.py`), and that of all
    its threads with it; and even the highest one has a share of a core, which every thread of a step waits for.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # it has ended, or a sandbox does not let us
            os.sched_setscheduler(thread_id, os.SCHED_IDLE, os.sched_param(0))
