"""What holds for all tests of engines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvferry.engine.ranks import group

from ..forks import Forks


@pytest.fixture(scope="module", autouse=True)
def ranks_are_forks(request: pytest.FixtureRequest, rank_forks: Forks) -> Iterator[None]:
    """Other ranks import nothing anew, but in the tests of how they are started."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name != "ranks":
            patch.setattr(group, "subprocess", rank_forks)
        yield


@pytest.fixture(scope="module")
def few_sizes() -> Iterator[None]:
    """Few sizes of graphs in pieces are captured: each takes as long as some tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvferry.engine.cuda.pieces.SIZES", (16, 128))
        patch.setattr("kvferry.engine.cuda.pieces.RANK_SIZES", (1, 4, 128))
        yield
