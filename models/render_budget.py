"""Rendering a chat template spends time, steps, characters and items, of a budget that the rendering thread holds."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from jinja2.exceptions import SecurityError

from ..common.clock import Clock

MAX_LIST_ITEMS = 1_000_000
_SPENT_PER_CHAR = 4  # a rendering may make so many characters for each that it may print
_ITEMS_PER_LOOK = 1024  # at the clock


class TemplateOverrun(Exception):
    """A rendering has spent what it may. `is_size`: of characters."""

    def __init__(self, message: str, *, is_size: bool = False) -> None:
        super().__init__(message)
        self.is_size = is_size


@dataclass(slots=True, frozen=True)
class RenderLimits:
    """Limits of what one rendering may spend."""

    max_s: float = 5.0
    max_steps: int = 100_000
    max_chars: int = 16 << 20  # of the prompt, and of any text on the way
    max_items: int = 20_000_000  # that filters go through, all together


class RenderBudget:
    """An account of what one rendering has spent."""

    __slots__ = ("_clock", "_end_s", "_num_items", "_num_made", "_num_numbers", "_num_steps", "limits")

    def __init__(self, limits: RenderLimits, clock: Clock) -> None:
        self.limits = limits
        self._clock = clock
        self._end_s = clock.now() + limits.max_s
        self._num_steps = 0
        self._num_numbers = 0
        self._num_made = 0
        self._num_items = 0

    def step(self) -> None:
        self._num_steps += 1
        if self._num_steps > self.limits.max_steps:
            raise TemplateOverrun(f"the chat template takes more than {self.limits.max_steps} steps")
        self.check_time()

    def range(self, *bounds: int) -> range:
        items = range(*bounds)
        self._num_numbers += len(items)
        if self._num_numbers > self.limits.max_steps:
            raise TemplateOverrun(f"the chat template loops over more than {self.limits.max_steps} numbers")
        return items

    def check_time(self) -> None:
        if self._clock.now() > self._end_s:
            raise TemplateOverrun(f"rendering the chat took more than {self.limits.max_s:g} s")

    def check_length(self, num_chars: int) -> None:
        """Refuse to make so many characters at once: called before they are made."""
        if num_chars > self.limits.max_chars:
            raise TemplateOverrun(
                f"the rendered chat would have more than {self.limits.max_chars} characters", is_size=True
            )

    def spend(self, value: object) -> object:
        """Charge for a value that was made."""
        if isinstance(value, str):
            self.check_length(len(value))
            self._num_made += len(value)
            self.check_length(self._num_made // _SPENT_PER_CHAR)
        elif isinstance(value, (list, tuple, Mapping)):
            check_items(len(value))
            self.go_through(len(value))
        elif isinstance(value, (bytes, bytearray, memoryview)):
            raise SecurityError("bytes")
        return value

    def go_through(self, num_items: int) -> None:
        self._num_items += num_items
        if self._num_items > self.limits.max_items:
            raise TemplateOverrun(f"the chat template goes through more than {self.limits.max_items} items")

    def counted(self, items: Iterable[object]) -> Iterator[object]:
        """Yield each item, charged for as it is asked for."""
        for index, item in enumerate(items):
            check_items(index)
            self.go_through(1)
            if not index % _ITEMS_PER_LOOK:
                self.check_time()
            yield item


_active = threading.local()


@contextmanager
def spending(budget: RenderBudget) -> Iterator[None]:
    """Charge what this thread renders in the block to `budget`."""
    _active.budget = budget
    try:
        yield
    finally:
        del _active.budget


def active_budget() -> RenderBudget:
    """Return what this thread's rendering is charged to."""
    budget = _active.budget
    assert isinstance(budget, RenderBudget)
    return budget


def check_items(num_items: int) -> None:
    """Refuse a list of so many items."""
    if num_items > MAX_LIST_ITEMS:
        raise TemplateOverrun(f"the chat template makes a list of more than {MAX_LIST_ITEMS} items", is_size=True)
