"""DeepSeek between workers of unequal ranks: the tokens of `transformers`, and each page once to each decode rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .cluster import wait_until
from .exactness_models import LATENTS_BLOCK_BYTES, write_exactness_model
from .test_exactness import Fleet, Kind, open_fleet, prompts_of

LENGTHS = [1, 2, 15, 16, 17, 33, 100, 128, 300, 600]
PROMPTS = prompts_of(LENGTHS)
NUM_TOKENS = 12
NUM_BLOCKS = sum(-(-length // 16) for length in LENGTHS)
WORKERS = {
    "p-0": Kind(role="prefill"),
    "d-0": Kind(role="decode"),
    "p-wide": Kind(role="prefill", ranks=2),
    "d-wide": Kind(role="decode", ranks=2),
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("deepseek")
    with open_fleet(folder, write_exactness_model(folder / "model", "deepseek_v3"), WORKERS) as opened:
        yield opened


@pytest.mark.parametrize(
    ("source", "target", "copies"),
    # What rank 0 writes, which is what is counted; of two ranks to two, each writes to its own.
    [("p-0", "d-0", 1), ("p-0", "d-wide", 2), ("p-wide", "d-0", 1), ("p-wide", "d-wide", 1)],
)
def test_each_decode_rank_is_sent_each_page_once(fleet: Fleet, source: str, target: str, copies: int) -> None:
    def num_bytes(name: str) -> float:
        return fleet.cluster.metric(f"kvferry_{name}_total", f'worker="{source}"')

    before = {name: num_bytes(name) for name in ("wire_bytes", "transfer_bytes")}
    num_fallbacks = fleet.num_fallbacks()
    fleet.check(f"{source} to {target}", f"{source} {target}", f"{source} {target}", PROMPTS, NUM_TOKENS)
    for name, count in before.items():
        expected = count + copies * NUM_BLOCKS * LATENTS_BLOCK_BYTES
        wait_until(lambda name=name, expected=expected: num_bytes(name) >= expected, f"{name} of {expected}")
        assert num_bytes(name) == expected
    assert fleet.num_fallbacks() == num_fallbacks


def test_a_prefix_that_one_side_knows_is_used_there_and_not_sent(fleet: Fleet) -> None:
    fleet.check("known to p-0", "p-0 d-0", "p-0 d-wide", PROMPTS, NUM_TOKENS)  # the salt under which p-0 computed them
    fleet.check("known to both", "d-0", "p-0 d-wide", PROMPTS, NUM_TOKENS)
    num_known = sum((length - 1) // 16 * 16 for length in LENGTHS)
    for worker in ("p-0", "d-0"):
        wait_until(lambda worker=worker: fleet.num_hits(worker) >= num_known, f"prefix hits on {worker}")
