"""`question` asks a worker for a part of a prefix that it holds; `check_answer` says whether an answer can be its own.

    question ─KVFetch─> lender ─KVFetchable─> check_answer: fits, names blocks that there are, each once

An answer comes from another process: nothing is read by it that was not looked at here. Pure functions.
"""

from __future__ import annotations

from ...wire.fetches import KVFetch, KVFetchable
from ..protocol.handoff import Endpoint, are_ids, check_compatible, check_pools
from ..protocol.shards import shards_of
from .fetch import Part


def question(part: Part, endpoint: Endpoint, *, wants_checksums: bool) -> KVFetch:
    """Return the message that asks for a part. `endpoint`: what must fit on both sides."""
    return KVFetch(
        fetch_id=part.fetch_id,
        hashes=b"".join(part.hashes),
        spec=endpoint.spec,
        version=endpoint.version,
        transport=endpoint.transport,
        tp_size=endpoint.tp_size,
        wants_checksums=wants_checksums,
        num_thin=part.num_thin,
    )


def check_answer(part: Part, message: KVFetchable, endpoint: Endpoint, *, needs_checksums: bool) -> str | None:
    """Say why nothing can be read by this answer; None: it can."""
    if needs_checksums and not message.has_checksums:
        return "checksums are required here (kv_checksum: on) and not made there"
    spec, tp_size = endpoint.spec, endpoint.tp_size
    ranks, blocks = message.ranks, message.block_ids
    if [region.rank for region in ranks] != list(range(tp_size)):
        return f"ranks {[region.rank for region in ranks]}, want 0 to {tp_size - 1}"
    for region in ranks:
        theirs = Endpoint(spec, endpoint.version, region.transport, tp_size)
        misfit = check_compatible(endpoint, theirs)
        if misfit is not None or region.page_bytes != spec.page_bytes(tp_size):
            return misfit or f"pages of {region.page_bytes} bytes at {region.agent}"
    for region, shard in zip(ranks, shards_of(ranks, spec), strict=True):
        if shard != spec.shard(region.rank, tp_size):  # each rank reads whole pages from the one with its number
            return f"{shard} at {region.agent}, {spec.shard(region.rank, tp_size)} here"
    if (misfit := check_pools(ranks, spec)) is not None:
        return misfit
    num_blocks = ranks[0].num_blocks
    if not 0 < len(blocks) <= len(part.hashes) or not are_ids(spec, blocks, num_blocks, part.num_thin):
        return f"block ids are not up to {len(part.hashes)} distinct ids below {num_blocks}"
    return None
