"""What holds for all tests of whole deployments."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .cluster import FORKS, UCX_FORKS


@pytest.fixture(scope="session", autouse=True)
def handoffs() -> Iterator[None]:
    """Handoffs are what is tested here, and the default policy makes none while workers are idle: these tests take a
    policy that always does, unless they say otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVFERRY_POLICY", "least_loaded")
        yield


@pytest.fixture(scope="session", autouse=True)
def forks() -> Iterator[None]:
    """The processes whose forks deployments are end with the tests."""
    yield
    FORKS.close()
    UCX_FORKS.close()
