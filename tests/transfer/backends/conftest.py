"""What holds for all tests of backends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .peer_forks import PEERS


@pytest.fixture(scope="session", autouse=True)
def _peers_end() -> Iterator[None]:
    yield
    for forks in PEERS.values():
        forks.close()
