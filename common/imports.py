"""Imports without collections of garbage between them, and that a signal ends without a word."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


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
    signal.signal(signal.SIGINT, _end if os.getpid() == 1 else signal.SIG_DFL)
    _ended_as_the_first()


def _ended_as_the_first() -> None:
    """Let SIGTERM end a container's first process from here on: the kernel keeps from it what it has no handler for."""
    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    """End as if the signal had: the exit code is a shell's for it."""
    os._exit(128 + number)


@contextmanager
def interruptible_imports() -> Iterator[None]:
    """Import within: an interrupt ends the process there instead of telling what was being imported or made."""
    if threading.current_thread() is not threading.main_thread():
        yield  # whoever imports us looks after signals
        return
    _ended_as_the_first()
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    ended_by_interrupts()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
