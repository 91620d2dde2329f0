"""UcxBackend: the same protocol over UCXX, where NIXL is missing.

UCXX's Python binding has tagged messages but no remote put, so a write is emulated: the target's own poll copies
it into the registered pages.

    writer                                          target
    UcxHello (our address) ────────────────────────>  an endpoint back to us
    UcxWrite (pages, runs, tag) ───────────────────>  posts a receive for the tag
    the bytes, gathered into one buffer ─────────>  scatters them into its pages
    DONE <───────────────────────────────── UcxAck    delivers the write's notification

Hence a write advances only while the target polls, and a write that the target has not applied when its agent is
closed never lands. Page numbers and sizes are checked by the target before anything is received.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..common.errors import ConfigError, ProtocolError, TransferError
from ..common.messages import Message, RegionInfo, encode
from .base import Piece, TransferHandle, TransferState, describe_region, page_rows, rotated_name
from .ucx_frames import UcxAck, UcxHello, UcxNote, UcxWrite, ucx_frames

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


class UcxBackend:
    """One UCX worker. Implements `TransferBackend`."""

    name = "ucx"
    copies_itself = False  # the target copies

    def __init__(self, agent: str) -> None:
        try:
            from ucxx._lib import libucxx
            from ucxx._lib.arr import Array
        except ImportError as error:
            raise ConfigError(
                "transfer.backend: ucx needs UCXX, which is not installed: pip install 'kvferry[ucx]' (ucxx-cu12)"
            ) from error
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
        index = torch.tensor(local_pages, device=self._rows.device)
        staging = torch.cat(
            [self._rows[index, piece.local_offset : piece.local_offset + piece.num_bytes].reshape(-1) for piece in runs]
        )
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
            case UcxAck(write_id=write_id, num_bytes=num_bytes):
                handle = self._handles.get(write_id)
                if handle is not None:
                    handle.state = TransferState.DONE if num_bytes else TransferState.FAILED
                    self.telemetry_bytes += num_bytes
            case UcxNote(agent=agent, payload=payload):
                self._inbox.append((agent, payload))

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

    def _fits(self, write: UcxWrite) -> bool:
        assert self._rows is not None
        num_pages, page_bytes = self._rows.shape
        return all(page < num_pages for page in write.pages) and all(
            offset + size <= page_bytes for offset, size in write.runs
        )

    def _apply(self, receiving: _Receiving) -> bool:
        """Scatter a write into the pages once its bytes are here. True: it is over."""
        assert self._rows is not None
        if not receiving.request.completed:
            return False
        try:
            receiving.request.check_error()
        except self._ucx.UCXError:
            return True
        write, start = receiving.write, 0
        index = torch.tensor(write.pages, device=self._rows.device)
        for offset, size in write.runs:
            end = start + len(write.pages) * size
            self._rows[index, offset : offset + size] = receiving.staging[start:end].view(-1, size)
            start = end
        if self._rows.is_cuda:
            torch.cuda.current_stream(self._rows.device).synchronize()
        if write.notify:
            self._inbox.append((write.agent, write.notify))
        self._answer(write, start)
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
        self._sending.clear()
        self._frames.clear()
        self._inbox.clear()
        self._endpoints.clear()
        self._pieces.clear()
        self._worker = None

    def close(self) -> None:
        self._end_agent()
        self._pages = self._rows = None
