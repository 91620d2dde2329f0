"""Which blocks a step completes, and where they go."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.transfer.send.plan import plan_chunk, plan_hits
from kvferry.wire.grants import GrantId, GrantInfo

BLOCK = 4
SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=1, head_dim=8, block_size=BLOCK, dtype="float32")


def _grant(num_tokens: int, held_blocks: int = 0, spec: KVCacheSpec = SPEC) -> GrantInfo:
    count = -(-num_tokens // BLOCK) - held_blocks
    return GrantInfo(
        grant_id=GrantId("d", 1, 1),
        spec=spec,
        kv_address="127.0.0.1:1",
        block_ids=tuple(range(100, 100 + count)),
        num_tokens=num_tokens,
        num_computed_tokens=held_blocks * BLOCK,
        ranks=(),
        open_within_s=2.0,
        mac=b"",
    )


def _sequence(num_tokens: int, cached_blocks: int = 0) -> Sequence:
    seq = Sequence(RequestId("r"), 0, 0, list(range(num_tokens)), num_tokens, SamplingParams())
    seq.block_table = list(range(-(-num_tokens // BLOCK)))
    seq.num_computed_tokens = seq.num_cached_tokens = cached_blocks * BLOCK
    return seq


def test_full_blocks_go_when_they_are_full_and_the_partial_one_with_the_last_chunk() -> None:
    seq, grant = _sequence(10), _grant(10)
    first = plan_chunk(1, seq, grant, 6)
    assert (first.local_blocks, first.remote_blocks, first.last) == ((0,), (100,), False)
    seq.num_computed_tokens = 6
    rest = plan_chunk(1, seq, grant, 4)
    assert (rest.local_blocks, rest.remote_blocks, rest.last) == ((1, 2), (101, 102), True)


def test_what_the_decode_worker_holds_is_not_shipped() -> None:
    plan = plan_chunk(1, _sequence(10), _grant(10, held_blocks=2), 10)
    assert (plan.local_blocks, plan.remote_blocks) == ((2,), (100,))


def test_prefix_hits_are_shipped_at_once_in_all_layers() -> None:
    plan = plan_hits(1, _sequence(16, cached_blocks=3), _grant(16, held_blocks=1))
    assert plan.all_layers and (plan.local_blocks, plan.remote_blocks) == ((1, 2), (100, 101))


def test_hits_that_are_copied_in_by_the_first_step_are_shipped_with_its_layers() -> None:
    seq, grant = _sequence(20, cached_blocks=3), _grant(20)
    seq.num_promoted_tokens = 2 * BLOCK
    assert plan_hits(1, seq, grant).local_blocks == (0,)
    plan = plan_chunk(1, seq, grant, 4)
    assert (plan.local_blocks, plan.all_layers) == ((1, 2, 3), False)
    seq.num_computed_tokens += 4
    assert plan_chunk(1, seq, grant, 4).local_blocks == (4,)


@pytest.mark.slow
@given(num_tokens=st.integers(1, 80), chunks=st.lists(st.integers(1, 20), min_size=80, max_size=80), data=st.data())
def test_every_missing_block_is_shipped_exactly_once_whatever_the_chunks(
    num_tokens: int, chunks: list[int], data: st.DataObject
) -> None:
    most = (num_tokens - 1) // BLOCK
    held, cached = data.draw(st.integers(0, num_tokens // BLOCK)), data.draw(st.integers(0, most))
    seq, grant = _sequence(num_tokens, cached), _grant(num_tokens, held)
    seq.num_promoted_tokens = data.draw(st.integers(0, cached)) * BLOCK
    shipped: list[tuple[int, int]] = []
    hits = plan_hits(1, seq, grant)
    shipped += zip(hits.local_blocks, hits.remote_blocks, strict=True)
    for chunk in chunks:
        count = min(chunk, seq.num_uncomputed_tokens)
        plan = plan_chunk(1, seq, grant, count)
        shipped += zip(plan.local_blocks, plan.remote_blocks, strict=True)
        seq.num_computed_tokens += count
        if plan.last:
            break
    assert plan.last and not seq.num_uncomputed_tokens and hits.all_layers
    num_blocks = -(-num_tokens // BLOCK)
    assert shipped == [(block, 100 + block - held) for block in range(held, num_blocks)]


WINDOWED = msgspec.structs.replace(SPEC, windows=(0, 6), window_slack=5)  # 40 tokens: no window reaches seven blocks


@pytest.mark.parametrize(("held", "first", "num_tokens"), [(0, 0, 40), (0, 12, 8), (3, 0, 40), (3, 16, 24), (9, 0, 40)])
def test_what_no_window_reaches_is_shipped_thin(held: int, first: int, num_tokens: int) -> None:
    seq, grant = _sequence(40), _grant(40, held, WINDOWED)
    seq.num_computed_tokens = first
    plan = plan_chunk(1, seq, grant, num_tokens)
    places = range(max(held, first // BLOCK), (first + num_tokens) // BLOCK)
    assert plan.local_blocks == tuple(places)
    assert plan.num_thin == sum(place < 7 for place in places)


def test_hits_are_shipped_thin_as_well() -> None:
    plan = plan_hits(1, _sequence(40, cached_blocks=9), _grant(40, 1, WINDOWED))
    assert plan.all_layers and len(plan.local_blocks) == 8 and plan.num_thin == 6
