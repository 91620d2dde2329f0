"""More ranks than KV heads: each head is computed, kept and handed over by several, and answers are the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .exactness_models import write_exactness_model
from .test_exactness import Fleet, Kind, open_fleet, prompts_of

WORKERS = {
    "p-0": Kind(role="prefill", num_blocks=1024),
    "d-0": Kind(role="decode", num_blocks=1024),
    "p-copies": Kind(role="prefill", ranks=4, num_blocks=1024),
    "d-copies": Kind(role="decode", ranks=4, num_blocks=1024),
    "d-shares": Kind(role="decode", ranks=2, num_blocks=1024),
}
PROMPTS = prompts_of([1, 16, 17, 100, 513, 1025])


@pytest.fixture(scope="module", params=["llama", "phi3"])  # the latter has queries, keys and values in one tensor
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp(request.param)
    with open_fleet(folder, write_exactness_model(folder / "model", request.param), WORKERS) as opened:
        yield opened


@pytest.mark.parametrize("pair", ["p-0 d-copies", "p-copies d-0", "p-copies d-shares", "p-copies d-copies"])
def test_a_head_that_several_ranks_have_is_handed_over_to_each(fleet: Fleet, pair: str) -> None:
    before = fleet.num_fallbacks()
    fleet.check(pair, pair, pair, PROMPTS)
    fleet.check(f"{pair}, and prefix hits", pair, pair, PROMPTS)
    assert fleet.num_fallbacks() == before
