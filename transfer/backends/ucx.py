"""UcxBackend: the same protocol over UCXX, where NIXL is missing.

UCXX's Python binding has tagged messages but no remote put and get, so both are emulated: the target's own poll copies
a write into the registered pages, and a read out of them.

    writer                                          target
    UcxHello (our address) ────────────────────────>  an endpoint back to us
    UcxWrite (pages, runs, tag) ───────────────────>  posts a receive for the tag
    the bytes, gathered into one buffer ─────────>  scatters them into its pages
    DONE <───────────────────────────────── UcxAck    delivers the write's notification

    reader                                          target
    UcxRead (pages, runs, tag) ────────────────────>  gathers them into one buffer, once
    scatters them into its pages <──────── the bytes

Hence both advance only while the target polls, a write that the target has not applied when its agent is closed never
lands, and neither does a read that the reader has given up. The target's side is in `ucx_target.py`, what carries both
in `ucx_agent.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...common.errors import TransferError
from ...wire.grants import RegionInfo
from .base import Piece, TransferHandle, TransferState, describe_region, rotated_name
from .reach import Reach, tell_lack
from .ucx_agent import IncomingBytes, UcxAgent
from .ucx_frames import UcxAck, UcxFrame, UcxNote, UcxRead, UcxWrite
from .ucx_pages import Runs, UcxPages
from .ucx_target import UcxTarget


@dataclass(slots=True, eq=False)
class _Handle:
    agent: str
    write_id: int
    num_bytes: int
    state: TransferState = TransferState.PENDING


@dataclass(slots=True, eq=False)
class _Reading:
    """Bytes of a read of ours that are coming in."""

    handle: _Handle
    incoming: IncomingBytes
    pages: list[int]  # ours
    runs: Runs


class UcxBackend:
    """The writer's and the reader's side, and a target beside it. Implements `TransferBackend`."""

    name = "ucx"
    copies_itself = False  # the target copies

    def __init__(self, agent: str) -> None:
        self.agent = agent
        self.telemetry_bytes = 0
        self._own = UcxAgent()
        self._own.start(agent)
        self._target = UcxTarget(self._own)
        self._reach = Reach()
        self._rank, self._tp_size = 0, 1
        self._pieces: dict[str, tuple[Piece, ...]] = {}  # of connected agents
        self._handles: dict[int, _Handle] = {}
        self._reading: list[_Reading] = []
        self._given_up: list[_Reading] = []  # ended early; their buffers are UCX's as long as its worker lives

    @property
    def _pages(self) -> UcxPages:
        """Return ours, once they are registered: others write where we gather from."""
        assert self._target.pages is not None
        return self._target.pages

    @property
    def lacks_devices(self) -> bool:
        return not self._reach.is_whole

    def register(self, pages: torch.Tensor, *, rank: int, tp_size: int, generation: int) -> RegionInfo:
        self._target.pages = UcxPages(pages)
        self._rank, self._tp_size = rank, tp_size
        return self._region(generation)

    def rotate(self, generation: int) -> RegionInfo:
        """Bytes reach our pages only through the old agent's progress, which nobody makes any more."""
        self._end_agent()
        self.agent = rotated_name(self.agent, generation)
        self._own.start(self.agent)
        return self._region(generation)

    def _region(self, generation: int) -> RegionInfo:
        address = self._own.address
        if not self._reach.take(address):
            tell_lack(self.agent)
        return describe_region(
            self._pages.pages,
            agent=self.agent,
            metadata=address,
            transport=self.name,
            rank=self._rank,
            tp_size=self._tp_size,
            generation=generation,
        )

    def connect(self, remote: RegionInfo, pieces: tuple[Piece, ...]) -> None:
        if remote.agent in self._pieces and self._own.reaches(remote.agent):
            return
        self._fail_all(remote.agent)  # of a connection that has broken
        self._own.connect(remote.agent, remote.agent_metadata)
        self._pieces[remote.agent] = pieces

    def disconnect(self, agent: str) -> None:
        self._pieces.pop(agent, None)
        self._own.forget(agent)

    def _fail_all(self, agent: str | None = None) -> None:
        """Fail what is under way to an agent, which will not be answered; None: to any."""
        for handle in self._handles.values():
            if handle.state is TransferState.PENDING and agent in (None, handle.agent):
                handle.state = TransferState.FAILED

    def _end_agent(self) -> None:
        self._fail_all()
        self._handles.clear()
        self._target.clear()
        self._reading.clear()
        self._given_up.clear()
        self._pieces.clear()
        self._own.end()

    def close(self) -> None:
        self._end_agent()
        self._target.pages = None

    # --- writing and reading ----------------------------------------------------------------------------------

    def write(
        self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int], notify: bytes = b""
    ) -> _Handle:
        pieces = self._pieces.get(agent)
        if pieces is None:
            raise TransferError(f"agent {agent} is not connected", peer=agent)
        data = self._pages.gather(local_pages, _local_runs(pieces))
        handle = _Handle(agent, secrets.randbits(48), data.numel())
        told = UcxWrite(
            agent=self.agent,
            write_id=handle.write_id,
            pages=tuple(remote_pages),
            runs=_remote_runs(pieces),
            notify=notify,
        )
        self._own.send(agent, told)
        self._own.send_bytes(agent, data, handle.write_id)
        self._handles[handle.write_id] = handle  # one whose post raised has nobody who releases it
        return handle

    def read(self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int]) -> _Handle:
        pieces = self._pieces.get(agent)
        if pieces is None or not self._own.is_there:
            raise TransferError(f"agent {agent} is not connected", peer=agent, may_land=False)
        num_bytes = len(local_pages) * sum(piece.num_bytes for piece in pieces)
        handle = _Handle(agent, secrets.randbits(48), num_bytes)
        incoming = self._own.receive_bytes(num_bytes, handle.write_id, self._pages.device)
        self._reading.append(_Reading(handle, incoming, list(local_pages), _local_runs(pieces)))
        self._handles[handle.write_id] = handle
        asked = UcxRead(
            agent=self.agent,
            read_id=handle.write_id,
            pages=tuple(int(page) for page in remote_pages),
            runs=_remote_runs(pieces),
        )
        try:
            self._own.send(agent, asked)
        except TransferError as error:
            handle.state = TransferState.FAILED  # the receive stays posted: nothing will come
            self.release(handle)
            error.may_land = False
            raise
        return handle

    def poll(self, handle: TransferHandle) -> TransferState:
        assert isinstance(handle, _Handle)
        if handle.state is TransferState.PENDING:
            self._progress()
            if handle.state is TransferState.PENDING and not self._own.reaches(handle.agent):
                handle.state = TransferState.FAILED
        return handle.state

    def release(self, handle: TransferHandle) -> None:
        assert isinstance(handle, _Handle)
        self._handles.pop(handle.write_id, None)

    def _take_in(self, reading: _Reading) -> bool:
        """Scatter a read's bytes into our pages once they are here. True: it is over."""
        handle, incoming = reading.handle, reading.incoming
        if handle.state is TransferState.PENDING and incoming.is_over:
            if incoming.are_here:
                self._pages.scatter(reading.pages, reading.runs, incoming.staging)
                handle.state = TransferState.DONE
                self.telemetry_bytes += handle.num_bytes
            else:
                handle.state = TransferState.FAILED
        is_over = handle.state is not TransferState.PENDING
        if is_over and not incoming.is_over:  # whatever the target says of them: they may still come
            self._given_up.append(reading)
        return is_over

    # --- progress: frames in, pages written, messages out -----------------------------------------------------------

    def notify(self, agent: str, payload: bytes) -> None:
        self._own.send(agent, UcxNote(agent=self.agent, payload=payload))

    def notifications(self) -> list[tuple[str, bytes]]:
        self._progress()
        inbox, self._target.inbox = self._target.inbox, []
        return inbox

    def _progress(self) -> None:
        if not self._own.is_there:
            return
        self._own.progress(self._on_frame)
        self._target.apply()
        self._reading = [reading for reading in self._reading if not self._take_in(reading)]

    def _on_frame(self, frame: UcxFrame) -> None:
        match frame:
            case UcxWrite():
                self._target.on_write(frame)
            case UcxRead():
                self._target.on_read(frame)
            case UcxAck(write_id=write_id, num_bytes=num_bytes):
                self._on_ack(write_id, num_bytes)
            case UcxNote(agent=agent, payload=payload):
                self._target.inbox.append((agent, payload))

    def _on_ack(self, write_id: int, num_bytes: int) -> None:
        """Take the end of a write, or the refusal of a read, which else ends with its bytes."""
        handle = self._handles.get(write_id)
        if handle is not None:
            handle.state = TransferState.DONE if num_bytes else TransferState.FAILED
            self.telemetry_bytes += num_bytes


def _local_runs(pieces: tuple[Piece, ...]) -> Runs:
    return tuple((piece.local_offset, piece.num_bytes) for piece in pieces)


def _remote_runs(pieces: tuple[Piece, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((piece.remote_offset, piece.num_bytes) for piece in pieces)
