"""Prefill and decode worker agree on a handoff over their control socket. Its life: `transfer/send/sender.py`."""

from __future__ import annotations

from typing import Annotated

import msgspec

from ..common.kv_spec import KVCacheSpec
from .fields import U64, BlockIds, Checksums, Count, DraftState, Message, Name, Nonce, Text
from .grants import GrantId, ProcessMarks, Regions
from .results import ChoiceList


class KVOpen(Message):
    grant_id: GrantId
    open_id: U64
    mac: Nonce  # handoff.open_mac: of the grant as it reached the prefill worker, and of whose prompt is shipped
    worker_id: Name
    incarnation: U64
    spec: KVCacheSpec
    version: Name
    transport: Name
    tp_size: Count  # source ranks 0 .. tp_size - 1
    processes: ProcessMarks = ()  # of each source rank; none: their ends cannot be seen from elsewhere
    has_checksums: bool = False  # KVArrived will carry them


class KVOpened(Message):
    grant_id: GrantId
    open_id: U64
    lease_s: float
    generation: Count
    ranks: Regions = ()  # to be written to instead of the grant's, whose agents are gone; else empty


class KVRefused(Message):
    """`reason`: one of handoff.REJECTS, or what does not fit, in words."""

    grant_id: GrantId
    open_id: U64
    reason: Text


class KVRenew(Message):
    opens: Annotated[tuple[tuple[GrantId, U64], ...], msgspec.Meta(max_length=16384)]


class KVRenewed(Message):
    """Answers KVRenew: for each open its lease in seconds, or 0 where it is gone."""

    opens: Annotated[tuple[tuple[GrantId, U64, float], ...], msgspec.Meta(max_length=16384)]


class KVClosed(Message):
    grant_id: GrantId
    open_id: U64
    source_rank: Count
    clean: bool  # False: what was posted may still land
    reason: Text = ""
    detached: bool = False  # the agent that posted is destroyed: only a network may still carry some of it


class CancelKV(Message):
    grant_id: GrantId
    open_id: U64


class KVDone(Message):
    grant_id: GrantId
    open_id: U64


class KVArrived(Message):
    """Notification of the transfer agent, one from each source rank to each decode rank that it writes to."""

    grant_id: GrantId
    open_id: U64
    source_rank: Count
    num_tokens: Count
    first_tokens: ChoiceList = ()  # from source rank 0
    num_cached_tokens: Count = 0  # of the prompt: that it had not to compute
    tp_size: Count = 1  # of the source
    block_ids: BlockIds = ()  # that were written, where there are checksums
    checksum: Checksums = b""  # 8 bytes for each of them (transfer/protocol/checksums.py); empty: none
    draft: DraftState = b""  # what a draft of the decode worker goes on from; empty: nothing
