"""The agents that one agent of ours is connected to, and when they may be forgotten.

    connect ─> ... peer_lost, or its successor is connected ─> forget_lost, once nobody needs the agent any more

What is written there and what is read from there share a connection, so neither may end it for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import structlog

from ...common.errors import TransferError
from ...wire.grants import RegionInfo
from .base import Piece, TransferBackend, is_same_rank

# Of one agent of ours: NIXL keeps a socket of each that fails at once, as to an agent of this host that has ended. More
# come near a limit of 1024 open files; fewer have healthy peers connect anew more often.
MAX_FAILED = 200

log = structlog.get_logger(__name__)


class Peers:
    """Owns the backend's connections. Lives on its transfer thread."""

    def __init__(self, backend: TransferBackend) -> None:
        self._backend = backend
        self._addresses: dict[str, str] = {}  # connected agent -> control address of its worker
        self._lost: set[str] = set()  # agents that are to be forgotten
        self._num_failed = 0  # connections, of the agent that we have now
        self._users: list[Callable[[], Iterable[str]]] = []

    def needs(self, agents: Callable[[], Iterable[str]]) -> None:
        """`agents()` names those that somebody needs now: they are not forgotten."""
        self._users.append(agents)

    def connect(self, kv_address: str, region: RegionInfo, pieces: tuple[Piece, ...]) -> None:
        """Raises TransferError. The agents that this one follows are gone."""
        try:
            self._backend.connect(region, pieces)
        except TransferError:
            self._num_failed += 1
            raise
        if region.agent not in self._addresses:
            self._lost.update(agent for agent in self._addresses if is_same_rank(agent, region.agent))
        self._addresses[region.agent] = kv_address
        self._lost.discard(region.agent)

    def peer_lost(self, kv_address: str) -> None:
        """A worker may be gone for good. One that comes back is connected anew."""
        self._lost.update(agent for agent, address in self._addresses.items() if address == kv_address)

    def clear(self) -> None:
        """Our own agent is about to go: it has no connections afterwards."""
        self._addresses.clear()
        self._lost.clear()
        self._num_failed = 0

    @property
    def wants_new_agent(self) -> bool:
        """Tell whether so many connections have failed that our agent is to go, and what is left of them with it."""
        return self._num_failed >= MAX_FAILED

    def forget_lost(self) -> None:
        """Disconnect from the agents of lost workers that nobody needs any more."""
        if not self._lost:
            return
        needed = {agent for agents in self._users for agent in agents()}
        for agent in self._lost - needed:
            self._lost.remove(agent)
            del self._addresses[agent]
            try:
                self._backend.disconnect(agent)
            except TransferError as error:  # what it still holds of a dead peer is its own
                log.debug("peer_not_disconnected", peer=agent, reason=str(error))
