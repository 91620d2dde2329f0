"""LocalBackend: agents of one process write into each other's tensors. For tests and simulations.

All agents hang on one `LocalNetwork`, which can misbehave towards an agent in the ways that real ones do:

    HOLD   writes stay pending; they land when the fault is cleared, whatever happened to the agent meanwhile
    FAIL   writes fail at once, and their bytes land all the same when the fault is cleared
    DROP   notifications are lost
    GONE   posting and notifying raise, as to a dead peer

With a clock and a bandwidth, a write is done when its bytes have passed the target's link, in the clock's time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from ..common.clock import Clock
from ..common.errors import TransferError
from ..common.messages import RegionInfo
from .base import Piece, TransferHandle, TransferState, describe_region, page_rows


class LocalFault(Enum):
    HOLD = "hold"
    FAIL = "fail"
    DROP = "drop"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class LocalHandle:
    """A write from `source`'s pages into `target`'s."""

    source: LocalBackend
    target: LocalBackend
    pieces: tuple[Piece, ...]
    local_pages: Sequence[int]
    remote_pages: Sequence[int]
    notify: bytes
    num_bytes: int
    done_at: float
    state: TransferState = TransferState.PENDING
    landed: bool = False

    def land(self) -> None:
        """Copy now. The pages are read here and not at the post: a late write carries what is there then."""
        if self.target.network.on_land is not None:
            self.target.network.on_land(self)
        ours, theirs = self.source.rows, self.target.rows
        for local, remote in zip(self.local_pages, self.remote_pages, strict=True):
            for piece in self.pieces:
                theirs[remote, piece.remote_offset : piece.remote_offset + piece.num_bytes] = ours[
                    local, piece.local_offset : piece.local_offset + piece.num_bytes
                ]
        self.landed = True


class LocalNetwork:
    """The agents of one process, by name, and what is wrong between them."""

    def __init__(self, clock: Clock | None = None, bytes_per_s: float | None = None) -> None:
        self.agents: dict[str, LocalBackend] = {}
        self.late: list[LocalHandle] = []  # held or failed writes that have not landed
        self.on_post: Callable[[LocalHandle], None] | None = None  # tests look here at who owns the blocks,
        self.on_land: Callable[[LocalHandle], None] | None = None  # and here, before the bytes land
        self._faults: dict[str, LocalFault] = {}
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._link_free_at: dict[str, float] = {}

    def set_fault(self, agent: str, fault: LocalFault) -> None:
        self._faults[agent] = fault

    def clear_fault(self, agent: str) -> None:
        """The agent is reached again; late writes to it land now."""
        self._faults.pop(agent, None)
        late, self.late = self.late, []
        for handle in late:
            if handle.target.agent == agent:
                handle.land()
            else:
                self.late.append(handle)

    def forget(self, agent: str) -> None:
        """The agent is gone, and what was on its way to it."""
        self.agents.pop(agent, None)
        for handle in self.late:
            if handle.target.agent == agent:
                handle.state = TransferState.FAILED
        self.late = [handle for handle in self.late if handle.target.agent != agent]

    def fault(self, agent: str) -> LocalFault | None:
        return LocalFault.GONE if agent not in self.agents else self._faults.get(agent)

    def done_at(self, agent: str, num_bytes: int) -> float:
        """When a write that is posted now has passed the agent's link."""
        if self._clock is None or self._bytes_per_s is None:
            return 0.0
        start = max(self._clock.now(), self._link_free_at.get(agent, 0.0))
        self._link_free_at[agent] = start + num_bytes / self._bytes_per_s
        return self._link_free_at[agent]

    def is_due(self, handle: LocalHandle) -> bool:
        return self._clock is None or self._clock.now() >= handle.done_at


class LocalBackend:
    """One agent on a LocalNetwork. Implements `TransferBackend`."""

    name = "local"

    def __init__(self, agent: str, network: LocalNetwork) -> None:
        self.agent = agent
        self.telemetry_bytes = 0
        self.rows = torch.empty(0)  # [num_pages, page_bytes] uint8
        self.network = network
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        self._inbox: list[tuple[str, bytes]] = []
        network.agents[agent] = self

    def register(self, pages: torch.Tensor, *, rank: int, tp_size: int, generation: int) -> RegionInfo:
        self.rows = page_rows(pages)
        return describe_region(
            pages,
            agent=self.agent,
            metadata=b"",
            transport=self.name,
            rank=rank,
            tp_size=tp_size,
            generation=generation,
        )

    def connect(self, remote: RegionInfo, pieces: tuple[Piece, ...]) -> None:
        self._peer(remote.agent)
        self._pieces.setdefault(remote.agent, pieces)

    def _peer(self, agent: str) -> LocalBackend:
        if self.network.fault(agent) is LocalFault.GONE:
            raise TransferError(f"agent {agent} is not reached", peer=agent)
        return self.network.agents[agent]

    def write(
        self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int], notify: bytes = b""
    ) -> LocalHandle:
        target, runs = self._peer(agent), self._pieces[agent]
        num_bytes = len(local_pages) * sum(piece.num_bytes for piece in runs)
        done_at = self.network.done_at(agent, num_bytes)
        handle = LocalHandle(self, target, runs, list(local_pages), list(remote_pages), notify, num_bytes, done_at)
        fault = self.network.fault(agent)
        if self.network.on_post is not None:
            self.network.on_post(handle)
        if fault in (LocalFault.HOLD, LocalFault.FAIL):
            self.network.late.append(handle)
        if fault is LocalFault.FAIL:
            handle.state = TransferState.FAILED
        return handle

    def poll(self, handle: TransferHandle) -> TransferState:
        assert isinstance(handle, LocalHandle)
        if handle.state is TransferState.PENDING and handle not in self.network.late:
            self._advance(handle)
        return handle.state

    def _advance(self, handle: LocalHandle) -> None:
        if not handle.landed and self.network.fault(handle.target.agent) is LocalFault.GONE:
            handle.state = TransferState.FAILED
        elif handle.landed or self.network.is_due(handle):
            if not handle.landed:
                handle.land()
            handle.state = TransferState.DONE
            self.telemetry_bytes += handle.num_bytes
            if handle.notify:
                self._deliver(handle.target, handle.notify)

    def _deliver(self, target: LocalBackend, payload: bytes) -> None:
        if self.network.fault(target.agent) is not LocalFault.DROP:
            target._inbox.append((self.agent, payload))

    def release(self, handle: TransferHandle) -> None:
        """Nothing is held for a handle."""

    def notify(self, agent: str, payload: bytes) -> None:
        self._deliver(self._peer(agent), payload)

    def notifications(self) -> list[tuple[str, bytes]]:
        inbox, self._inbox = self._inbox, []
        return inbox

    def disconnect(self, agent: str) -> None:
        self._pieces.pop(agent, None)

    def close(self) -> None:
        """Writes that have not landed here never will."""
        self.network.forget(self.agent)
