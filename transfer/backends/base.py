"""A transport writes and reads pages of another process's registered KV allocation, one-sided.

The shape is NIXL's: register once, exchange metadata, write, poll, notify. A *page* is one block in one layer on
one rank; its index is `place * num_blocks + block`, by the layer's place (`kvcache/frames.py`). Where both sides have
the same tensor-parallel size a page is one run of bytes (one `Piece`); else a head range is two runs, one in K and one
in V.

A backend moves bytes and nothing else: rights, leases and reuse of blocks are the sender's and the receiver's.
A backend is used by one thread at a time (the transfer thread), except `register` and `close`.

`rotate` is the fence of handoffs: bytes that were on their way to the destroyed agent go nowhere (measured for UCX over
TCP; forgetting the peer, deregistering the memory or the writer's death leave them on their way).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ...wire.grants import RegionInfo

if TYPE_CHECKING:
    import torch

Indices = Sequence[int] | npt.NDArray[np.int32]


class TransferState(Enum):
    PENDING = "pending"
    DONE = "done"  # the bytes are in the target's memory, the notification is on its way
    FAILED = "failed"  # they may still land


class Piece(NamedTuple):
    """A run of bytes inside a page: where it stands in our page and in theirs."""

    local_offset: int
    remote_offset: int
    num_bytes: int


class TransferHandle(Protocol):
    """A write or a read under way; `release` it when it has ended."""

    num_bytes: int


class TransferBackend(Protocol):
    """One agent of one rank. Its name is never reused: `worker_id.incarnation.generation.rank`."""

    name: str  # "nixl", "ucx", "local"
    agent: str
    copies_itself: bool  # into other processes of this host, by system calls of ours: no agent of theirs stops that

    @property
    def lacks_devices(self) -> bool:
        """Tell whether the agent was made without a network device that an earlier one had (`reach.py`)."""
        ...

    @property
    def telemetry_bytes(self) -> int:
        """Return the bytes of writes and reads that are DONE, as the transport itself counted them."""
        ...

    def register(self, pages: torch.Tensor, *, rank: int, tp_size: int, generation: int) -> RegionInfo:
        """Register the allocation [layers, blocks, 2 or 1, heads, block_size, head_dim] and describe it for peers."""
        ...

    def rotate(self, generation: int) -> RegionInfo:
        """Destroy the agent and register the same allocation with a new one, whose name carries `generation`.

        What was on its way to or from the old agent goes nowhere: pending writes of ours have FAILED, unread
        notifications are lost, peers are connected anew. Raises TransferError where no agent can be made now (an
        interface is down): then there is none, and a later try with a higher generation may succeed.
        """
        ...

    def connect(self, remote: RegionInfo, pieces: tuple[Piece, ...]) -> None:
        """Make `remote` writable and readable under its agent's name. Again with the same agent: nothing to do."""
        ...

    def write(
        self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int], notify: bytes = b""
    ) -> TransferHandle:
        """Post a write of local pages onto remote pages, pairwise. Raises TransferError naming the peer."""
        ...

    def read(self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int]) -> TransferHandle:
        """Post a read of remote pages into local pages, pairwise. Raises TransferError naming the peer.

        DONE: they stand in our pages, as they were over there at some moment since the post. Until it has ended, and
        after it has FAILED until our agent is replaced, something may still land in our pages.
        """
        ...

    def poll(self, handle: TransferHandle) -> TransferState:
        """Progress and state; never blocks, never raises for a failed peer."""
        ...

    def release(self, handle: TransferHandle) -> None:
        """Forget a handle that is DONE or FAILED. Idempotent."""
        ...

    def notify(self, agent: str, payload: bytes) -> None:
        """Send `payload` to a connected peer. No order holds against writes. Raises TransferError."""
        ...

    def notifications(self) -> list[tuple[str, bytes]]:
        """Progress, and the (agent, payload) pairs that have come since the last call."""
        ...

    def disconnect(self, agent: str) -> None:
        """Forget a peer. This does not stop writes that were posted."""
        ...

    def close(self) -> None:
        """Destroy the agent and release the registration. Idempotent."""
        ...


def rotated_name(agent: str, generation: int) -> str:
    """The name of the agent that follows `agent`: the same but for its generation."""
    life, _, rank = agent.rsplit(".", 2)
    return f"{life}.{generation}.{rank}"


def is_same_rank(agent: str, other: str) -> bool:
    """Tell whether both agents are one rank's in one life of its worker: at most their generations differ."""
    return _without_generation(agent) == _without_generation(other)


def _without_generation(agent: str) -> list[str]:
    """Others make names too: one that has no generation stays as it is."""
    parts = agent.rsplit(".", 2)
    return [parts[0], parts[2]] if len(parts) == 3 else [agent]


def page_rows(pages: torch.Tensor) -> torch.Tensor:
    """The allocation as bytes, one page in each row: [layers * blocks, page_bytes] uint8, the same memory."""
    import torch

    assert pages.dim() == 6 and pages.is_contiguous(), tuple(pages.shape)
    num_pages = pages.shape[0] * pages.shape[1]
    return pages.view(-1).view(torch.uint8).view(num_pages, -1)


def page_num_bytes(pages: torch.Tensor) -> int:
    return pages[0, 0].numel() * pages.element_size()


def describe_region(
    pages: torch.Tensor, *, agent: str, metadata: bytes, transport: str, rank: int, tp_size: int, generation: int
) -> RegionInfo:
    """Describe a registered allocation as a peer must know it. What of a model it is follows from the rank."""
    num_blocks = pages.shape[1]
    return RegionInfo(
        rank=rank,
        tp_size=tp_size,
        agent=agent,
        generation=generation,
        agent_metadata=metadata,
        base_addr=pages.data_ptr(),
        num_blocks=num_blocks,
        page_bytes=page_num_bytes(pages),
        device="VRAM" if pages.is_cuda else "DRAM",
        device_id=pages.device.index or 0,
        transport=transport,
    )
