"""Whatever ranks hold of a model on either side, what they ship to one another is all of it, and nothing twice."""

from __future__ import annotations

import itertools
from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.kv_spec import KVCacheSpec, Shard
from kvferry.transfer.backends.base import Piece
from kvferry.transfer.protocol.shards import check_regions, expected_pairs, pieces, shards_of, targets_of
from kvferry.wire.grants import GrantId, GrantInfo, RegionInfo

SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=4, head_dim=8, block_size=4, dtype="float32")
LATENT = KVCacheSpec(
    model="m", num_layers=2, num_kv_heads=1, head_dim=8, block_size=4, dtype="float32", layout="latent"
)
HEAD_BYTES = 4 * 8 * 4


def _spec(num_layers: int, num_heads: int) -> KVCacheSpec:
    """Return a layout in which one head's keys are four bytes of a page."""
    return KVCacheSpec(
        model="m", num_layers=num_layers, num_kv_heads=num_heads, head_dim=1, block_size=1, dtype="float32"
    )


def _shards(tp_size: int) -> list[Shard]:
    return [SPEC.shard(rank, tp_size) for rank in range(tp_size)]


def _regions(shards: list[Shard | None], spec: KVCacheSpec = SPEC) -> tuple[RegionInfo, ...]:
    return tuple(
        RegionInfo(
            rank=rank,
            tp_size=len(shards),
            agent=f"d-0.1.0.{rank}",
            generation=0,
            agent_metadata=b"",
            base_addr=0,
            num_blocks=8,
            page_bytes=spec.page_bytes(len(shards))
            if shard is None
            else spec.num_parts * shard.num_heads * spec.head_bytes,
            device="DRAM",
            device_id=0,
            transport="nixl",
            shard=shard,
        )
        for rank, shard in enumerate(shards)
    )


def _grant(shards: list[Shard | None]) -> GrantInfo:
    return GrantInfo(
        grant_id=GrantId("d-0", 1, 1),
        spec=SPEC,
        kv_address="127.0.0.1:1",
        block_ids=(5, 2),
        num_tokens=8,
        num_computed_tokens=0,
        ranks=_regions(shards),
        open_within_s=2.0,
        mac=b"",
    )


@st.composite
def _cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """Draw neighbouring ranges that are [0, size) together."""
    edges = sorted({0, size} | draw(st.sets(st.integers(0, size), max_size=3)))
    return list(itertools.pairwise(edges))


@st.composite
def _splits(draw: st.DrawFn, num_layers: int, num_heads: int) -> list[Shard]:
    """Draw a worker's ranks: stages of layers, the heads of each shared out in its own way, even or not."""
    return [
        Shard(first_layer, end_layer, first_head, end_head)
        for first_layer, end_layer in draw(_cuts(num_layers))
        for first_head, end_head in draw(_cuts(num_heads))
    ]


@st.composite
def _pairs_of_workers(draw: st.DrawFn) -> tuple[KVCacheSpec, list[Shard], list[Shard]]:
    num_layers, num_heads = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    sources, targets = draw(_splits(num_layers, num_heads)), draw(_splits(num_layers, num_heads))
    return _spec(num_layers, num_heads), sources, targets


def _cells(shard: Shard) -> set[tuple[int, int]]:
    return set(itertools.product(range(shard.first_layer, shard.end_layer), range(shard.first_head, shard.end_head)))


@given(_pairs_of_workers())
def test_all_pairs_ship_every_layer_and_head_once(case: tuple[KVCacheSpec, list[Shard], list[Shard]]) -> None:
    spec, sources, targets = case
    shipped: Counter[tuple[int, int]] = Counter()
    for source, target in itertools.product(sources, targets):
        common = source.overlap(target)
        assert (common is None) == (pieces(source, target, spec) is None) == (not _cells(source) & _cells(target))
        if common is not None:
            assert _cells(common) == _cells(source) & _cells(target)
            shipped.update(_cells(common))
    assert shipped == Counter(itertools.product(range(spec.num_layers), range(spec.num_kv_heads)))
    assert expected_pairs(sources, targets) == {
        (rank, number)
        for rank, source in enumerate(sources)
        for number, target in enumerate(targets)
        if _cells(source) & _cells(target)
    }


@given(_pairs_of_workers())
def test_every_head_lands_in_its_place_and_no_byte_is_written_twice(
    case: tuple[KVCacheSpec, list[Shard], list[Shard]],
) -> None:
    """A page is written as its name: layer, K or V, head."""
    spec, sources, targets = case

    def page(shard: Shard, layer: int) -> bytes:
        return b"".join(
            bytes((layer, half, head, 255)) for half in (0, 1) for head in range(shard.first_head, shard.end_head)
        )

    for target in targets:
        for layer in range(target.first_layer, target.end_layer):
            there = np.zeros(2 * target.num_heads * spec.head_bytes, dtype=np.uint8)
            for source in sources:
                common = source.overlap(target)
                if common is None or not common.first_layer <= layer < common.end_layer:
                    continue
                here = np.frombuffer(page(source, layer), dtype=np.uint8)
                for run in pieces(source, target, spec) or ():
                    assert not there[run.remote_offset : run.remote_offset + run.num_bytes].any()
                    there[run.remote_offset : run.remote_offset + run.num_bytes] = here[
                        run.local_offset : run.local_offset + run.num_bytes
                    ]
            assert there.tobytes() == page(target, layer)


@given(st.integers(1, 6), st.data())
def test_what_covers_the_model_in_all_layers_is_taken_and_nothing_else(num_layers: int, data: st.DataObject) -> None:
    spec = _spec(num_layers, 4)
    shards = data.draw(_splits(num_layers, 4))
    fits = all((shard.first_layer, shard.end_layer) == (0, num_layers) for shard in shards)
    assert (check_regions(_regions(list(shards), spec), spec) is None) == fits
    if fits and len(shards) > 1:
        assert "heads once" in (check_regions(_regions(list(shards[1:]), spec), spec) or "")
        assert "heads once" in (check_regions(_regions([*shards, shards[0]], spec), spec) or "")


def test_a_region_that_names_no_shard_has_its_ranks_even_share() -> None:
    assert shards_of(_regions([None, None]), SPEC) == [Shard(0, 2, 0, 2), Shard(0, 2, 2, 4)]
    assert check_regions(_regions([None, None]), SPEC) is None


@given(st.integers(1, 9), st.integers(1, 9))
def test_each_rank_gets_its_copy_of_latents_from_one_source_and_these_take_turns(source: int, decode: int) -> None:
    sources = [LATENT.shard(rank, source) for rank in range(source)]
    targets = [LATENT.shard(rank, decode) for rank in range(decode)]
    assert expected_pairs(sources, targets) == {(rank % source, rank) for rank in range(decode)}
    whole = (Piece(0, 0, LATENT.page_bytes()),)
    grant = msgspec.structs.replace(_grant([]), spec=LATENT, ranks=_regions(list(targets), LATENT))
    for rank, shard in enumerate(sources):
        written = [(number, whole) for number in range(decode) if number % source == rank]
        assert [(region.rank, runs) for region, runs in targets_of(shard, grant)] == written


def test_every_copy_of_latents_is_there_once() -> None:
    both = [LATENT.shard(rank, 2) for rank in range(2)]
    assert check_regions(_regions(list(both), LATENT), LATENT) is None
    assert check_regions(_regions([None, None], LATENT), LATENT) is None
    for wrong in ([both[0], both[0]], [both[0], Shard(0, 2, 0, 1, 1, 3)], [both[0]], [Shard(0, 2, 0, 1)] * 2):
        assert "not each of 1 heads once in each of" in (check_regions(_regions(list(wrong), LATENT), LATENT) or "")
    halves = _regions([Shard(0, 2, 0, 2, 0, 2), Shard(0, 2, 2, 4, 1, 2)])  # copies of what nobody replicates
    assert "not each of 4 heads once" in (check_regions(halves, SPEC) or "")


def test_a_shard_without_layers_or_heads_does_not_cross() -> None:
    for empty in ((0, 0, 0, 4), (1, 0, 0, 4), (0, 2, 3, 3)):
        with pytest.raises(msgspec.ValidationError, match="at least one layer and one head"):
            msgspec.msgpack.decode(msgspec.msgpack.encode(empty), type=Shard)
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode((0, 2**40, 0, 4)), type=Shard)
    for copy in ((2, 2), (0, 0), (0, 2**20)):
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(msgspec.msgpack.encode((0, 2, 0, 1, *copy)), type=Shard)


@pytest.mark.parametrize(("source", "decode"), [*itertools.product((1, 2, 4, 8, 16), repeat=2)])
def test_ranks_beyond_the_heads_have_copies_each_of_which_is_written_once(source: int, decode: int) -> None:
    sources, targets = _shards(source), _shards(decode)
    regions = _regions([*targets])
    assert SPEC.fits_ranks(source) and check_regions(regions, SPEC) is None
    written: Counter[tuple[int, int]] = Counter()
    for one, (number, other) in itertools.product(sources, enumerate(targets)):
        if (common := one.share_for(other)) is not None:
            written.update((number, head) for head in range(common.first_head, common.end_head))
    wanted = [(number, head) for number, own in enumerate(targets) for head in range(own.first_head, own.end_head)]
    assert written == Counter(wanted) and {head for _, head in wanted} == set(range(4))
    if decode > 4:
        twice = _regions([targets[0], *targets[:-1]])
        assert f"once in each of {decode // 4} copies" in (check_regions(twice, SPEC) or "")


def test_ranks_that_neither_share_heads_nor_have_as_many_copies_of_each_are_refused() -> None:
    assert [size for size in range(17) if SPEC.fits_ranks(size)] == [1, 2, 4, 8, 12, 16]
    assert not SPEC.fits_ranks(4 * 1024 * 2)


def test_equal_tp_sizes_ship_whole_pages_to_the_same_rank() -> None:
    assert pieces(SPEC.shard(1, 2), SPEC.shard(1, 2), SPEC) == (Piece(0, 0, SPEC.page_bytes(2)),)
    assert pieces(SPEC.shard(1, 2), SPEC.shard(0, 2), SPEC) is None


@pytest.mark.parametrize(("source", "decode"), [(1, 2), (2, 1), (1, 4), (4, 2)])
def test_pieces_of_all_pairs_cover_every_decode_page_exactly_once(source: int, decode: int) -> None:
    for target in range(decode):
        covered: list[int] = []
        for rank in range(source):
            for run in pieces(SPEC.shard(rank, source), SPEC.shard(target, decode), SPEC) or ():
                assert run.local_offset + run.num_bytes <= SPEC.page_bytes(source)
                covered += range(run.remote_offset, run.remote_offset + run.num_bytes)
        assert sorted(covered) == list(range(SPEC.page_bytes(decode)))


def test_a_head_range_is_one_run_in_k_and_one_in_v() -> None:
    assert pieces(SPEC.shard(0, 1), SPEC.shard(1, 2), SPEC) == (
        Piece(2 * HEAD_BYTES, 0, 2 * HEAD_BYTES),
        Piece(6 * HEAD_BYTES, 2 * HEAD_BYTES, 2 * HEAD_BYTES),
    )


def test_expected_pairs_are_those_with_heads_in_common() -> None:
    assert expected_pairs(_shards(1), _shards(2)) == {(0, 0), (0, 1)}
    assert expected_pairs(_shards(2), _shards(1)) == {(0, 0), (1, 0)}
    assert expected_pairs(_shards(2), _shards(2)) == {(0, 0), (1, 1)}
    assert expected_pairs(_shards(4), _shards(2)) == {(0, 0), (1, 0), (2, 1), (3, 1)}
    for grant in (_grant([None, None]), _grant(list(_shards(2)))):
        assert [region.rank for region, _ in targets_of(SPEC.shard(3, 4), grant)] == [1]
