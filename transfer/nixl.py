"""NixlBackend: one-sided writes and notifications over UCX. Needs NIXL 1.5.

    register ─> connect (descriptors of both sides, prepared once per peer) ─> write by index ─> poll ─> release

Every page of both sides is prepared as a strided descriptor, which costs some 20 µs whatever the pool's size. A
write then only names indices, and NIXL merges runs that are contiguous on both sides into larger pieces.
Measured for 30 layers of 60 pages of 24 KiB, one write per layer, over shared memory: making the 30 writes takes
0.2 ms by prepared index and 1.3 ms from descriptors that were merged here first; the copy takes 5 ms either way
where the pages are contiguous (one descriptor each time) and 11 ms where no two are.

UCX moves each piece by a call of its own. Towards a process of this host, small pieces go together through a
`HostWindow`; NIXL carries all larger ones, every write to other hosts and to GPUs, and the notifications.

There is no progress thread, which would spin on a core: whoever waits polls, and polling makes progress.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from ..common.errors import ConfigError, ProtocolError, TransferError
from ..common.messages import Decoder, Message, RegionInfo, encode
from .base import Piece, TransferHandle, TransferState, describe_region
from .host_memory import HostMark, HostWindow, Marker, PageArea, paired_runs

SMALL_PIECE_BYTES = 128 << 10  # on average: below it, moving the pieces together is worth the vector's making
_PACKAGES = ("nixl", "nixl_cu12", "nixl_cu13")


class _Metadata(Message, frozen=True):
    """What a peer needs to reach us."""

    nixl: bytes
    mark: HostMark | None  # None: our pages are a GPU's, or UCX was told not to use shared memory


_metadata: Decoder[_Metadata] = Decoder(_Metadata)


@dataclass(slots=True, eq=False)
class _Handle:
    agent: str
    request: object | None  # nixl_xfer_handle; None: it ended in the call that wrote it
    num_bytes: int
    state: TransferState = TransferState.PENDING


@dataclass(frozen=True, slots=True)
class _Peer:
    """A connected agent: prepared descriptors of its pages and of ours, cut into the same pieces."""

    local: object  # nixl_prepped_dlist_handle
    remote: object
    num_pieces: int
    num_local_pages: int
    num_remote_pages: int
    piece_bytes: int  # of one page
    window: _PageWindow | None


@dataclass(frozen=True, slots=True)
class _PageWindow:
    """Our pages, and a peer's in its memory on this host."""

    window: HostWindow
    here: PageArea
    there: PageArea
    pieces: tuple[Piece, ...]

    def write_small(self, local_pages: Sequence[int], remote_pages: Sequence[int]) -> int | None:
        """None: the pieces are so large that each may be a call of its own. Raises OSError."""
        local, remote = np.asarray(local_pages, dtype=np.int32), np.asarray(remote_pages, dtype=np.int32)
        ours, theirs = paired_runs(self.here, local, self.there, remote, self.pieces)
        return self.window.write(ours, theirs) if ours[:, 1].mean() < SMALL_PIECE_BYTES else None


def load_api(packages: Sequence[str] = _PACKAGES) -> ModuleType:
    """NIXL's Python API, whichever wheel it came in. Raises ConfigError where there is none."""
    for package in packages:
        try:
            api = importlib.import_module(f"{package}._api")
        except ModuleNotFoundError as error:
            if error.name not in (package, f"{package}._api"):
                raise
            continue
        logging.getLogger("nixl").setLevel(logging.WARNING)  # it announces every agent on stdout
        return api
    raise ConfigError(
        "transfer.backend: nixl is not installed; pip install nixl-cu12==1.5.1 (nixl-cu13 for CUDA 13), "
        "or choose --transfer ucx"
    )


class NixlBackend:
    """One NIXL agent. Implements `TransferBackend`."""

    name = "nixl"

    def __init__(self, agent: str, *, use_host_memory: bool = True) -> None:
        """`use_host_memory`: let processes of this host that are allowed to write into our pages directly."""
        api = load_api()
        bindings = importlib.import_module(f"{api.__package__}._bindings")
        self._errors: tuple[type[Exception], ...] = tuple(
            value for key, value in vars(bindings).items() if key.startswith("nixl") and key.endswith("Error")
        )
        self.agent = agent
        self.telemetry_bytes = 0
        config = api.nixl_agent_config(enable_prog_thread=False, capture_telemetry=True, backends=["UCX"])
        with self._raising("making an agent", agent):
            self._nixl = api.nixl_agent(agent, config)
        self._marker = Marker() if use_host_memory else None
        self._pages: torch.Tensor | None = None
        self._registration: object = None
        self._local: dict[tuple[Piece, ...], object] = {}
        self._peers: dict[str, _Peer] = {}

    @contextmanager
    def _raising(self, what: str, peer: str) -> Iterator[None]:
        """NIXL's own exceptions as TransferError."""
        try:
            yield
        except self._errors as error:
            raise TransferError(f"{what} ({peer}): {error}", peer=peer) from error

    def register(self, pages: torch.Tensor, *, rank: int, tp_size: int, generation: int) -> RegionInfo:
        assert self._pages is None and pages.is_contiguous()
        with self._raising("registering the KV pages", self.agent):
            self._registration = self._nixl.register_memory(pages)
            metadata: bytes = self._nixl.get_agent_metadata()
        self._pages = pages
        mark = self._marker.mark if self._marker is not None and not pages.is_cuda else None
        return describe_region(
            pages,
            agent=self.agent,
            metadata=encode(_Metadata(nixl=metadata, mark=mark)),
            transport=self.name,
            rank=rank,
            tp_size=tp_size,
            generation=generation,
        )

    def connect(self, remote: RegionInfo, pieces: tuple[Piece, ...]) -> None:
        if remote.agent in self._peers:
            return
        assert self._pages is not None, "connect before register"
        try:
            metadata = _metadata.decode(remote.agent_metadata)
        except ProtocolError as error:
            raise TransferError(f"the metadata of {remote.agent}: {error}", peer=remote.agent) from error
        num_local = self._pages.shape[0] * self._pages.shape[1]
        num_remote = self._pages.shape[0] * remote.num_blocks
        with self._raising("connecting", remote.agent):
            agent = self._nixl.add_remote_agent(metadata.nixl)
            if agent != remote.agent.encode():
                self._nixl.remove_remote_agent(agent)
                raise TransferError(f"the metadata of {remote.agent} names {agent!r}", peer=remote.agent)
            offsets = [piece.remote_offset for piece in pieces]
            rows = _strided(pieces, offsets, remote.base_addr, remote.page_bytes, remote.device_id, num_remote)
            descriptors = self._nixl.prep_xfer_dlist(remote.agent, rows, remote.device)
            self._nixl.make_connection(remote.agent)  # else the first write waits for it
        piece_bytes = sum(piece.num_bytes for piece in pieces)
        local = self._local_descriptors(pieces, num_local)
        window = self._open_window(metadata.mark, remote, pieces)
        self._peers[remote.agent] = _Peer(local, descriptors, len(pieces), num_local, num_remote, piece_bytes, window)

    def _open_window(self, mark: HostMark | None, remote: RegionInfo, pieces: tuple[Piece, ...]) -> _PageWindow | None:
        assert self._pages is not None
        if mark is None or self._marker is None or self._pages.is_cuda:
            return None
        window = HostWindow.open(mark)
        if window is None:
            return None
        num_layers, num_blocks = self._pages.shape[:2]
        here = PageArea(self._pages.data_ptr(), _page_bytes(self._pages), num_layers * num_blocks)
        there = PageArea(remote.base_addr, remote.page_bytes, num_layers * remote.num_blocks)
        return _PageWindow(window, here, there, pieces)

    def _local_descriptors(self, pieces: tuple[Piece, ...], num_pages: int) -> object:
        """Shared by all peers that take the same pieces."""
        assert self._pages is not None
        if pieces not in self._local:
            page_bytes = _page_bytes(self._pages)
            device, device_id = ("VRAM", self._pages.device.index or 0) if self._pages.is_cuda else ("DRAM", 0)
            offsets = [piece.local_offset for piece in pieces]
            rows = _strided(pieces, offsets, self._pages.data_ptr(), page_bytes, device_id, num_pages)
            with self._raising("preparing our pages", self.agent):
                self._local[pieces] = self._nixl.prep_xfer_dlist("NIXL_INIT_AGENT", rows, device)
        return self._local[pieces]

    def write(
        self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int], notify: bytes = b""
    ) -> _Handle:
        peer = self._peers[agent]
        if peer.window is not None and not notify:  # NIXL sends a write's notification after what NIXL wrote
            num_bytes = self._write_small(agent, peer.window, local_pages, remote_pages)
            if num_bytes is not None:
                return _Handle(agent, None, num_bytes, TransferState.DONE)
        local = _indices(local_pages, peer.num_pieces, peer.num_local_pages)
        remote = _indices(remote_pages, peer.num_pieces, peer.num_remote_pages)
        with self._raising("writing", agent):
            request = self._nixl.make_prepped_xfer("WRITE", peer.local, local, peer.remote, remote, notify)
            handle = _Handle(agent, request, len(local_pages) * peer.piece_bytes)
            if self._nixl.transfer(request) == "ERR":
                raise TransferError(f"writing to {agent}: refused at the post", peer=agent)
        return handle

    def _write_small(
        self, agent: str, window: _PageWindow, local_pages: Sequence[int], remote_pages: Sequence[int]
    ) -> int | None:
        """Small pieces, together; the number of bytes. None: they are large."""
        try:
            num_bytes = window.write_small(local_pages, remote_pages)
        except OSError as error:
            raise TransferError(f"writing ({agent}): {error}", peer=agent) from error
        self.telemetry_bytes += num_bytes or 0
        return num_bytes

    def poll(self, handle: TransferHandle) -> TransferState:
        assert isinstance(handle, _Handle)
        if handle.state is TransferState.PENDING:
            try:
                state = self._nixl.check_xfer_state(handle.request)
                if state == "DONE":
                    self.telemetry_bytes += self._nixl.get_xfer_telemetry(handle.request).totalBytes
                    handle.state = TransferState.DONE
                elif state != "PROC":
                    handle.state = TransferState.FAILED
            except self._errors:
                handle.state = TransferState.FAILED
        return handle.state

    def release(self, handle: TransferHandle) -> None:
        assert isinstance(handle, _Handle)
        if handle.request is None:
            return
        with suppress(*self._errors):  # what cannot be given back now is NIXL's until the agent ends
            self._nixl.release_xfer_handle(handle.request)

    def notify(self, agent: str, payload: bytes) -> None:
        with self._raising("notifying", agent):
            self._nixl.send_notif(agent, payload)

    def notifications(self) -> list[tuple[str, bytes]]:
        with self._raising("reading notifications", self.agent):
            new: dict[str, list[bytes]] = self._nixl.get_new_notifs()
        return [(agent, payload) for agent, payloads in new.items() for payload in payloads]

    def disconnect(self, agent: str) -> None:
        peer = self._peers.pop(agent, None)
        if peer is not None:
            if peer.window is not None:
                peer.window.window.close()
            with self._raising("disconnecting", agent):
                self._nixl.release_dlist_handle(peer.remote)
                self._nixl.remove_remote_agent(agent)

    def close(self) -> None:
        if not hasattr(self, "_nixl"):
            return
        for agent in list(self._peers):
            self.disconnect(agent)
        for descriptors in self._local.values():
            self._nixl.release_dlist_handle(descriptors)
        self._local.clear()
        if self._registration is not None:
            self._nixl.deregister_memory(self._registration)
        self._registration = self._pages = None
        del self._nixl  # destroys the agent: whatever was still on its way to it goes nowhere


def _page_bytes(pages: torch.Tensor) -> int:
    return pages[0, 0].numel() * pages.element_size()


def _strided(
    pieces: tuple[Piece, ...], offsets: list[int], base_addr: int, page_bytes: int, device_id: int, num_pages: int
) -> np.ndarray:
    """One row per piece: (address, bytes, device, stride, count); piece k of page p has index k * num_pages + p."""
    rows = [
        (base_addr + offset, piece.num_bytes, device_id, page_bytes, num_pages)
        for piece, offset in zip(pieces, offsets, strict=True)
    ]
    return np.array(rows, dtype=np.uint64)


def _indices(pages: Sequence[int], num_pieces: int, num_pages: int) -> np.ndarray:
    """Indices of all pieces of `pages` in the prepared descriptors."""
    index = np.asarray(pages, dtype=np.int32)
    if num_pieces == 1:
        return index
    return (np.arange(num_pieces, dtype=np.int32)[:, None] * num_pages + index).ravel()
