"""Planted bugs of ranks that hold the same pages: who writes a copy, and who waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvferry.common.kv_spec import Shard
from kvferry.transfer.protocol.shards import expected_pairs, targets_of
from kvferry.transfer.receive import opens
from kvferry.transfer.receive.reservation import Writer
from kvferry.transfer.send import posting
from kvferry.wire.grants import GrantInfo

from .planting import Planted


def _expect_first_rank(sources: Sequence[Shard], targets: Sequence[Shard]) -> frozenset[tuple[int, int]]:
    """Pages that are the same everywhere have come when they have come to rank 0."""
    return expected_pairs(sources, targets[:1])


def _expect_first_source(sources: Sequence[Shard], targets: Sequence[Shard]) -> frozenset[tuple[int, int]]:
    """Each rank waits for a copy from source rank 0, which tells the others nothing."""
    return frozenset((0, target) for target in range(len(targets)))


def _write_everywhere(source: Shard, grant: GrantInfo) -> Any:
    """Each source rank has all pages, so it writes them to all ranks."""
    return targets_of(Shard(source.first_layer, source.end_layer, source.first_head, source.end_head), grant)


def _ended_with_first(self: Writer) -> bool:
    """What has no target of its own is not waited for, and neither is any rank but the first."""
    return 0 in self.ended_ranks


BUGS = (
    Planted(
        "a rank's copy is not waited for",
        frozenset({"H1", "H2", "H11"}),
        patches=((opens, "expected_pairs", _expect_first_rank),),
        within_seeds=200,
    ),
    Planted(
        "every source rank writes every copy",
        frozenset({"H1"}),
        patches=((posting, "targets_of", _write_everywhere),),
        within_seeds=200,
    ),
    Planted(
        "the end of one source rank ends all",
        frozenset({"H1"}),
        patches=((Writer, "has_ended", property(_ended_with_first)),),
        within_seeds=200,
    ),
)
