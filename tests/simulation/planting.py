"""Bugs put in on purpose: each takes out one rule of the product, and a named invariant must break within some seeds.

A planted bug is a broken subclass in place of one of the product's classes, or one function of it replaced, while the
test runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Planted:
    """One rule taken out."""

    name: str
    breaks: frozenset[str]  # any of these invariants
    patches: tuple[tuple[object, str, object], ...] = ()  # (owner, attribute, value) while the test runs
    within_seeds: int = 60

    @contextmanager
    def applied(self) -> Iterator[None]:
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in self.patches]
        try:
            for owner, name, value in self.patches:
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)
