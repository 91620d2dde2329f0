"""What holds for all tests of simulated fleets."""

from __future__ import annotations

import logging

import pytest
import structlog


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """Leave out what the routers and workers of a run log; what was set up before comes back (tests/conftest.py)."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
