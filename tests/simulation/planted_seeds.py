"""Where each planted bug was found first, so that a test need not search for it from the first seed again.

    python -m kvferry.tests.simulation.planted_seeds     search from the first seed, write the file anew

A seed that shows its bug no longer costs time and nothing else: the search goes on from the first one.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from . import (
    planted,
    planted_adapters,
    planted_drafts,
    planted_embeddings,
    planted_frames,
    planted_grammars,
    planted_heads,
    planted_ranks,
    planted_returns,
    planted_scaling,
    planted_states,
    planted_tiers,
    planted_windows,
)
from .planting import Planted
from .runner import Failure, find_breach

PLANTED = (
    *(*planted.BUGS, *planted_tiers.BUGS, *planted_drafts.BUGS, *planted_grammars.BUGS, *planted_embeddings.BUGS),
    *(*planted_states.BUGS, *planted_returns.BUGS),
    *(*planted_windows.BUGS, *planted_frames.BUGS),
    *(*planted_ranks.BUGS, *planted_heads.BUGS, *planted_scaling.BUGS, *planted_adapters.BUGS),
)
FILE = Path(__file__).with_name("planted_seeds.json")


def seeds_of(bug: Planted) -> Iterable[int]:
    """Return the seeds to try, the one that showed the bug last time first."""
    known: dict[str, int] = json.loads(FILE.read_text())
    return itertools.chain([known[bug.name]] if bug.name in known else [], _all_seeds(bug))


def _all_seeds(bug: Planted) -> range:
    return range(1, 1 + bug.within_seeds)


def find(bug: Planted, seeds: Iterable[int]) -> Failure | None:
    """Plant the bug and return the first breach that these seeds show."""
    with bug.applied():
        return find_breach(seeds)


def _first(bug: Planted) -> int | None:
    """Return the first seed that breaks an invariant that is named for the bug: others may break before it."""
    for seed in _all_seeds(bug):
        if (failure := find(bug, [seed])) is not None and failure.invariant in bug.breaks:
            return seed
    return None


def main() -> int:
    found = {bug.name: _first(bug) for bug in PLANTED}
    seeds = {name: seed for name, seed in found.items() if seed is not None}
    FILE.write_text(json.dumps(seeds, indent=1, sort_keys=True) + "\n")
    missing = sorted(found.keys() - seeds.keys())
    print(*(f"not found: {name}" for name in missing), sep="\n", end="\n" if missing else "")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
