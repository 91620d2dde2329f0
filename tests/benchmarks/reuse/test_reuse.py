"""One cache that sees every prompt: what the fleet's reuse is held against."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from kvferry.benchmarks.reuse.reuse import Case, replay
from kvferry.tools.load.traces import TraceRow


def row(*blocks: int, num_tokens: int | None = None) -> TraceRow:
    tokens = 4 * len(blocks) if num_tokens is None else num_tokens
    return TraceRow(0.0, tokens, 1, block_ids=blocks, block_tokens=4)


def test_a_prompt_finds_the_leading_blocks_of_one_before_it_but_never_its_last_token() -> None:
    assert replay([row(1, 2), row(1, 2, 3)], None) == 8 / 20
    assert replay([row(1, 2), row(1, 2)], None) == 4 / 16
    assert replay([row(1, 2), row(9, 2)], None) == 0.0


def test_a_block_that_is_not_full_is_not_kept() -> None:
    assert replay([row(1, 2, num_tokens=6), row(1, 2, 3)], None) == 4 / 18


def test_what_was_used_longest_ago_goes_first_and_of_a_prompt_its_end() -> None:
    rows = [row(1, 2), row(3), row(1, 5), row(3, 6)]
    assert replay(rows, 2) == 4 / 28  # 1 outlived 2; 3 had gone for 5
    assert replay(rows, 3) == replay(rows, None) == 8 / 28


@given(seed=st.integers(0, 10**6))
def test_more_memory_never_finds_less(seed: int) -> None:
    dice = random.Random(seed)
    rows = [row(*range(start := dice.randrange(6), start + dice.randint(1, 5))) for _ in range(30)]
    found = [replay(rows, size) for size in (1, 2, 4, 8, None)]
    assert found == sorted(found)


def test_host_memory_adds_blocks_to_every_worker() -> None:
    without = Case("slo", 0.0, "sample:mooncake-conversation", None, None)
    with_host = Case("slo", 1.0, "sample:mooncake-conversation", None, None)
    assert with_host.fleet.host_blocks > 0 == without.fleet.host_blocks
    assert with_host.num_blocks - without.num_blocks == with_host.fleet.num_workers * with_host.fleet.host_blocks
