"""A layer's state is found by C++ (`native/layers/states.hpp`) in runs, each in one page, of which it is told here. Its
numbers are known by their place in the state, of all shares that a rank has.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

from ...models.parts.states import StatesConfig
from .described import StateRun, StateRuns

_ITEM_BYTES = 4


class _Run(NamedTuple):
    at: int  # in the state, as is `size` in numbers
    size: int
    place: int  # bytes from the block's first page of states
    is_copy: bool


def state_runs(config: StatesConfig, index: int, *, page_bytes: int, page_stride: int) -> StateRuns:
    """Describe where the `index`th such layer's state lies. `page_stride`: bytes from a block's page to the next."""
    runs = sorted(_runs(config, index, page_bytes, page_stride))
    own, copies = ([run for run in _joined(runs) if run.is_copy == is_copy] for is_copy in (False, True))
    return StateRuns(_array(own), _array(copies), len(own), len(copies))


def _runs(config: StatesConfig, index: int, page_bytes: int, page_stride: int) -> Iterator[_Run]:
    """Yield runs that each lie within one run of a share in a page."""
    run_bytes = config.run_bytes(page_bytes)
    run_size = run_bytes // _ITEM_BYTES
    for segment in config.segments():
        first = index * config.share_size + segment.offset  # in all layers' states of the share
        done = 0
        while done < segment.size:
            run, within = divmod(first + done, run_size)
            size = min(segment.size - done, run_size - within)
            page, part = divmod(run, 2)
            place = page * page_stride + (part * config.num_shares + segment.share) * run_bytes + within * _ITEM_BYTES
            yield _Run(segment.at + done, size, place, segment.is_copy)
            done += size


def _joined(runs: list[_Run]) -> Iterator[_Run]:
    """Join runs that stand one behind another in the state and in a page alike."""
    last, *others = runs
    for run in others:
        is_next = last.at + last.size == run.at and last.place + last.size * _ITEM_BYTES == run.place
        if is_next and last.is_copy == run.is_copy:
            last = last._replace(size=last.size + run.size)
        else:
            yield last
            last = run
    yield last


def _array(runs: list[_Run]) -> ctypes.Array[StateRun]:
    return (StateRun * len(runs))(*(StateRun(run.at, run.size, run.place) for run in runs))
