"""Two workers agree on what fits, and on what a grant promises."""

from __future__ import annotations

import msgspec
import pytest

from kvferry.common.kv_spec import KVCacheSpec, Shard
from kvferry.kvcache.frames import frames_of
from kvferry.transfer.protocol.handoff import (
    Endpoint,
    are_ids,
    check_compatible,
    check_grant,
    is_minted,
    mint_grant,
    open_mac,
    page_indices,
    pages_of,
)
from kvferry.wire.grants import GrantId, GrantInfo, RegionInfo

SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=4, head_dim=8, block_size=4, dtype="float32")
HERE = Endpoint(SPEC, "0.1.0", "nixl", 1)


def _region(rank: int, tp_size: int) -> RegionInfo:
    return RegionInfo(
        rank=rank,
        tp_size=tp_size,
        agent=f"d-0.1.0.{rank}",
        generation=0,
        agent_metadata=b"",
        base_addr=0,
        num_blocks=8,
        page_bytes=SPEC.page_bytes(tp_size),
        device="DRAM",
        device_id=0,
        transport="nixl",
    )


def _grant(tp_size: int = 1) -> GrantInfo:
    return GrantInfo(
        grant_id=GrantId("d-0", 1, 1),
        spec=SPEC,
        kv_address="127.0.0.1:1",
        block_ids=(5, 2),
        num_tokens=11,
        num_computed_tokens=4,
        ranks=tuple(_region(rank, tp_size) for rank in range(tp_size)),
        open_within_s=2.0,
        mac=b"",
    )


def _spec(**change: object) -> KVCacheSpec:
    return msgspec.structs.replace(SPEC, **change)


@pytest.mark.parametrize(
    ("remote", "words"),
    [
        (Endpoint(_spec(block_size=8), "0.1.0", "nixl", 1), "block_size 4 here, 8 there"),
        (Endpoint(_spec(dtype="bfloat16"), "0.1.0", "nixl", 1), "dtype 'float32' here, 'bfloat16' there"),
        (Endpoint(_spec(model="n"), "0.1.0", "nixl", 1), "model 'm' here, 'n' there"),
        (Endpoint(_spec(draft="d", num_layers=9), "0.1.0", "nixl", 1), "KV cache draft '' here, 'd' there"),
        (Endpoint(SPEC, "0.2.0", "nixl", 1), "kvferry 0.1.0 here, 0.2.0 there"),
        (Endpoint(SPEC, "0.1.0", "ucx", 1), "transport 'nixl' here, 'ucx' there"),
        (Endpoint(SPEC, "0.1.0", "nixl", 3), "4 KV heads cannot be split over 3 ranks there"),
        (Endpoint(SPEC, "0.1.0", "nixl", 0), "over 0 ranks there"),
    ],
)
def test_what_does_not_fit_is_named_with_both_values(remote: Endpoint, words: str) -> None:
    assert words in (check_compatible(HERE, remote) or "")


def test_equal_workers_and_other_tp_sizes_fit() -> None:
    assert check_compatible(HERE, Endpoint(SPEC, "0.1.0", "nixl", 4)) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_ids": (5, 8)}, "distinct ids below 8"),
        ({"block_ids": (5, 5)}, "distinct ids below 8"),
        ({"block_ids": (5,)}, "1 blocks granted for tokens 4 to 11"),
        ({"num_computed_tokens": 3}, "granted for tokens 3 to 11"),
        ({"ranks": ()}, "names no rank"),
        ({"ranks": (_region(1, 1),)}, "ranks [1] in the grant"),
        ({"ranks": (msgspec.structs.replace(_region(0, 1), page_bytes=7),)}, "7 at d-0.1.0.0"),
        ({"spec": _spec(head_dim=16)}, "head_dim 8 here, 16 there"),
        (
            {"ranks": (msgspec.structs.replace(_region(0, 1), shard=Shard(0, 1, 0, 4)),)},
            "layers [0, 1) and heads [0, 4) at d-0.1.0.0, want all 2 layers and some of 4 heads",
        ),
        (
            {"ranks": (msgspec.structs.replace(_region(0, 1), shard=Shard(0, 2, 0, 5)),)},
            "heads [0, 5) at d-0.1.0.0, want all 2 layers and some of 4 heads",
        ),
        (
            {"ranks": tuple(msgspec.structs.replace(_region(rank, 2), shard=Shard(0, 2, 0, 2)) for rank in (0, 1))},
            "layers [0, 2) and heads [0, 2); layers [0, 2) and heads [0, 2): not each of 4 heads once",
        ),
        (
            {"ranks": (msgspec.structs.replace(_region(0, 1), shard=Shard(0, 2, 1, 4)),)},
            f"page_bytes {SPEC.page_bytes() // 4 * 3} by the spec, {SPEC.page_bytes()} at d-0.1.0.0",
        ),
        (
            {"ranks": (_region(0, 2), msgspec.structs.replace(_region(1, 2), num_blocks=9))},
            "pools of [8, 9] blocks, want as many on each rank",
        ),
        (
            {"ranks": (msgspec.structs.replace(_region(0, 1), num_blocks=2**30),)},
            "2147483648 pages at d-0.1.0.0, at most 2147483647 can be numbered",
        ),
    ],
)
def test_a_grant_that_cannot_be_shipped_under_is_named(change: dict[str, object], words: str) -> None:
    assert check_grant(HERE, _grant(2)) is None
    assert words in (check_grant(HERE, msgspec.structs.replace(_grant(), **change)) or "")


def test_pages_are_counted_layer_by_layer() -> None:
    assert [page_indices(SPEC, layer, (0, 7), 8).tolist() for layer in (0, 1)] == [[0, 7], [8, 15]]


def test_thin_blocks_have_pages_in_what_whole_ones_have_for_windows() -> None:
    spec = _spec(num_layers=3, windows=(5, 0, 5))
    assert frames_of(spec).places == (1, 0, 2)
    pages, places = pages_of(spec, (17, 1, 3), 8, 2)
    assert pages.tolist() == [8 + 3, 17, 1, 3, 16 + 3] and places.tolist() == [2, 0, 1, 2, 2]
    assert are_ids(spec, (17, 1, 3), 8, 2)
    for ids, num_thin in (((17, 1, 3), 0), ((24, 1, 3), 2), ((17, 1, 8), 2), ((1, 1), 2), ((-1, 2), 2)):
        assert not are_ids(spec, ids, 8, num_thin)
    assert not are_ids(SPEC, (17, 1), 8, 2), "no layer has a window"


def test_a_grant_may_name_thin_blocks_where_it_has_some() -> None:
    spec = _spec(windows=(0, 1))
    here, ids = Endpoint(spec, "0.1.0", "nixl", 1), (9, 2, 3)
    grant = msgspec.structs.replace(_grant(), spec=spec, block_ids=ids, num_computed_tokens=0)
    assert check_grant(here, grant) is None
    for wrong in ((2, 9, 3), (16, 2, 3)):
        assert "distinct ids below 8" in (check_grant(here, msgspec.structs.replace(grant, block_ids=wrong)) or "")


def test_a_mac_is_good_for_its_own_key_grant_and_attempt_alone() -> None:
    key = b"k" * 32
    grant = mint_grant(key, _grant(), "a", 2)
    mac = open_mac(grant, "a", 2)
    assert is_minted(key, grant, "a", 2, mac)
    assert not is_minted(b"j" * 32, grant, "a", 2, mac)
    assert not is_minted(key, grant, "b", 2, mac)
    assert not is_minted(key, grant, "a", 3, mac)
    assert not is_minted(key, grant, "a", 2, b"")
    assert not is_minted(key, grant, "a", 2, grant.mac)  # it alone does not tell what its holder reads in it


@pytest.mark.parametrize(
    "change",
    [
        {"grant_id": GrantId("d-0", 1, 2)},
        {"grant_id": GrantId("d-0", 2, 1)},
        {"block_ids": (5, 3)},
        {"num_tokens": 12},
        {"num_computed_tokens": 0},
        {"open_within_s": 60.0},
        {"kv_address": "127.0.0.1:2"},
        {"ranks": (msgspec.structs.replace(_region(0, 1), base_addr=4096),)},
        {"ranks": (msgspec.structs.replace(_region(0, 1), shard=Shard(0, 2, 0, 2)),)},
        {"mac": b"forged"},
    ],
)
def test_a_grant_that_is_altered_on_its_way_opens_nothing(change: dict[str, object]) -> None:
    key = b"k" * 32
    grant = mint_grant(key, _grant(), "a", 0)
    altered = msgspec.structs.replace(grant, **change)
    assert not is_minted(key, grant, "a", 0, open_mac(altered, "a", 0))
    if "mac" not in change:
        assert not is_minted(key, altered, "a", 0, open_mac(altered, "a", 0))
