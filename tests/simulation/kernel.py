"""Virtual time: one heap of events, one source of chance, and processes that can be stopped and killed.

    at / after ─> heap of (time, number) ─> run: the next event ─> Process.run ─> its handler, unless stopped or dead

Nothing here sleeps, and nothing reads a real clock: a run is a function of its seed. Every event is folded into
`digest`, so two runs that differ anywhere differ there.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random

Handler = Callable[..., object]


class Kernel:
    """The event loop of one simulated world."""

    __slots__ = ("_heap", "_number", "digest", "now", "num_events", "random", "trace")

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.now = 0.0
        self.random = Random(seed)
        self.trace = trace  # None: nothing is written down; callers ask before they format
        self.digest = 0
        self.num_events = 0
        self._heap: list[tuple[float, int, Handler, tuple[object, ...]]] = []
        self._number = 0

    def at(self, time_s: float, handler: Handler, *args: object) -> None:
        """Run `handler(*args)` then; events of one time keep the order of the calls."""
        self._number += 1
        heapq.heappush(self._heap, (time_s, self._number, handler, args))

    def after(self, delay_s: float, handler: Handler, *args: object) -> None:
        self._number += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._number, handler, args))

    def step(self) -> None:
        """Run the next event."""
        self.now, number, handler, args = heapq.heappop(self._heap)
        self.num_events += 1
        self.digest = hash((self.digest, number, self.now))
        handler(*args)

    def fold(self, value: int) -> None:
        """Make an outcome part of the digest."""
        self.digest = hash((self.digest, value))

    def say(self, text: str) -> None:
        if self.trace is not None:
            self.trace(f"{self.now:10.6f}  {text}")


class Process:
    """One life of a process. Stopped (SIGSTOP), it neither takes nor sends anything; what came waits for it.

    A process may be stopped or killed in the middle of a handler: what that handler says afterwards leaves when
    the process goes on, or never.
    """

    __slots__ = ("_held", "_kernel", "_said", "_stops", "after_event", "is_dead", "name", "place")

    def __init__(self, kernel: Kernel, name: str, place: str, after_event: Callable[[], None]) -> None:
        self.name = name
        self.place = place  # where this and its other lives run
        self.is_dead = False
        self.after_event = after_event
        self._kernel = kernel
        self._stops = 0  # overlapping stops; the last one's end lets it go on
        self._held: list[tuple[Handler, tuple[object, ...]]] = []
        self._said: list[tuple[Handler, tuple[object, ...]]] = []

    @property
    def is_stopped(self) -> bool:
        return self._stops > 0

    def run(self, handler: Handler, *args: object) -> None:
        """Something happens to the process."""
        if self.is_dead:
            return
        if self._stops:
            self._held.append((handler, args))
            return
        handler(*args)
        self.after_event()

    def after(self, delay_s: float, handler: Handler, *args: object) -> None:
        self._kernel.after(delay_s, self.run, handler, *args)

    def say(self, handler: Handler, *args: object) -> None:
        """The process does something to the world."""
        if self.is_dead:
            return
        if self._stops:
            self._said.append((handler, args))
        else:
            handler(*args)

    def stop(self) -> None:
        self._stops += 1

    def go_on(self) -> None:
        if self._stops:
            self._stops -= 1
        if self._stops or self.is_dead:
            return
        said, self._said = self._said, []
        for handler, args in said:
            self.say(handler, *args)
        held, self._held = self._held, []
        for handler, args in held:
            self.run(handler, *args)

    def kill(self) -> None:
        self.is_dead = True
        self._held.clear()
        self._said.clear()


class ProcessClock:
    """A process's own clock: another zero, and up to a thousandth faster or slower than the world's."""

    __slots__ = ("_kernel", "_offset_s", "_rate")

    def __init__(self, kernel: Kernel, offset_s: float, rate: float) -> None:
        self._kernel = kernel
        self._offset_s = offset_s
        self._rate = rate

    def now(self) -> float:
        return self._offset_s + self._kernel.now * self._rate
