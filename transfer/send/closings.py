"""The last word about each shipment that did not arrive, said until the decode worker has heard it.

    add ─> KVClosed(clean), or not clean: «what was posted may still land» ─> again and again ─KVDone─> over
              not clean ─┬─> all its writes are done after all             KVClosed(clean)
                         └─> a write failed, or none of it ends: our own   KVClosed(detached)
                             agent is destroyed once nothing else is under way

The last row is for decode workers of this host. What a failed write of UCX's still does is up to its agent, which may
go on to copy into their memory; a new agent of theirs does not stop that, and the end of ours does. Other writes are
held back for the moment that it takes, and none of theirs is lost: they begin anew with our next agent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...wire.fields import MAX_TEXT, Message
from ...wire.grants import GrantId
from ...wire.handoff import KVClosed
from ..backends.base import TransferState
from .shipment import Shipment

FAILED_AFTER_S = 2.0  # that a decode worker gets to fence us before we destroy our agent
STUCK_AFTER_S = 10.0  # that a decode worker gets where writes neither end nor fail
MIN_INTERVAL_S = 5.0  # between two of our agents
# A decode worker that lives and has not heard how a shipment ended keeps its blocks, and opens nothing more for us. So
# it is told for as long as a link may be away, more and more rarely: a tenth of an outage after it at the latest.
GIVE_UP_S = 3600.0
_SPACING = 0.1


@dataclass(slots=True, eq=False)
class _Closing:
    kv_address: str
    grant_id: GrantId
    open_id: int
    reason: str
    num_writes: int  # under way
    is_clean: bool
    has_failed: bool  # one of its writes did, or its post
    since: float
    announced_at: float
    is_detached: bool = False

    def due_at(self, every_s: float) -> float:
        """Return when it is said again."""
        return self.announced_at + max(every_s, _SPACING * (self.announced_at - self.since))


class Closings:
    """One source rank's."""

    def __init__(self, rank: int, to_peer: Callable[[str, Message], None], *, copies_itself: bool) -> None:
        """`copies_itself`: our agent may write into other processes' memory by its own system calls."""
        self._rank = rank
        self._to_peer = to_peer
        self._copies_itself = copies_itself
        self._found: dict[int, _Closing] = {}  # by open id
        self._next_agent_at = 0.0

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, shipment: Shipment, now: float, reason: str, *, clean: bool, has_failed: bool = False) -> None:
        """Say that a shipment has ended, before its writes are taken off its account."""
        grant, num_writes = shipment.grant, shipment.num_writes
        found = _Closing(
            grant.kv_address, grant.grant_id, shipment.open_id, reason, num_writes, clean, has_failed, now, now
        )
        self._found[shipment.open_id] = found
        self._tell(found, now)

    def write_ended(self, open_id: int, state: TransferState, now: float) -> None:
        """One that was still under way when its shipment ended."""
        found = self._found.get(open_id)
        if found is None:
            return
        found.num_writes -= 1
        found.has_failed |= state is TransferState.FAILED
        if not found.num_writes and not found.has_failed:
            found.is_clean, found.reason = True, "its writes have ended"
            self._tell(found, now)

    def acked(self, open_id: int) -> None:
        """The decode worker needs no more of it."""
        self._found.pop(open_id, None)

    def repeat(self, now: float, every_s: float) -> None:
        """Say again what nobody has answered."""
        for open_id, found in list(self._found.items()):
            if now - found.since >= GIVE_UP_S and not self._must_detach(found):
                del self._found[open_id]
            elif now >= found.due_at(every_s):
                self._tell(found, now)

    def next_call_at(self, every_s: float) -> float | None:
        """Return when `repeat` or `wants_new_agent` may have something to do."""
        return min((found.due_at(every_s) for found in self._found.values()), default=None)

    def _must_detach(self, found: _Closing) -> bool:
        return self._copies_itself and not found.is_clean and not found.is_detached

    def wants_new_agent(self, now: float) -> bool:
        """Nothing but the end of our agent ends some of them."""
        return now >= self._next_agent_at and any(
            now - found.since >= (STUCK_AFTER_S if found.num_writes else FAILED_AFTER_S)
            for found in self._found.values()
            if self._must_detach(found)
        )

    def detached(self, now: float) -> None:
        """Our agent is gone. Theirs may still get what it gave to the network."""
        self._next_agent_at = now + MIN_INTERVAL_S
        for found in self._found.values():
            if self._must_detach(found):
                found.is_detached, found.reason = True, "the agent that wrote is gone"
                self._tell(found, now)

    def _tell(self, found: _Closing, now: float) -> None:
        found.announced_at = now
        closed = KVClosed(
            grant_id=found.grant_id,
            open_id=found.open_id,
            source_rank=self._rank,
            clean=found.is_clean,
            reason=found.reason[:MAX_TEXT],
            detached=found.is_detached,
        )
        self._to_peer(found.kv_address, closed)
