"""UcxBackend: the same protocol over UCXX, where NIXL is missing.

UCXX's Python binding has tagged messages but no remote put, so a write is emulated: the target's own poll copies
it into the registered pages.

    writer                                          target
    _Hello (our address) ────────────────────────>  an endpoint back to us
    _Write (pages, runs, tag) ───────────────────>  posts a receive for the tag
    the bytes, gathered into one buffer ─────────>  scatters them into its pages
    DONE <───────────────────────────────── _Ack    delivers the write's notification

Hence a write advances only while the target polls, and a write that the target has not applied when its agent is
closed never lands. Page numbers and sizes are checked by the target before anything is received.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec
import torch

from ..common.errors import ConfigError, ProtocolError, TransferError
from ..common.messages import Count, Decoder, Message, Name, RegionInfo, encode
from .base import Piece, TransferHandle, TransferState, describe_region, page_rows

if TYPE_CHECKING:
    from ucxx._lib.arr import Array
    from ucxx._lib.libucxx import UCXEndpoint, UCXRequest

_FRAME_TAG = 1 << 56  # kind in the top byte; a frame's other bits are not used
_DATA_TAG = 2 << 56  # | 56 random bits, named by the _Write
_KIND_MASK = 0xFF << 56
_MAX_FRAME_BYTES = 8 << 20
_MAX_WRITE_BYTES = 256 << 20


class _Hello(Message, frozen=True):
    agent: Name
    address: Annotated[bytes, msgspec.Meta(max_length=65536)]


class _Write(Message, frozen=True):
    agent: Name
    write_id: Count  # 48 random bits
    pages: tuple[Count, ...]
    runs: tuple[tuple[Count, Count], ...]  # (offset in the page, bytes)
    notify: bytes = b""


class _Ack(Message, frozen=True):
    write_id: Count
    num_bytes: Count  # applied; 0: refused


class _Note(Message, frozen=True):
    agent: Name
    payload: bytes


_decoder: Decoder[_Hello | _Write | _Ack | _Note] = Decoder(_Hello | _Write | _Ack | _Note)


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

    write: _Write
    request: UCXRequest
    staging: torch.Tensor  # [num_bytes] uint8


class UcxBackend:
    """One UCX worker. Implements `TransferBackend`."""

    name = "ucx"

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
        self._context = libucxx.UCXContext({}, feature_flags=(libucxx.Feature.TAG,))
        self._worker = libucxx.UCXWorker(self._context, enable_delayed_submission=False, enable_python_future=False)
        self._rows: torch.Tensor | None = None  # [num_pages, page_bytes] uint8, our pages
        self._endpoints: dict[str, UCXEndpoint] = {}
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        self._handles: dict[int, _Handle] = {}
        self._sending: list[_Sending] = []
        self._frames: list[tuple[UCXRequest, torch.Tensor]] = []  # coming in
        self._receiving: list[_Receiving] = []
        self._inbox: list[tuple[str, bytes]] = []

    def register(self, pages: torch.Tensor, *, rank: int, tp_size: int, generation: int) -> RegionInfo:
        self._rows = page_rows(pages)
        return describe_region(
            pages,
            agent=self.agent,
            metadata=bytes(self._worker.address.tobytes()),
            transport=self.name,
            rank=rank,
            tp_size=tp_size,
            generation=generation,
        )

    def connect(self, remote: RegionInfo, pieces: tuple[Piece, ...]) -> None:
        if remote.agent in self._pieces:
            return
        self._open_endpoint(remote.agent, remote.agent_metadata)
        self._pieces[remote.agent] = pieces
        self._send(remote.agent, _Hello(agent=self.agent, address=bytes(self._worker.address.tobytes())))

    def _open_endpoint(self, agent: str, address: bytes) -> None:
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
        runs = self._pieces[agent]
        index = torch.tensor(local_pages, device=self._rows.device)
        staging = torch.cat(
            [self._rows[index, piece.local_offset : piece.local_offset + piece.num_bytes].reshape(-1) for piece in runs]
        )
        handle = _Handle(agent, secrets.randbits(48), staging.numel())
        self._handles[handle.write_id] = handle
        self._send(
            agent,
            _Write(
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
        self._send(agent, _Note(agent=self.agent, payload=payload))

    def notifications(self) -> list[tuple[str, bytes]]:
        self._progress()
        inbox, self._inbox = self._inbox, []
        return inbox

    def _progress(self) -> None:
        self._worker.progress()
        self._match_frames()
        coming, self._frames = self._frames, []
        for request, data in coming:
            if request.completed:
                self._read_frame(request, data)
            else:
                self._frames.append((request, data))
        self._receiving = [receiving for receiving in self._receiving if not self._apply(receiving)]
        self._sending = [sending for sending in self._sending if not sending.request.completed]

    def _match_frames(self) -> None:
        """Begin to receive what has been announced."""
        mask = self._ucx.UCXXTagMask(_KIND_MASK)
        while (probe := self._worker.tag_probe(self._ucx.UCXXTag(_FRAME_TAG), mask, remove=True)).matched:
            if probe.length <= _MAX_FRAME_BYTES:
                data = torch.empty(probe.length, dtype=torch.uint8)
                self._frames.append((self._worker.tag_recv_with_handle(self._buffer(data), probe), data))

    def _read_frame(self, request: UCXRequest, data: torch.Tensor) -> None:
        """A malformed frame is dropped: its sender cannot be told."""
        try:
            request.check_error()
            self._on_frame(_decoder.decode(data.numpy().tobytes()))
        except (self._ucx.UCXError, ProtocolError):
            self.num_malformed += 1

    def _on_frame(self, frame: Message) -> None:
        match frame:
            case _Hello(agent=agent, address=address):
                if agent not in self._endpoints:
                    with contextlib.suppress(TransferError):  # it is gone again
                        self._open_endpoint(agent, address)
            case _Write():
                self._receive(frame)
            case _Ack(write_id=write_id, num_bytes=num_bytes):
                handle = self._handles.get(write_id)
                if handle is not None:
                    handle.state = TransferState.DONE if num_bytes else TransferState.FAILED
                    self.telemetry_bytes += num_bytes
            case _Note(agent=agent, payload=payload):
                self._inbox.append((agent, payload))

    def _receive(self, write: _Write) -> None:
        num_bytes = len(write.pages) * sum(size for _, size in write.runs)
        if self._rows is None or not self._fits(write) or not 0 < num_bytes <= _MAX_WRITE_BYTES:
            self._answer(write, 0)
            return
        staging = torch.empty(num_bytes, dtype=torch.uint8, device=self._rows.device)
        tag = self._ucx.UCXXTag(_DATA_TAG | write.write_id)
        request = self._worker.tag_recv(self._buffer(staging), tag)
        self._receiving.append(_Receiving(write, request, staging))

    def _fits(self, write: _Write) -> bool:
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

    def _answer(self, write: _Write, num_bytes: int) -> None:
        with contextlib.suppress(TransferError):  # the writer is gone: nobody waits for the answer
            self._send(write.agent, _Ack(write_id=write.write_id, num_bytes=num_bytes))

    def disconnect(self, agent: str) -> None:
        self._pieces.pop(agent, None)
        self._endpoints.pop(agent, None)

    def close(self) -> None:
        """Endpoints are dropped, not closed: UCXX 0.52 crashes when an endpoint is closed after its peer died."""
        self._handles.clear()
        self._receiving.clear()
        self._sending.clear()
        self._frames.clear()
        self._endpoints.clear()
        self._pieces.clear()
        self._rows = None
