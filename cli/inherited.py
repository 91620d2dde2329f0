"""Mends what a process may inherit from whoever starts it and cannot serve with."""

from __future__ import annotations

import os
import signal
import sys

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def mend_inheritance() -> None:
    """Let this process have standard streams, hear signals and learn of its children's ends.

    Before it opens what it keeps open: that would take the number of a stream that is closed.
    """
    for fd, (name, mode) in enumerate(_STREAMS):
        if not _is_open(fd):
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
            os.set_inheritable(fd, True)
        if getattr(sys, name) is None:  # it was closed when the interpreter began
            setattr(sys, name, open(fd, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - for good
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, the kernel forgets how children end
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
