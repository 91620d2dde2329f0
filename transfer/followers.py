"""What tensor-parallel followers and rank 0 say to each other about transfers.

    rank 0 -> follower   FollowerSetup at the start; then Watch, Rotate (decode), or the commands of `prefill.shipping`
    follower -> rank 0   FollowerRegion once; then PeerMessage, SourceFree (prefill), RankArrived, Rotated (decode)

Bytes of msgspec over the rank group's own socket pair; each rank has an agent and a transfer thread of its own.
"""

from __future__ import annotations

from ..common.messages import Decoder, KVArrived, KVClosed, Message, ProcessMark, RegionInfo
from .arrivals import Verdict


class FollowerSetup(Message):
    """Who the worker is, for its other ranks."""

    role: str
    worker_id: str
    incarnation: int
    version: str
    transfer: str  # TransferConfig as JSON


class FollowerRegion(Message):
    region: RegionInfo
    process: ProcessMark | None = None  # whose end is to be seen: it may copy into other processes' memory


class PeerMessage(Message):
    """To be sent over rank 0's control connection."""

    kv_address: str
    message: KVClosed


class SourceFree(Message):
    open_id: int


class RankArrived(Message):
    rank: int
    message: KVArrived
    verdict: Verdict = Verdict.UNCHECKED


class Watch(Message):
    on: bool


class Rotate(Message):
    """Replace the agent, answered by Rotated."""

    generation: int


class Rotated(Message):
    rank: int
    generation: int
    region: RegionInfo | None = None  # None: there is no agent now
    reason: str = ""


class TransferBroke(Message):
    """The follower's transfer thread ended."""

    reason: str


FollowerMessage = FollowerRegion | PeerMessage | SourceFree | RankArrived | Rotated | TransferBroke
follower_messages: Decoder[FollowerMessage] = Decoder(FollowerMessage)


def agent_name(worker_id: str, incarnation: int, generation: int, rank: int) -> str:
    """A transfer agent's name. Never reused: every life of a worker has an incarnation of its own."""
    return f"{worker_id}.{incarnation:x}.{generation}.{rank}"
