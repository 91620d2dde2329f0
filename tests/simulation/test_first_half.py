"""The first half of the seeds (`halves.py`)."""

from __future__ import annotations

import pytest

from .halves import check_half


@pytest.mark.slow
def test_no_invariant_breaks_under_faults() -> None:
    check_half(0)
