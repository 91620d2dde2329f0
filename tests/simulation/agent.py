"""One worker's transfer agent on the simulated fabric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from kvferry.common.errors import TransferError
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.transfer.backends.base import Piece, TransferHandle, TransferState, rotated_name
from kvferry.wire.grants import GrantId, RegionInfo
from kvferry.wire.handoff import KVArrived

from .fabric import Fabric, Flight, Right, Run
from .kernel import Process
from .memory import Memory

if TYPE_CHECKING:
    import torch


class Agent:
    """A transfer agent of one rank of a worker. Implements `TransferBackend`."""

    name = "sim"
    copies_itself = True  # a part of its writes
    telemetry_bytes = 0
    lacks_devices = False

    def __init__(
        self,
        agent: str,
        place: str,
        fabric: Fabric,
        process: Process,
        memory: Memory,
        spec: KVCacheSpec,
        rank: int,
        tp_size: int,
    ) -> None:
        self.agent = agent
        self.place = place
        self.fabric = fabric
        self.process = process
        self.memory = memory
        self.page_bytes = spec.page_bytes(tp_size)
        self.rank, self.tp_size, self.shard = rank, tp_size, spec.shard(rank, tp_size)
        self.generation = 0
        self.poke: Callable[[], None] = _nothing  # a write has ended
        self.on_arrived: Callable[[KVArrived], None] = _drop
        self.right: Right = _Nobody()
        self.pass_point: Callable[[str], None] = _ignore
        self.writing: tuple[GrantId, int] = (GrantId("", 0, 0), 0)  # for whom the next write is
        self.pending: list[Flight] = []
        self._connected: dict[str, tuple[Piece, ...]] = {}  # what of each page goes there
        fabric.agents[agent] = self

    def is_retired(self, name: str) -> bool:
        """Nothing that names this agent so is taken any more."""
        return name != self.agent

    def region(self) -> RegionInfo:
        return RegionInfo(
            rank=self.rank,
            tp_size=self.tp_size,
            agent=self.agent,
            generation=self.generation,
            agent_metadata=b"",
            base_addr=0,
            num_blocks=self.memory.num_blocks,
            page_bytes=self.page_bytes,
            device="DRAM",
            device_id=0,
            transport=self.name,
            shard=self.shard,
        )

    def register(self, pages: torch.Tensor, *, rank: int, tp_size: int, generation: int) -> RegionInfo:
        raise AssertionError("a simulated worker has no tensor")

    def rotate(self, generation: int) -> RegionInfo:
        self.fabric.agents.pop(self.agent, None)
        self.agent = rotated_name(self.agent, generation)
        self._connected.clear()
        self.fabric.end_writes(self)
        self.pass_point("rotate")
        if self.fabric.weather.fails_rotation(self.place):
            raise TransferError(f"making an agent ({self.agent}): no interface is up", peer=self.agent)
        assert self.agent not in self.fabric.agents, f"{self.agent} was used before"
        self.generation = generation
        self.fabric.agents[self.agent] = self
        self.fabric.num_rotations += 1
        return self.region()

    @property
    def is_there(self) -> bool:
        """Tell whether the agent's last rotation, if there was one, has made one."""
        return self.fabric.agents.get(self.agent) is self

    def connect(self, remote: RegionInfo, pieces: tuple[Piece, ...]) -> None:
        if not self.is_there:
            raise TransferError(f"connecting ({remote.agent}): no agent here", peer=remote.agent, may_land=False)
        if remote.agent not in self.fabric.agents and self.fabric.weather.chance(0.5):
            raise TransferError(f"agent {remote.agent} is not reached", peer=remote.agent)
        self._connected.setdefault(remote.agent, pieces)

    def write(
        self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int], notify: bytes = b""
    ) -> TransferHandle:
        assert not notify
        if agent not in self._connected:
            raise TransferError(f"agent {agent} is not connected", peer=agent)
        self.pass_point("write")
        flight = self._flight(agent, local_pages, remote_pages)
        self.process.say(self.fabric.post, flight)
        return flight

    def _flight(self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int]) -> Flight:
        pages = list(zip(local_pages, remote_pages, strict=True))
        pieces = self._connected[agent]
        tag_bytes = self.page_bytes // self.memory.page_len
        runs = tuple(Run(*(number // tag_bytes for number in piece)) for piece in pieces)
        num_bytes = len(pages) * sum(piece.num_bytes for piece in pieces)
        flight = Flight(self, self.fabric.agents.get(agent), agent, pages, runs, num_bytes)
        self.pending.append(flight)
        return flight

    def read(self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int]) -> TransferHandle:
        if agent not in self._connected:
            raise TransferError(f"agent {agent} is not connected", peer=agent)
        self.pass_point("read")
        flight = self._flight(agent, local_pages, remote_pages)
        self.process.say(self.fabric.post_read, flight)
        return flight

    def poll(self, handle: TransferHandle) -> TransferState:
        assert isinstance(handle, Flight)
        return handle.state

    def release(self, handle: TransferHandle) -> None:
        assert isinstance(handle, Flight)
        if handle in self.pending:
            self.pending.remove(handle)

    def notify(self, agent: str, payload: bytes) -> None:
        if agent not in self._connected:
            raise TransferError(f"agent {agent} is not connected", peer=agent)
        self.pass_point("notify")
        self.process.say(self.fabric.notify, self, agent, payload)

    def notifications(self) -> list[tuple[str, bytes]]:
        return []  # they come as events

    def disconnect(self, agent: str) -> None:
        self._connected.pop(agent, None)

    def close(self) -> None:
        self.fabric.agents.pop(self.agent, None)


class _Nobody:
    def blocks_of(self, pages: Iterable[int]) -> set[int]:
        return set()

    def check_landing(self, flight: Flight, blocks: set[int]) -> None:
        raise AssertionError("nobody writes through the agent that writes")

    def lends(self, blocks: set[int]) -> bool:
        raise AssertionError("nobody reads through the agent that reads")

    def check_fetched(self, flight: Flight, blocks: set[int], *, was_lent: bool) -> None:
        raise AssertionError("nobody reads through the agent that is written through")


def _nothing() -> None:
    """Nobody waits for writes."""


def _ignore(point: str) -> None:
    """Nobody waits for it to come to a point."""


def _drop(message: KVArrived) -> None:
    """Nobody waits for arrivals."""
