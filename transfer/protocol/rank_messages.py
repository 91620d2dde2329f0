"""Messages between tensor-parallel followers and rank 0 about transfers.

    rank 0 -> follower   FollowerSetup at the start; then calls (`rank_calls.py`), behind a mark of the role that they
                         are for
    follower -> rank 0   FollowerRegion once; then PeerMessage, SourceFree, RankRead (prefill), RankArrived, Rotated,
                         RankSums (decode)

Bytes of msgspec over the rank group's own socket pair; each rank has agents and transfer threads of its own.
"""

from __future__ import annotations

from enum import Enum

from ...wire.codec import Decoder
from ...wire.fields import Message
from ...wire.grants import ProcessMark, RegionInfo
from ...wire.handoff import KVArrived, KVClosed
from .handoff import Verdict

TO_PREFILL, TO_DECODE = b"p", b"d"  # whom a broadcast is for, before the message


class FollowerSetup(Message):
    """The worker's identity, for its other ranks."""

    worker_id: str
    incarnation: int
    version: str
    transfer: str  # TransferConfig as JSON


class FollowerRegion(Message):
    region: RegionInfo
    process: ProcessMark | None = None  # whose end is to be seen: it may copy into other processes' memory


class PeerMessage(Message):
    """A message that rank 0 is to send over its control connection."""

    kv_address: str
    message: KVClosed


class SourceFree(Message):
    open_id: int


class RankArrived(Message):
    rank: int
    message: KVArrived
    verdict: Verdict = Verdict.UNCHECKED


class Rotated(Message):
    """A rank's agent was replaced, or there is none."""

    rank: int
    generation: int
    region: RegionInfo | None = None  # None: there is no agent now
    reason: str = ""


class ReadOutcome(Enum):
    """A rank's word about a read. The last one is `DONE` or `OVER`."""

    DONE = "done"  # every page is here, and nothing is on its way
    FAILED = "failed"  # it will not be done; something may still land
    OVER = "over"  # nothing lands any more


class RankRead(Message):
    rank: int
    fetch_id: int
    outcome: ReadOutcome
    sums: bytes = b""


class RankSums(Message):
    rank: int
    fetch_id: int
    checksum: bytes


class TransferBroke(Message):
    """The follower's transfer thread ended."""

    reason: str


FollowerMessage = (
    FollowerRegion | PeerMessage | SourceFree | RankRead | RankArrived | Rotated | RankSums | TransferBroke
)
follower_messages: Decoder[FollowerMessage] = Decoder(FollowerMessage)


def agent_name(worker_id: str, incarnation: int, generation: int, rank: int, *, is_outgoing: bool = False) -> str:
    """A transfer agent's name. Never reused: every life of a worker has an incarnation of its own."""
    return f"{worker_id}.{incarnation:x}{'-out' if is_outgoing else ''}.{generation}.{rank}"
