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
lands, and neither does a read that the reader has given up. Page numbers and sizes are checked by the target before
anything is received or sent.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...common.errors import ConfigError, ProtocolError, TransferError
from ...common.extras import UCXX
from ...wire.codec import encode
from ...wire.fields import Message
from ...wire.grants import RegionInfo
from .base import Piece, TransferHandle, TransferState, describe_region, page_rows, rotated_name
from .ucx_frames import UcxAck, UcxHello, UcxNote, UcxRead, UcxWrite, ucx_frames

if TYPE_CHECKING:
    from ucxx._lib.arr import Array
    from ucxx._lib.libucxx import UCXEndpoint, UCXRequest, UCXWorker

_FRAME_TAG = 1 << 56  # kind in the top byte; a frame's other bits are not used
_DATA_TAG = 2 << 56  # | 56 random bits, named by the UcxWrite
_KIND_MASK = 0xFF << 56
_MAX_FRAME_BYTES = 8 << 20
_MAX_WRITE_BYTES = 256 << 20


@dataclass(slots=True, eq=False)
class _Handle:
    agent: str
    write_id: int
    num_bytes: int
    is_read: bool = False
    state: TransferState = TransferState.PENDING


@dataclass(slots=True, eq=False)
class _Sending:
    """A message under way; its buffer lives until it is sent."""

    agent: str
    request: UCXRequest
    buffer: object


@dataclass(slots=True, eq=False)
class _Receiving:
    """Bytes of a write that are coming in."""

    write: UcxWrite
    request: UCXRequest
    staging: torch.Tensor  # [num_bytes] uint8


@dataclass(slots=True, eq=False)
class _Reading:
    """Bytes of a read of ours that are coming in."""

    handle: _Handle
    request: UCXRequest
    staging: torch.Tensor  # [num_bytes] uint8
    pages: list[int]  # ours
    runs: tuple[tuple[int, int], ...]  # (offset in our page, bytes)


class UcxBackend:
    """One UCX worker. Implements `TransferBackend`."""

    name = "ucx"
    copies_itself = False  # the target copies

    def __init__(self, agent: str) -> None:
        try:
            from ucxx._lib import libucxx
            from ucxx._lib.arr import Array
        except ImportError as error:
            raise ConfigError(f"transfer: {UCXX.missing}") from error
        logging.getLogger("ucx").setLevel(logging.ERROR)
        self.agent = agent
        self.telemetry_bytes = 0
        self.num_malformed = 0  # frames that no correct peer sends, dropped
        self._ucx = libucxx
        self._array: type[Array[object]] = Array
        self._worker: UCXWorker | None = None  # None: there is no agent now
        self._start_agent()
        self._pages: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None  # [num_pages, page_bytes] uint8, our pages
        self._rank, self._tp_size = 0, 1
        self._endpoints: dict[str, UCXEndpoint] = {}
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        self._handles: dict[int, _Handle] = {}
        self._sending: list[_Sending] = []
        self._frames: list[tuple[UCXRequest, torch.Tensor]] = []  # coming in
        self._receiving: list[_Receiving] = []
        self._reading: list[_Reading] = []
        self._given_up: list[_Reading] = []  # failed; their buffers are UCX's as long as its worker lives
        self._inbox: list[tuple[str, bytes]] = []

    def _start_agent(self) -> None:
        ucx = self._ucx
        try:
            context = ucx.UCXContext({}, feature_flags=(ucx.Feature.TAG,))
            self._worker = ucx.UCXWorker(context, enable_delayed_submission=False, enable_python_future=False)
        except ucx.UCXError as error:
            raise TransferError(f"making an agent ({self.agent}): {error}", peer=self.agent) from error

    def register(self, pages: torch.Tensor, *, rank: int, tp_size: int, generation: int) -> RegionInfo:
        self._pages, self._rows = pages, page_rows(pages)
        self._rank, self._tp_size = rank, tp_size
        return self._region(generation)

    def rotate(self, generation: int) -> RegionInfo:
        """Bytes reach our pages only through the old agent's progress, which nobody makes any more."""
        self._end_agent()
        self.agent = rotated_name(self.agent, generation)
        self._start_agent()
        return self._region(generation)

    def _region(self, generation: int) -> RegionInfo:
        assert self._pages is not None and self._worker is not None
        return describe_region(
            self._pages,
            agent=self.agent,
            metadata=bytes(self._worker.address.tobytes()),
            transport=self.name,
            rank=self._rank,
            tp_size=self._tp_size,
            generation=generation,
        )

    def connect(self, remote: RegionInfo, pieces: tuple[Piece, ...]) -> None:
        if remote.agent in self._pieces:
            return
        self._open_endpoint(remote.agent, remote.agent_metadata)
        self._pieces[remote.agent] = pieces
        assert self._worker is not None
        self._send(remote.agent, UcxHello(agent=self.agent, address=bytes(self._worker.address.tobytes())))

    def _open_endpoint(self, agent: str, address: bytes) -> None:
        if self._worker is None:
            raise TransferError(f"connecting ({agent}): there is no agent here", peer=agent)
        try:
            peer = self._ucx.UCXAddress.create_from_buffer(address)
            self._endpoints[agent] = self._worker.create_endpoint_from_worker_address(peer, True)
        except (self._ucx.UCXError, ValueError) as error:
            raise TransferError(f"connecting ({agent}): {error}", peer=agent) from error

    # --- writing ----------------------------------------------------------------------------------------------

    def write(
        self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int], notify: bytes = b""
    ) -> _Handle:
        assert self._rows is not None
        runs = self._pieces.get(agent)
        if runs is None:
            raise TransferError(f"agent {agent} is not connected", peer=agent)
        staging = self._gather(local_pages, [(piece.local_offset, piece.num_bytes) for piece in runs])
        handle = _Handle(agent, secrets.randbits(48), staging.numel())
        self._handles[handle.write_id] = handle
        self._send(
            agent,
            UcxWrite(
                agent=self.agent,
                write_id=handle.write_id,
                pages=tuple(remote_pages),
                runs=tuple((piece.remote_offset, piece.num_bytes) for piece in runs),
                notify=notify,
            ),
        )
        self._post(agent, staging, _DATA_TAG | handle.write_id)
        return handle

    def _send(self, agent: str, frame: Message) -> None:
        data = torch.frombuffer(bytearray(encode(frame)), dtype=torch.uint8)
        assert data.numel() <= _MAX_FRAME_BYTES, data.numel()
        self._post(agent, data, _FRAME_TAG)

    def _post(self, agent: str, data: torch.Tensor, tag: int) -> None:
        endpoint = self._endpoints.get(agent)
        try:
            if endpoint is None or not endpoint.alive:
                raise TransferError(f"agent {agent} is not reached", peer=agent)
            request = endpoint.tag_send(self._buffer(data), self._ucx.UCXXTag(tag))
        except self._ucx.UCXError as error:
            raise TransferError(f"sending ({agent}): {error}", peer=agent) from error
        self._sending.append(_Sending(agent, request, data))

    def _buffer(self, data: torch.Tensor) -> Array[object]:
        if data.is_cuda:
            torch.cuda.current_stream(data.device).synchronize()  # UCX reads it outside the stream
            return self._array(data)
        return self._array(data.numpy())

    def poll(self, handle: TransferHandle) -> TransferState:
        assert isinstance(handle, _Handle)
        if handle.state is TransferState.PENDING:
            self._progress()
            endpoint = self._endpoints.get(handle.agent)
            if handle.state is TransferState.PENDING and (endpoint is None or not endpoint.alive):
                handle.state = TransferState.FAILED
        return handle.state

    def release(self, handle: TransferHandle) -> None:
        assert isinstance(handle, _Handle)
        self._handles.pop(handle.write_id, None)

    # --- reading ----------------------------------------------------------------------------------------------

    def read(self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int]) -> _Handle:
        assert self._rows is not None
        pieces = self._pieces.get(agent)
        if pieces is None or self._worker is None:
            raise TransferError(f"agent {agent} is not connected", peer=agent, may_land=False)
        num_bytes = len(local_pages) * sum(piece.num_bytes for piece in pieces)
        handle = _Handle(agent, secrets.randbits(48), num_bytes, is_read=True)
        staging = torch.empty(num_bytes, dtype=torch.uint8, device=self._rows.device)
        request = self._worker.tag_recv(self._buffer(staging), self._ucx.UCXXTag(_DATA_TAG | handle.write_id))
        runs = tuple((piece.local_offset, piece.num_bytes) for piece in pieces)
        reading = _Reading(handle, request, staging, list(local_pages), runs)
        self._reading.append(reading)
        self._handles[handle.write_id] = handle
        asked = UcxRead(
            agent=self.agent,
            read_id=handle.write_id,
            pages=tuple(int(page) for page in remote_pages),
            runs=tuple((piece.remote_offset, piece.num_bytes) for piece in pieces),
        )
        try:
            self._send(agent, asked)
        except TransferError as error:
            handle.state = TransferState.FAILED  # the receive stays posted: nothing will come
            self.release(handle)
            error.may_land = False
            raise
        return handle

    def _take_in(self, reading: _Reading) -> bool:
        """Scatter a read's bytes into our pages once they are here. True: it is over."""
        handle = reading.handle
        if handle.state is TransferState.PENDING and reading.request.completed:
            try:
                reading.request.check_error()
            except self._ucx.UCXError:
                handle.state = TransferState.FAILED
            else:
                self._scatter(reading.pages, reading.runs, reading.staging)
                handle.state = TransferState.DONE
                self.telemetry_bytes += handle.num_bytes
        if handle.state is TransferState.FAILED and not reading.request.completed:
            self._given_up.append(reading)
        return handle.state is not TransferState.PENDING

    def _serve_read(self, read: UcxRead) -> None:
        """Once: what comes later of these pages is another read's."""
        num_bytes = len(read.pages) * sum(size for _, size in read.runs)
        if self._rows is None or not self._fits(read) or not 0 < num_bytes <= _MAX_WRITE_BYTES:
            with contextlib.suppress(TransferError):
                self._send(read.agent, UcxAck(write_id=read.read_id, num_bytes=0))
            return
        with contextlib.suppress(TransferError):  # the reader is gone
            self._post(read.agent, self._gather(read.pages, read.runs), _DATA_TAG | read.read_id)

    def _gather(self, pages: Sequence[int], runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The runs of these pages of ours, one after the other."""
        assert self._rows is not None
        index = torch.tensor(pages, device=self._rows.device)
        return torch.cat([self._rows[index, offset : offset + size].reshape(-1) for offset, size in runs])

    def _scatter(self, pages: Sequence[int], runs: Sequence[tuple[int, int]], staging: torch.Tensor) -> int:
        """The reverse. Returns the number of bytes."""
        assert self._rows is not None
        index, start = torch.tensor(pages, device=self._rows.device), 0
        for offset, size in runs:
            end = start + len(pages) * size
            self._rows[index, offset : offset + size] = staging[start:end].view(-1, size)
            start = end
        if self._rows.is_cuda:
            torch.cuda.current_stream(self._rows.device).synchronize()
        return start

    # --- progress: frames in, pages written, messages out -----------------------------------------------------------

    def notify(self, agent: str, payload: bytes) -> None:
        self._send(agent, UcxNote(agent=self.agent, payload=payload))

    def notifications(self) -> list[tuple[str, bytes]]:
        self._progress()
        inbox, self._inbox = self._inbox, []
        return inbox

    def _progress(self) -> None:
        if self._worker is None:
            return
        self._worker.progress()
        self._match_frames(self._worker)
        coming, self._frames = self._frames, []
        for request, data in coming:
            if request.completed:
                self._read_frame(request, data)
            else:
                self._frames.append((request, data))
        self._receiving = [receiving for receiving in self._receiving if not self._apply(receiving)]
        self._reading = [reading for reading in self._reading if not self._take_in(reading)]
        self._sending = [sending for sending in self._sending if not sending.request.completed]

    def _match_frames(self, worker: UCXWorker) -> None:
        """Begin to receive what has been announced."""
        mask = self._ucx.UCXXTagMask(_KIND_MASK)
        while (probe := worker.tag_probe(self._ucx.UCXXTag(_FRAME_TAG), mask, remove=True)).matched:
            if probe.length <= _MAX_FRAME_BYTES:
                data = torch.empty(probe.length, dtype=torch.uint8)
                self._frames.append((worker.tag_recv_with_handle(self._buffer(data), probe), data))

    def _read_frame(self, request: UCXRequest, data: torch.Tensor) -> None:
        """A malformed frame is dropped: its sender cannot be told."""
        try:
            request.check_error()
            self._on_frame(ucx_frames.decode(data.numpy().tobytes()))
        except (self._ucx.UCXError, ProtocolError):
            self.num_malformed += 1

    def _on_frame(self, frame: Message) -> None:
        match frame:
            case UcxHello(agent=agent, address=address):
                if agent not in self._endpoints:
                    with contextlib.suppress(TransferError):  # it is gone again
                        self._open_endpoint(agent, address)
            case UcxWrite():
                self._receive(frame)
            case UcxRead():
                self._serve_read(frame)
            case UcxAck(write_id=write_id, num_bytes=num_bytes):
                self._on_ack(write_id, num_bytes)
            case UcxNote(agent=agent, payload=payload):
                self._inbox.append((agent, payload))

    def _on_ack(self, write_id: int, num_bytes: int) -> None:
        handle = self._handles.get(write_id)
        if handle is not None and handle.is_read:  # a read ends with its bytes: this one is refused
            handle.state = TransferState.FAILED
        elif handle is not None:
            handle.state = TransferState.DONE if num_bytes else TransferState.FAILED
            self.telemetry_bytes += num_bytes

    def _receive(self, write: UcxWrite) -> None:
        num_bytes = len(write.pages) * sum(size for _, size in write.runs)
        if self._rows is None or not self._fits(write) or not 0 < num_bytes <= _MAX_WRITE_BYTES:
            self._answer(write, 0)
            return
        staging = torch.empty(num_bytes, dtype=torch.uint8, device=self._rows.device)
        tag = self._ucx.UCXXTag(_DATA_TAG | write.write_id)
        assert self._worker is not None
        request = self._worker.tag_recv(self._buffer(staging), tag)
        self._receiving.append(_Receiving(write, request, staging))

    def _fits(self, frame: UcxWrite | UcxRead) -> bool:
        assert self._rows is not None
        num_pages, page_bytes = self._rows.shape
        return all(page < num_pages for page in frame.pages) and all(
            offset + size <= page_bytes for offset, size in frame.runs
        )

    def _apply(self, receiving: _Receiving) -> bool:
        """Scatter a write into the pages once its bytes are here. True: it is over."""
        if not receiving.request.completed:
            return False
        try:
            receiving.request.check_error()
        except self._ucx.UCXError:
            return True
        write = receiving.write
        num_bytes = self._scatter(write.pages, write.runs, receiving.staging)
        if write.notify:
            self._inbox.append((write.agent, write.notify))
        self._answer(write, num_bytes)
        return True

    def _answer(self, write: UcxWrite, num_bytes: int) -> None:
        with contextlib.suppress(TransferError):  # the writer is gone: nobody waits for the answer
            self._send(write.agent, UcxAck(write_id=write.write_id, num_bytes=num_bytes))

    def disconnect(self, agent: str) -> None:
        self._pieces.pop(agent, None)
        self._endpoints.pop(agent, None)

    def _end_agent(self) -> None:
        """Endpoints are dropped, not closed: UCXX 0.52 crashes when an endpoint is closed after its peer died."""
        for handle in self._handles.values():
            if handle.state is TransferState.PENDING:
                handle.state = TransferState.FAILED
        self._handles.clear()
        self._receiving.clear()
        self._reading.clear()
        self._given_up.clear()
        self._sending.clear()
        self._frames.clear()
        self._inbox.clear()
        self._endpoints.clear()
        self._pieces.clear()
        self._worker = None

    def close(self) -> None:
        self._end_agent()
        self._pages = self._rows = None
