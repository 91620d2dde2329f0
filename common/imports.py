"""Imports without collections of garbage between them, and that an interrupt ends without a word."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_imports() -> Iterator[None]:
    """Import within: what imports make stays, and to look through it for garbage takes a fifth of what torch's take."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor need later collections go through it
        gc.enable()


def ended_by_interrupts() -> None:
    """Let an interrupt (Ctrl-C) end this process at once from here on, where Python would raise an exception.

    For a process that is being started: whatever runs then would be told as a traceback, and where Python ignores
    exceptions, as behind a fork, the interrupt would be lost. A handler that is set later is called as usual.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def interruptible_imports() -> Iterator[None]:
    """Import within: an interrupt ends the process there instead of telling what was being imported or made."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield  # whoever imports us looks after interrupts
        return
    ended_by_interrupts()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
