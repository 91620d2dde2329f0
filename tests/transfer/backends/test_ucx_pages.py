"""What of our pages a frame may name: a peer that is wrong about them is refused, and ends nothing here."""

from __future__ import annotations

import pytest
import torch

from kvferry.transfer.backends.ucx_pages import UcxPages

PAGE_BYTES = 2 * 2 * 4 * 4 * 4


@pytest.mark.parametrize(
    ("runs", "is_within"),
    [
        (((0, PAGE_BYTES),), True),
        (((PAGE_BYTES - 1, 1),), True),
        (((0, PAGE_BYTES + 1),), False),
        (((PAGE_BYTES, 1),), False),
        (((0, 4), (0, 0)), False),  # an empty run is none: there is nothing to scatter
        (((2 * PAGE_BYTES, 0),), False),
    ],
)
def test_runs_lie_within_a_page_and_are_not_empty(runs: tuple[tuple[int, int], ...], is_within: bool) -> None:
    pages = UcxPages(torch.zeros(3, 16, 2, 2, 4, 4))
    assert pages.has((0, 47), runs) is is_within
    assert not pages.has((48,), runs)
