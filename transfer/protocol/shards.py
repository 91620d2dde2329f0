"""Shards say which rank writes what to which: what a rank ships to another is what both of their shards hold.

    source rank 0  heads [0, 2) ─┬─> decode rank 0  heads [0, 1)
                                 └─> decode rank 1  heads [1, 2)
    source rank 1  heads [2, 4) ─┬─> decode rank 2  heads [2, 3)
                                 └─> decode rank 3  heads [3, 4)

A region names its shard. A rank's page is [2, heads, block_size, head_dim] of one layer, so heads in common are a run
of bytes in K and one in V, in the page of each of the layers in common. Every worker has all layers on each of its
ranks today: a region with fewer is refused.

Latents are on all ranks, whole: decode rank r gets its copy from source rank r mod n, and a source rank whose number no
decode rank has writes nothing.

    source rank 0  copy 0 of 2 ───> decode rank 0  copy 0 of 1          source rank 0  copy 0 of 1 ─┬─> decode rank 0
    source rank 1  copy 1 of 2                                                                      └─> decode rank 1
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from ...common.kv_spec import KVCacheSpec, Shard
from ...wire.grants import GrantInfo, RegionInfo
from ..backends.base import Piece


def shards_of(ranks: Sequence[RegionInfo], spec: KVCacheSpec) -> list[Shard]:
    """Return what each of a worker's ranks holds."""
    return [region.shard or spec.shard(region.rank, len(ranks)) for region in ranks]


def check_regions(ranks: Sequence[RegionInfo], spec: KVCacheSpec) -> str | None:
    """Say why these regions are not all of a worker's KV, as this version ships it; None: they are."""
    shards = shards_of(ranks, spec)
    for region, shard in zip(ranks, shards, strict=True):
        if (shard.first_layer, shard.end_layer) != (0, spec.num_layers) or shard.end_head > spec.num_kv_heads:
            whole = f"all {spec.num_layers} layers and some of {spec.num_kv_heads} heads"
            return f"{shard} at {region.agent}, want {whole}"
        page_bytes = spec.num_parts * shard.num_heads * spec.head_bytes
        if region.page_bytes != page_bytes:
            return f"page_bytes {page_bytes} by the spec, {region.page_bytes} at {region.agent}"
    held = sorted((shard.copy, head) for shard in shards for head in range(shard.first_head, shard.end_head))
    num_copies = spec.num_copies(len(ranks))
    is_each_once = held == list(product(range(num_copies), range(spec.num_kv_heads)))
    if not is_each_once or any(shard.num_copies != num_copies for shard in shards):
        once = f"once in each of {num_copies} copies" if num_copies > 1 or spec.is_replicated else "once"
        return f"{'; '.join(map(str, shards))}: not each of {spec.num_kv_heads} heads {once}"
    return None


def pieces(source: Shard, target: Shard, spec: KVCacheSpec) -> tuple[Piece, ...] | None:
    """Return the runs of a source rank's page that go into the target rank's; None: it writes nothing there."""
    common = source.share_for(target)
    if common is None:
        return None
    if source.first_head == target.first_head and source.num_heads == target.num_heads:
        return (Piece(0, 0, spec.num_parts * source.num_heads * spec.head_bytes),)
    return tuple(
        Piece(
            (part * source.num_heads + common.first_head - source.first_head) * spec.head_bytes,
            (part * target.num_heads + common.first_head - target.first_head) * spec.head_bytes,
            common.num_heads * spec.head_bytes,
        )
        for part in range(spec.num_parts)
    )


def expected_pairs(sources: Sequence[Shard], targets: Sequence[Shard]) -> frozenset[tuple[int, int]]:
    """Return the (source rank, target rank) pairs of which the one writes to the other: each must report an arrival."""
    return frozenset(
        (rank, number)
        for rank, source in enumerate(sources)
        for number, target in enumerate(targets)
        if source.share_for(target) is not None
    )


def targets_of(source: Shard, grant: GrantInfo) -> list[tuple[RegionInfo, tuple[Piece, ...]]]:
    """Return the decode ranks that a source rank writes to, and what of each page."""
    found = []
    for region, target in zip(grant.ranks, shards_of(grant.ranks, grant.spec), strict=True):
        runs = pieces(source, target, grant.spec)
        if runs is not None:
            found.append((region, runs))
    return found
