"""Threads whose work can wait, beside those that somebody waits for."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from functools import cache

# Between two offers of a core. Without any, a thread that runs only where a core is idle keeps it until the kernel's
# next tick, 4 ms as a rule, though another one waits for it: two threads that meet 120 times in 6 ms took 15 to 20 ms
# at the 99th percentile, 10 alone. With 0.25 ms they take 9 to 11, with 0.5 ms 11 to 13 (Zen 3, Linux 6.18).
_OFFER_NS = 250_000
_SIGEV_THREAD_ID = 4


class _SignalEvent(ctypes.Structure):
    """The C `struct sigevent` of Linux, whose signal goes to one thread."""

    _fields_ = [
        ("value", ctypes.c_void_p),
        ("number", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread_id", ctypes.c_int),
        ("rest", ctypes.c_int * 11),
    ]


class _Times(ctypes.Structure):
    """The C `struct itimerspec`: the period and the time until the first signal, each in seconds and nanoseconds."""

    _fields_ = [("times", ctypes.c_long * 4)]


def give_way(thread_id: int) -> None:
    """Have a thread (its native id) run only where a core would be idle, from now on. Linux; elsewhere nothing happens.

    A policy and not a niceness: the process's niceness may change meanwhile (`worker/courtesy.py`), and that of all
    its threads with it; and even the highest one has a share of a core, which every thread of a step waits for.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # it has ended, or a sandbox does not let us
            os.sched_setscheduler(thread_id, os.SCHED_IDLE, os.sched_param(0))


class CoreOffers:
    """Offers of a thread that has given way: four thousand times a second it asks whether another one wants its core.

    A timer's signal calls `sched_yield` in the thread, whatever it computes. For as long as it computes: a thread that
    waits would be woken as often. Where there are no such timers, nothing happens.
    """

    def __init__(self, thread_id: int) -> None:
        """`thread_id`: the native id of a thread of this process."""
        self._timer = ctypes.c_void_p()
        self._library = _with_handler()
        if self._library is None:
            return
        event = _SignalEvent(number=signal.SIGRTMIN + 6, notify=_SIGEV_THREAD_ID, thread_id=thread_id)
        if self._library.timer_create(1, ctypes.byref(event), ctypes.byref(self._timer)) != 0:
            self._library = None  # too many timers, or the thread has ended
            return
        times = _Times((ctypes.c_long * 4)(0, _OFFER_NS, 0, _OFFER_NS))
        self._library.timer_settime(self._timer, 0, ctypes.byref(times), None)

    def end(self) -> None:
        """Make no more offers. Idempotent."""
        library, self._library = self._library, None
        if library is not None:
            library.timer_delete(self._timer)


@contextlib.contextmanager
def offering_core() -> Iterator[None]:
    """Let the calling thread offer its core meanwhile."""
    offers = CoreOffers(threading.get_native_id())
    try:
        yield
    finally:
        offers.end()


@cache
def _with_handler() -> ctypes.CDLL | None:
    """Return the C library when the signal's handler stands; None: there are no timers of this kind."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    try:
        library.timer_create, library.timer_settime, library.timer_delete  # noqa: B018
    except AttributeError:  # an older library has them in another file
        return None
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal.restype = ctypes.c_void_p
    library.timer_settime.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    library.timer_delete.argtypes = (ctypes.c_void_p,)
    # In C and not in Python: the thread may be within a library for a second. It restarts calls that it interrupts.
    library.signal(signal.SIGRTMIN + 6, ctypes.cast(library.sched_yield, ctypes.c_void_p))
    return library
