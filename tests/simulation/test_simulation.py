"""The simulation as it runs at every change: the same again from the same seed, and every invariant catching a bug that
was put in for it. That many faulted requests break none is the tests' beside this one, half of the seeds each.
"""

from __future__ import annotations

import pytest

from .breach import INVARIANTS
from .planted_seeds import PLANTED, find, seeds_of
from .planting import Planted
from .runner import quiet
from .scenario import draw
from .world import World


def test_nothing_fails_without_faults() -> None:
    with quiet():
        for seed in range(1, 13):
            tally = World(draw(seed, faulted=False)).run()
            assert set(tally.ends) <= {"finished", "too large"}, f"seed {seed}: {tally.ends}"


def test_a_seed_gives_the_same_events_again() -> None:
    with quiet():
        for seed in range(1, 9):
            traces: list[list[str]] = [[], []]
            digests = []
            for trace in traces:
                world = World(draw(seed), trace=trace.append)
                world.run()
                digests.append(world.kernel.digest)
            assert traces[0] == traces[1]
            assert digests[0] == digests[1]


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug: Planted) -> None:
    failure = find(bug, seeds_of(bug))
    assert failure is not None, f"{bug.within_seeds} seeds show no breach"
    assert failure.invariant in bug.breaks, str(failure)


def test_every_invariant_has_caught_a_planted_bug() -> None:
    caught = {name for bug in PLANTED for name in bug.breaks}
    assert caught >= INVARIANTS.keys() - {"crash", "I17"}  # the last one by its own test
