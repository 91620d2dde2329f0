"""Both sides of a handoff must agree on this: fit, page addresses, grants. Who writes to whom is in `shards.py`.

    decode worker   mint_grant ─> Grant ─> router ─> PrefillTask ─> check_grant, open_mac   prefill worker
                    check_compatible, is_minted <─ KVOpen <──────────────────────────┘

A grant's mac covers everything in it and the (request, attempt) that it is for. The mac of a KVOpen is made from it and
from what the prefill worker read: a grant that was forged, altered on its way or meant for another opens nothing.

Pure functions; the protocol's states are in `receiver.py` and `sender.py`.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import msgspec
import numpy as np
import numpy.typing as npt

from ...common.kv_spec import KVCacheSpec
from ...kvcache.frames import frames_of
from ...wire.grants import GrantInfo, RegionInfo
from ..backends.base import Indices
from .shards import check_regions

Pages = npt.NDArray[np.int32]
_MAX_PAGES = 2**31 - 1  # of a rank: `page_indices` numbers them in 32 bits

# Why a KVOpen is refused, as it is counted:
REJECTS = (
    "ended",  # the grant is over, of another life of the worker, or was never given
    "mac",  # it was forged, altered, or is another request's
    "reused",  # somebody opened it before
    "draining",
    "fenced_peer",  # what this prefill worker left in quarantine is older than a second
    "checksum",  # it makes none, and they are required
    "incompatible",
    "process",  # its processes are said to be of this host and are not found
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A worker as far as it must fit its peer."""

    spec: KVCacheSpec
    version: str
    transport: str
    tp_size: int


def check_compatible(local: Endpoint, remote: Endpoint) -> str | None:
    """Say why KV cannot move between the two, with both values; None if it can."""
    if local.version != remote.version:
        return f"kvferry {local.version} here, {remote.version} there"
    if local.transport != remote.transport:
        return f"transport {local.transport!r} here, {remote.transport!r} there"
    for name in KVCacheSpec.__struct_fields__ if local.spec != remote.spec else ():
        ours, theirs = getattr(local.spec, name), getattr(remote.spec, name)
        if ours != theirs:
            return f"KV cache {name} {ours!r} here, {theirs!r} there"
    for side, tp_size in (("here", local.tp_size), ("there", remote.tp_size)):
        if not local.spec.fits_ranks(tp_size):
            return f"{local.spec.num_kv_heads} KV heads cannot be split over {tp_size} ranks {side}"
    return None


def check_grant(local: Endpoint, grant: GrantInfo) -> str | None:
    """Say why nothing can be shipped under the grant; None if it can. Its worker's version is checked at KVOpen."""
    spec, ranks = grant.spec, grant.ranks
    if not ranks:
        return "the grant names no rank"
    for region in ranks:
        reason = check_compatible(local, Endpoint(spec, local.version, region.transport, len(ranks)))
        if reason is not None:
            return reason
    if [region.rank for region in ranks] != list(range(len(ranks))):
        return f"ranks {[region.rank for region in ranks]} in the grant, want 0 to {len(ranks) - 1}"
    return check_regions(ranks, spec) or check_pools(ranks, spec) or _check_blocks(grant)


def check_pools(ranks: Sequence[RegionInfo], spec: KVCacheSpec) -> str | None:
    """Say why these regions are no pool whose pages can be numbered; None: they are. All ranks have the same blocks."""
    sizes = {region.num_blocks for region in ranks}
    if len(sizes) > 1:
        return f"pools of {sorted(sizes)} blocks, want as many on each rank"
    if (num_pages := max(sizes) * spec.num_layers) > _MAX_PAGES:
        return f"{num_pages} pages at {ranks[0].agent}, at most {_MAX_PAGES} can be numbered"
    return None


def _check_blocks(grant: GrantInfo) -> str | None:
    num_blocks = grant.ranks[0].num_blocks
    held, rest = divmod(grant.num_computed_tokens, grant.spec.block_size)
    if not are_ids(grant.spec, grant.block_ids, num_blocks, num_granted_thin(grant)):
        return f"the grant's block ids are not distinct ids below {num_blocks}"
    if rest or held + len(grant.block_ids) != grant.spec.num_blocks_for(grant.num_tokens):
        return (
            f"{len(grant.block_ids)} blocks granted for tokens {grant.num_computed_tokens} to {grant.num_tokens} "
            f"at {grant.spec.block_size} a block"
        )
    return None


def are_ids(spec: KVCacheSpec, blocks: Sequence[int], num_blocks: int, num_thin: int) -> bool:
    """Tell whether these are distinct blocks of an allocation of so many, the first `num_thin` thin ones or whole."""
    is_id = frames_of(spec).is_id
    return len(set(blocks)) == len(blocks) and all(
        is_id(block, num_blocks, is_thin=place < num_thin) for place, block in enumerate(blocks)
    )


def page_indices(spec: KVCacheSpec, layer: int, blocks: Indices, num_blocks: int) -> npt.NDArray[np.int32]:
    """The pages of these blocks in a layer of an allocation of `num_blocks` (`kvcache/frames.py`)."""
    return np.asarray(blocks, dtype=np.int32) + np.int32(frames_of(spec).page(layer, 0, num_blocks))


def pages_of(spec: KVCacheSpec, blocks: Indices, num_blocks: int, num_thin: int = 0) -> tuple[Pages, Pages]:
    """The pages of these blocks of a pool, the first `num_thin` of which are thin, layer by layer; and the place of the
    block of each.
    """
    blocks, places = np.asarray(blocks, dtype=np.int32), np.arange(len(blocks), dtype=np.int32)
    skipped = [num_thin if spec.is_windowed(layer) else 0 for layer in range(spec.num_layers)]
    pages = [page_indices(spec, layer, blocks[count:], num_blocks) for layer, count in enumerate(skipped)]
    return np.concatenate(pages), np.concatenate([places[count:] for count in skipped])


def num_thin_behind(spec: KVCacheSpec, num_tokens: int, first: int, count: int) -> int:
    """Count those of a prompt's blocks [first, first + count) that a handoff of `num_tokens` leaves thin."""
    return min(max(0, spec.num_left_out(num_tokens) - first), count)


def num_granted_thin(grant: GrantInfo) -> int:
    """Count those of a grant's blocks that come thin: the first ones."""
    held = grant.num_computed_tokens // grant.spec.block_size
    return num_thin_behind(grant.spec, grant.num_tokens, held, len(grant.block_ids))


def _digest(grant: GrantInfo, request_id: str, attempt: int) -> bytes:
    """All that a grant promises, and to whom: its incarnation and epoch, its blocks, tokens, regions and expiry."""
    named = (request_id, attempt, msgspec.structs.replace(grant, mac=b""))
    return hashlib.blake2b(msgspec.msgpack.encode(named)).digest()


def mint_grant(key: bytes, grant: GrantInfo, request_id: str, attempt: int) -> GrantInfo:
    """The grant with its mac; `key` never leaves the decode worker's process."""
    mac = hashlib.blake2b(_digest(grant, request_id, attempt), key=key).digest()
    return msgspec.structs.replace(grant, mac=mac)


def open_mac(grant: GrantInfo, request_id: str, attempt: int) -> bytes:
    """Shows that we hold a minted grant, and that we read in it, and ship under it, what the decode worker meant."""
    return hashlib.blake2b(_digest(grant, request_id, attempt), key=grant.mac).digest()


def is_minted(key: bytes, grant: GrantInfo, request_id: str, attempt: int, mac: bytes) -> bool:
    """Tell whether `mac` is the `open_mac` of this very grant as it was minted with `key` for this attempt."""
    return hmac.compare_digest(open_mac(mint_grant(key, grant, request_id, attempt), request_id, attempt), mac)


def moved_grant(grant: GrantInfo, ranks: tuple[RegionInfo, ...]) -> GrantInfo:
    """The grant with the regions that a KVOpened names; they are those of the grant where it names none."""
    return msgspec.structs.replace(grant, ranks=ranks) if ranks else grant


class Verdict(Enum):
    """A verdict on the bytes that an arrival is about, by the rank that they came to."""

    UNCHECKED = "unchecked"
    INTACT = "intact"
    CORRUPT = "corrupt"
