"""A plan names the pages that a step completes, and where they go.

A block is complete when it is full or ends the prompt; from then on it is written once, layer by layer, as the
layers are computed. Blocks that the prefix cache already held are complete in all layers before the first chunk;
those that it copies in from host memory are so when that chunk's first layer is.

    prompt blocks   0 ........ h ........ c ........ end
                    held by the          complete    still being
                    decode worker        this step   filled
                    (not shipped)
"""

from __future__ import annotations

import msgspec

from ...common.request import Sequence
from ...wire.grants import GrantInfo
from ..protocol.handoff import num_thin_behind


class ShipPlan(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Blocks of one shipment that this step completes: ours, and the decode worker's in the same order."""

    open_id: int
    local_blocks: tuple[int, ...]
    remote_blocks: tuple[int, ...]
    all_layers: bool = False  # complete already (prefix hits): not tied to this step's layers
    last: bool = False  # the prompt's last blocks
    num_thin: int = 0  # leading ones that are shipped thin (`kvcache/thin.py`)


def _plan(
    open_id: int, seq: Sequence, grant: GrantInfo, first: int, end: int, *, all_layers: bool = False, last: bool = False
) -> ShipPlan:
    """Plan the prompt's blocks [first, end) less those that the decode worker holds."""
    held = grant.num_computed_tokens // grant.spec.block_size
    first = max(first, held)
    if first >= end:
        return ShipPlan(open_id, (), (), all_layers, last)
    num_thin = num_thin_behind(grant.spec, grant.num_tokens, first, end - first)
    remote = grant.block_ids[first - held : end - held]
    return ShipPlan(open_id, tuple(seq.block_table[first:end]), remote, all_layers, last, num_thin)


def plan_chunk(open_id: int, seq: Sequence, grant: GrantInfo, num_tokens: int) -> ShipPlan:
    """Plan what is complete once tokens [num_computed_tokens, num_computed_tokens + num_tokens) are computed."""
    block_size = grant.spec.block_size
    end_token = seq.num_computed_tokens + num_tokens
    last = end_token == seq.num_tokens
    end = len(seq.block_table) if last else end_token // block_size
    is_first = seq.num_computed_tokens == seq.num_cached_tokens
    start_token = seq.num_computed_tokens - (seq.num_promoted_tokens if is_first else 0)
    return _plan(open_id, seq, grant, start_token // block_size, end, last=last)


def plan_hits(open_id: int, seq: Sequence, grant: GrantInfo) -> ShipPlan:
    """Blocks that the prefix cache held when the prompt started: complete in all layers."""
    num_tokens = seq.num_cached_tokens - seq.num_promoted_tokens
    return _plan(open_id, seq, grant, 0, num_tokens // grant.spec.block_size, all_layers=True)
