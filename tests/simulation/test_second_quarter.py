"""The second quarter of the seeds (`quarters.py`)."""

from __future__ import annotations

import pytest

from .quarters import check_quarter


@pytest.mark.slow
def test_no_invariant_breaks_under_faults() -> None:
    check_quarter(1)
