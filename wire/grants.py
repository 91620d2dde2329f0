"""A grant says where a decode worker's blocks are, and promises some of them to a request."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ..common.kv_spec import KVCacheSpec, Shard
from .fields import U64, BlockIds, Count, Name, Nonce


class RegionInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One rank's registered KV allocation, as another process must know it to write into it."""

    rank: Count
    tp_size: Count
    agent: Name  # worker_id.incarnation.generation.rank: never reused
    generation: Count
    agent_metadata: Annotated[bytes, msgspec.Meta(max_length=65536)]
    base_addr: U64
    num_blocks: Count
    page_bytes: Count
    device: Literal["DRAM", "VRAM"]  # NIXL's names, which raises a KeyError for any other
    device_id: Count
    transport: Name  # backend's name: both sides use the same
    shard: Shard | None = None  # what of the model it holds; None: the heads' even share of `rank`, in all layers


Regions = Annotated[tuple[RegionInfo, ...], msgspec.Meta(max_length=1024)]


class ProcessMark(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A process and its host: enough for another one there to be sure of it, and to see it end."""

    host: Name  # boot, network and process namespace; "" where processes cannot be told apart
    pid: Count
    started: Count  # clock ticks since boot: a number is given to another process later


ProcessMarks = Annotated[tuple[ProcessMark, ...], msgspec.Meta(max_length=1024)]


class GrantId(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    worker_id: Name
    incarnation: U64
    epoch: Count  # from 1, never reused within an incarnation


class GrantInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The decode worker's promise of blocks. It lets a prefill worker *ask* (KVOpen); only the open lets it write."""

    grant_id: GrantId
    spec: KVCacheSpec
    kv_address: Name
    block_ids: BlockIds  # destinations, in token order from num_computed_tokens on; rank-independent
    num_tokens: Count  # prompt tokens that the decode worker will have when all has arrived
    num_computed_tokens: Count  # whole blocks that it holds already: not to be shipped
    ranks: Regions
    open_within_s: float
    mac: Nonce  # minted by the decode worker, checked at KVOpen
