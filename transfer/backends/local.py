"""LocalBackend: agents of one process write into, and read from, each other's tensors. For tests and simulations.

All agents hang on one `LocalNetwork`, which can misbehave towards an agent in the ways that real ones do:

    HOLD   writes stay pending; they land when the fault is cleared, if the agent is still there by then: also those
           of a writer that has died meanwhile
    FAIL   writes fail at once, and their bytes land all the same when the fault is cleared
    STALL  as HOLD; but a writer that copies by itself stands still: its bytes land when the fault is cleared,
           whatever became of the agent, unless the writer's process has ended (`end_process`)
    DROP   notifications are lost
    GONE   posting and notifying raise, as to a dead peer

Reads are held, fail and come late in the same ways, but for those whose reader's agent is gone: they go nowhere.

With a clock and a bandwidth, a write is done when its bytes have passed the target's link, in the clock's time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from ...common.clock import Clock
from ...common.errors import TransferError
from ...wire.grants import RegionInfo
from .base import Piece, TransferHandle, TransferState, describe_region, page_rows, rotated_name


class LocalFault(Enum):
    HOLD = "hold"
    FAIL = "fail"
    STALL = "stall"
    DROP = "drop"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class LocalHandle:
    """A write from `source`'s pages into `target`'s, or a read of `target`'s pages into `source`'s."""

    source: LocalBackend
    target: LocalBackend
    pieces: tuple[Piece, ...]
    local_pages: Sequence[int]
    remote_pages: Sequence[int]
    notify: bytes
    num_bytes: int
    done_at: float
    agent: str  # of the target when this was posted
    is_copy: bool = False  # made by the writer's own process: no agent of the target's takes part
    is_read: bool = False
    source_agent: str = ""  # that posted this
    state: TransferState = TransferState.PENDING
    landed: bool = False

    def land(self) -> None:
        """Copy now. The pages are read here and not at the post: a late write carries what is there then."""
        if self.target.network.on_land is not None:
            self.target.network.on_land(self)
        for local, remote in zip(self.local_pages, self.remote_pages, strict=True):
            for piece in self.pieces:
                ours = self.source.rows[local, piece.local_offset : piece.local_offset + piece.num_bytes]
                theirs = self.target.rows[remote, piece.remote_offset : piece.remote_offset + piece.num_bytes]
                if self.is_read:
                    ours.copy_(theirs)
                else:
                    theirs.copy_(ours)
        self.landed = True


class LocalNetwork:
    """The agents of one process, by name, and what is wrong between them."""

    def __init__(self, clock: Clock | None = None, bytes_per_s: float | None = None) -> None:
        self.agents: dict[str, LocalBackend] = {}
        self.late: list[LocalHandle] = []  # held, stalled or failed writes that have not landed
        self.can_make_agents = True
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
            if handle.agent == agent:
                handle.land()
            else:
                self.late.append(handle)

    def forget(self, agent: str) -> None:
        """The agent is gone, and what was on its way to it; not what writers copy by themselves."""
        self.agents.pop(agent, None)
        self._drop(lambda handle: handle.agent == agent and not handle.is_copy)

    def forget_memory(self, target: LocalBackend) -> None:
        """The target's process has ended: nothing can be written there."""
        self._drop(lambda handle: handle.target is target)

    def end_process(self, source: LocalBackend) -> None:
        """The writer's process has ended: its own copies end with it, what it gave to the network does not.

        What it was reading comes to nobody.
        """
        self._drop(lambda handle: handle.source is source and (handle.is_copy or handle.is_read))

    def _drop(self, is_lost: Callable[[LocalHandle], bool]) -> None:
        for handle in self.late:
            if is_lost(handle):
                handle.state = TransferState.FAILED
        self.late = [handle for handle in self.late if not is_lost(handle)]

    def fault(self, agent: str) -> LocalFault | None:
        return LocalFault.GONE if agent not in self.agents else self._faults.get(agent)

    def done_at(self, agent: str, num_bytes: int) -> float:
        """Return when a write that is posted now has passed the agent's link."""
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

    def __init__(self, agent: str, network: LocalNetwork, *, copies_itself: bool = False) -> None:
        """`copies_itself`: as a process does that is on one host with the agents that it writes to."""
        self.agent = agent
        self.copies_itself = copies_itself
        self.telemetry_bytes = 0
        self.lacks_devices = False
        self.rows = torch.empty(0)  # [num_pages, page_bytes] uint8
        self._pages = torch.empty(0)
        self._rank, self._tp_size = 0, 1
        self.network = network
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        self._inbox: list[tuple[str, bytes]] = []
        network.agents[agent] = self

    def register(self, pages: torch.Tensor, *, rank: int, tp_size: int, generation: int) -> RegionInfo:
        self.rows = page_rows(pages)
        self._pages, self._rank, self._tp_size = pages, rank, tp_size
        return self._region(generation)

    def rotate(self, generation: int) -> RegionInfo:
        """Raises TransferError while `network.can_make_agents` is False."""
        self.network.forget(self.agent)
        self.network.end_process(self)  # its copies end with the agent that made them
        self._pieces.clear()
        self._inbox.clear()
        self.agent = rotated_name(self.agent, generation)
        if not self.network.can_make_agents:
            raise TransferError(f"making an agent ({self.agent}): no interface is up", peer=self.agent)
        assert self.agent not in self.network.agents, f"{self.agent} was used before"
        self.network.agents[self.agent] = self
        return self._region(generation)

    def _region(self, generation: int) -> RegionInfo:
        return describe_region(
            self._pages,
            agent=self.agent,
            metadata=b"",
            transport=self.name,
            rank=self._rank,
            tp_size=self._tp_size,
            generation=generation,
        )

    def connect(self, remote: RegionInfo, pieces: tuple[Piece, ...]) -> None:
        self._peer(remote.agent)
        self._pieces.setdefault(remote.agent, pieces)

    def _peer(self, agent: str) -> LocalBackend:
        if self.network.agents.get(self.agent) is not self:
            raise TransferError(f"reaching {agent}: no agent here ({self.agent})", peer=agent, may_land=False)
        if self.network.fault(agent) is LocalFault.GONE:
            raise TransferError(f"agent {agent} is not reached", peer=agent, may_land=False)
        return self.network.agents[agent]

    def write(
        self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int], notify: bytes = b""
    ) -> LocalHandle:
        return self._post(agent, local_pages, remote_pages, notify, is_read=False)

    def read(self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int]) -> LocalHandle:
        return self._post(agent, local_pages, remote_pages, b"", is_read=True)

    def _post(
        self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int], notify: bytes, *, is_read: bool
    ) -> LocalHandle:
        target, runs = self._peer(agent), self._pieces[agent]
        num_bytes = len(local_pages) * sum(piece.num_bytes for piece in runs)
        done_at = self.network.done_at(agent, num_bytes)
        fault = self.network.fault(agent)
        handle = LocalHandle(
            self, target, runs, list(local_pages), list(remote_pages), notify, num_bytes, done_at, agent,
            is_copy=fault is LocalFault.STALL and self.copies_itself and not is_read, is_read=is_read,
            source_agent=self.agent,
        )  # fmt: skip
        if self.network.on_post is not None:
            self.network.on_post(handle)
        if fault in (LocalFault.HOLD, LocalFault.FAIL, LocalFault.STALL):
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
        is_lost = self.network.fault(handle.agent) is LocalFault.GONE or handle.source_agent != self.agent
        if not handle.landed and is_lost:
            handle.state = TransferState.FAILED
        elif handle.landed or self.network.is_due(handle):
            if not handle.landed:
                handle.land()
            handle.state = TransferState.DONE
            self.telemetry_bytes += handle.num_bytes
            if handle.notify:
                self._deliver(handle.agent, handle.notify)

    def _deliver(self, agent: str, payload: bytes) -> None:
        if self.network.fault(agent) not in (LocalFault.DROP, LocalFault.GONE):
            self.network.agents[agent]._inbox.append((self.agent, payload))

    def release(self, handle: TransferHandle) -> None:
        """Nothing is held for a handle."""

    def notify(self, agent: str, payload: bytes) -> None:
        self._peer(agent)
        self._deliver(agent, payload)

    def notifications(self) -> list[tuple[str, bytes]]:
        inbox, self._inbox = self._inbox, []
        return inbox

    def disconnect(self, agent: str) -> None:
        self._pieces.pop(agent, None)

    def close(self) -> None:
        """The process ends. Writes that have not landed here never will."""
        self.network.forget(self.agent)
        self.network.forget_memory(self)
        self.network.end_process(self)
