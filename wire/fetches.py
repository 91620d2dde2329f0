"""A worker fetches a prefix from another one, which lends it, over a control socket: told in `transfer/fetch/`."""

from __future__ import annotations

from ..common.kv_spec import KVCacheSpec
from .fields import U64, BlockIds, Checksums, Count, Hashes, Message, Name, Text
from .grants import Regions


class KVFetch(Message):
    """May I read these blocks? Whoever knows a block's hash has, or had, its tokens and its tenant's salt."""

    fetch_id: U64  # random, new for each question
    hashes: Hashes  # of neighbouring blocks of one prompt, in token order
    spec: KVCacheSpec
    version: Name
    transport: Name
    tp_size: Count  # equal on both sides: each rank reads from the one that has its heads
    wants_checksums: bool = False
    num_thin: Count = 0  # leading ones that are read without the pages of layers with windows (`kvcache/thin.py`)


class KVFetchable(Message):
    """Lent blocks, which stay what they are for `lease_s` from the receipt of the question on; longer for nobody."""

    fetch_id: U64
    lease_s: float
    block_ids: BlockIds  # of the leading ones of those that were asked for
    ranks: Regions
    has_checksums: bool = False  # a KVFetchSums from each rank follows


class KVFetchSums(Message):
    """Checksums of one rank's pages of the lent blocks."""

    fetch_id: U64
    rank: Count
    checksum: Checksums  # 8 bytes for each block


class KVFetchRefused(Message):
    """`reason`: gone, full, checksum, or what does not fit, in words."""

    fetch_id: U64
    reason: Text


class KVFetchDone(Message):
    """Ends the lease: what is read from the blocks from now on will not be used."""

    fetch_id: U64
