"""One rank's writes: posted, polled until they end, and counted against the decode worker that they go to.

    connect ─> post ─> poll ... ended ─> peer_lost ─> forget_lost, once nothing needs the agent any more

A write that nobody waits for any more (its shipment has ended) is still polled: its handle and its peer are given
back when it ends, not before. Deadlines and states are the sender's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ...common import failpoints
from ..backends.base import TransferBackend, TransferHandle, TransferState
from ..backends.peers import Peers
from .shipment import Shipment, Target


@dataclass(slots=True, eq=False)
class Write:
    shipment: Shipment
    agent: str
    handle: TransferHandle
    posted_at: float
    is_counted: bool = True  # in the shipment's and the peer's accounts


class Writes:
    """Owns the handles of the backend's writes."""

    def __init__(self, backend: TransferBackend, peers: Peers, max_in_flight_bytes: int) -> None:
        """`max_in_flight_bytes`: per decode worker; one that hangs must not hold the others' writes."""
        self._backend = backend
        self._peers = peers
        peers.needs(self._needed)
        self._max_in_flight_bytes = max_in_flight_bytes
        self._under_way: list[Write] = []  # in the order of the posts
        self._in_flight_bytes: Counter[tuple[str, int]] = Counter()  # by decode worker
        self._moved_at: dict[str, float] = {}  # when a write to this agent was last done
        self._shipments: Iterable[Shipment] = ()  # that have not ended

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def connect(self, kv_address: str, target: Target) -> None:
        """Raises TransferError."""
        self._peers.connect(kv_address, target.region, target.pieces)

    def has_room(self, peer: tuple[str, int], num_bytes: int) -> bool:
        """Tell whether so much more may be under way to a decode worker. One write always may."""
        in_flight = self._in_flight_bytes[peer]
        return not in_flight or in_flight + num_bytes <= self._max_in_flight_bytes

    def post(self, shipment: Shipment, target: Target, local: Sequence[int], remote: Sequence[int], now: float) -> None:
        """Raises TransferError."""
        agent = target.region.agent
        if failpoints.armed:
            failpoints.hit("transfer.write")
        handle = self._backend.write(agent, local, remote)
        if failpoints.armed:
            failpoints.hit("transfer.posted")
        self._under_way.append(Write(shipment, agent, handle, now))
        shipment.num_writes += 1
        self._in_flight_bytes[shipment.peer] += handle.num_bytes

    def poll(self, now: float) -> Iterator[tuple[Write, TransferState]]:
        """The state of each. What has ended is taken off the books before it is told."""
        for write in list(self._under_way):
            state = self._backend.poll(write.handle)
            if state is not TransferState.PENDING:
                self._backend.release(write.handle)
                self._under_way.remove(write)
                self._uncount(write)
            if state is TransferState.DONE:
                self._moved_at[write.agent] = now
            yield write, state
        if not self._under_way:
            self._moved_at.clear()

    def stands_since(self, write: Write) -> float:
        """Return since when nothing is known to have moved on its way: writes to one agent share a link."""
        return max(write.posted_at, self._moved_at.get(write.agent, write.posted_at))

    def disown(self, shipment: Shipment) -> None:
        """The shipment has ended: what is under way is on nobody's account."""
        for write in self._under_way:
            if write.shipment is shipment:
                self._uncount(write)

    def _uncount(self, write: Write) -> None:
        if write.is_counted:
            write.is_counted = False
            write.shipment.num_writes -= 1
            self._in_flight_bytes[write.shipment.peer] -= write.handle.num_bytes
            if not self._in_flight_bytes[write.shipment.peer]:
                del self._in_flight_bytes[write.shipment.peer]

    def peer_lost(self, kv_address: str) -> None:
        """A decode worker may be gone for good. One that comes back is connected anew by its next shipment."""
        self._peers.peer_lost(kv_address)

    def clear(self) -> None:
        """Our own agent is about to go: it has no connections afterwards, and no write of a shipment is under way."""
        assert not any(write.is_counted for write in self._under_way)
        self._peers.clear()

    def forget_lost(self, shipments: Iterable[Shipment]) -> None:
        """Disconnect from the agents of lost workers which none of these shipments and no write needs any more."""
        self._shipments = shipments
        self._peers.forget_lost()

    def _needed(self) -> Iterator[str]:
        yield from (write.agent for write in self._under_way)
        yield from (target.region.agent for shipment in self._shipments for target in shipment.targets)
