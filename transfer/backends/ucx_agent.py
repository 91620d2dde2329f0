"""A UCX worker as an agent: it carries frames and bytes between processes, and knows nothing of pages.

Frames are small messages (`ucx_frames.py`), which need no announcement. Bytes go under a tag of their own, which a
frame has named before, so that whoever takes them has a buffer ready.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...common.errors import ConfigError, ProtocolError, TransferError
from ...common.extras import UCXX
from ...wire.codec import encode
from .ucx_frames import UcxFrame, UcxHello, ucx_frames

if TYPE_CHECKING:
    from ucxx._lib.arr import Array
    from ucxx._lib.libucxx import UCXEndpoint, UCXRequest, UCXWorker

_FRAME_TAG = 1 << 56  # kind in the top byte; a frame's other bits are not used
_DATA_TAG = 2 << 56  # | 56 random bits, named by the UcxWrite or the UcxRead
_KIND_MASK = 0xFF << 56
_MAX_FRAME_BYTES = 8 << 20


@dataclass(slots=True, eq=False)
class _Sending:
    """A message under way; its buffer lives until it is sent."""

    request: UCXRequest
    buffer: object


@dataclass(slots=True, eq=False)
class IncomingBytes:
    """Bytes that are coming in under a tag."""

    staging: torch.Tensor  # [num_bytes] uint8
    _request: UCXRequest
    _error: type[Exception]  # UCX's

    @property
    def is_over(self) -> bool:
        """Tell whether they are here, or will not come."""
        return bool(self._request.completed)

    @property
    def are_here(self) -> bool:
        """Tell of bytes that are over whether they came."""
        try:
            self._request.check_error()
        except self._error:
            return False
        return True


class UcxAgent:
    """`UcxAgent` is one UCX worker after the other, with its endpoints: `start` makes one, `end` drops it."""

    def __init__(self) -> None:
        """Raises ConfigError where UCXX is not installed."""
        try:
            from ucxx._lib import libucxx
            from ucxx._lib.arr import Array
        except ImportError as error:
            raise ConfigError(f"transfer: {UCXX.missing}") from error
        logging.getLogger("ucx").setLevel(logging.ERROR)
        self.name = ""
        self.num_malformed = 0  # frames that no correct peer sends, dropped
        self._ucx = libucxx
        self._array: type[Array[object]] = Array
        self._worker: UCXWorker | None = None  # None: there is no agent now
        self._endpoints: dict[str, UCXEndpoint] = {}  # by the other agent's name
        self._sending: list[_Sending] = []
        self._frames: list[tuple[UCXRequest, torch.Tensor]] = []  # coming in

    def start(self, name: str) -> None:
        """Make an agent of this name. Raises TransferError where none can be made."""
        ucx = self._ucx
        self.name = name
        try:
            context = ucx.UCXContext({}, feature_flags=(ucx.Feature.TAG,))
            self._worker = ucx.UCXWorker(context, enable_delayed_submission=False, enable_python_future=False)
            self._check_reached(self._worker)
        except ucx.UCXError as error:
            self._worker = None
            raise TransferError(f"making an agent ({name}): {error}", peer=name) from error

    def _check_reached(self, worker: UCXWorker) -> None:
        """Raise UCX's error where the agent reaches not even itself, as without any interface that is up.

        UCX makes it all the same, and finds no interface later.
        """
        own = self._ucx.UCXAddress.create_from_buffer(self.address)
        worker.create_endpoint_from_worker_address(own, True)

    def end(self) -> None:
        """Endpoints are dropped, not closed: UCXX 0.52 crashes when an endpoint is closed after its peer died."""
        self._sending.clear()
        self._frames.clear()
        self._endpoints.clear()
        self._worker = None

    @property
    def is_there(self) -> bool:
        return self._worker is not None

    @property
    def address(self) -> bytes:
        """Return what others connect to."""
        assert self._worker is not None
        return bytes(self._worker.address.tobytes())

    # --- peers ------------------------------------------------------------------------------------------------

    def connect(self, agent: str, address: bytes) -> None:
        """Reach another agent, and tell it the way back. Raises TransferError."""
        self._open_endpoint(agent, address)
        self.send(agent, UcxHello(agent=self.name, address=self.address))

    def _open_endpoint(self, agent: str, address: bytes) -> None:
        if self._worker is None:
            raise TransferError(f"connecting ({agent}): no agent here", peer=agent, may_land=False)
        try:
            peer = self._ucx.UCXAddress.create_from_buffer(address)
            self._endpoints[agent] = self._worker.create_endpoint_from_worker_address(peer, True)
        except (self._ucx.UCXError, ValueError) as error:
            raise TransferError(f"connecting ({agent}): {error}", peer=agent) from error

    def reaches(self, agent: str) -> bool:
        endpoint = self._endpoints.get(agent)
        return endpoint is not None and bool(endpoint.alive)

    def forget(self, agent: str) -> None:
        self._endpoints.pop(agent, None)

    # --- out ----------------------------------------------------------------------------------------------------

    def send(self, agent: str, frame: UcxFrame) -> None:
        """Send a frame. Raises TransferError where the agent is not reached."""
        data = torch.frombuffer(bytearray(encode(frame)), dtype=torch.uint8)
        assert data.numel() <= _MAX_FRAME_BYTES, data.numel()
        self._post(agent, data, _FRAME_TAG)

    def send_bytes(self, agent: str, data: torch.Tensor, tag: int) -> None:
        """Send bytes, [num_bytes] uint8, to a peer that knows the tag (56 bits). Raises TransferError."""
        self._post(agent, data, _DATA_TAG | tag)

    def _post(self, agent: str, data: torch.Tensor, tag: int) -> None:
        try:
            if not self.reaches(agent):
                raise TransferError(f"agent {agent} is not reached", peer=agent)
            request = self._endpoints[agent].tag_send(self._buffer(data), self._ucx.UCXXTag(tag))
        except self._ucx.UCXError as error:
            raise TransferError(f"sending ({agent}): {error}", peer=agent) from error
        self._sending.append(_Sending(request, data))

    def _buffer(self, data: torch.Tensor) -> Array[object]:
        if data.is_cuda:
            torch.cuda.current_stream(data.device).synchronize()  # UCX reads it outside the stream
            return self._array(data)
        return self._array(data.numpy())

    # --- in -----------------------------------------------------------------------------------------------------

    def receive_bytes(self, num_bytes: int, tag: int, device: torch.device) -> IncomingBytes:
        """Take bytes that a peer sends under this tag."""
        assert self._worker is not None
        staging = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        request = self._worker.tag_recv(self._buffer(staging), self._ucx.UCXXTag(_DATA_TAG | tag))
        return IncomingBytes(staging, request, self._ucx.UCXError)

    def progress(self, on_frame: Callable[[UcxFrame], None]) -> None:
        """Let bytes move, and hand out each frame that is here. A hello is the agent's own."""
        if self._worker is None:
            return
        self._worker.progress()
        self._match_frames(self._worker)
        coming, self._frames = self._frames, []
        for request, data in coming:
            if request.completed:
                self._read_frame(request, data, on_frame)
            else:
                self._frames.append((request, data))
        self._sending = [sending for sending in self._sending if not sending.request.completed]

    def _match_frames(self, worker: UCXWorker) -> None:
        """Begin to receive what has been announced."""
        mask = self._ucx.UCXXTagMask(_KIND_MASK)
        while (probe := worker.tag_probe(self._ucx.UCXXTag(_FRAME_TAG), mask, remove=True)).matched:
            if probe.length <= _MAX_FRAME_BYTES:
                data = torch.empty(probe.length, dtype=torch.uint8)
                self._frames.append((worker.tag_recv_with_handle(self._buffer(data), probe), data))

    def _read_frame(self, request: UCXRequest, data: torch.Tensor, on_frame: Callable[[UcxFrame], None]) -> None:
        """A malformed frame is dropped: its sender cannot be told."""
        try:
            request.check_error()
            frame = ucx_frames.decode(data.numpy().tobytes())
            if isinstance(frame, UcxHello):
                self._on_hello(frame)
            else:
                on_frame(frame)
        except (self._ucx.UCXError, ProtocolError):
            self.num_malformed += 1

    def _on_hello(self, hello: UcxHello) -> None:
        """Take the way back, unless there is one: over one that is broken nothing is answered."""
        if not self.reaches(hello.agent):
            self._drop_dead()
            with contextlib.suppress(TransferError):  # it is gone again
                self._open_endpoint(hello.agent, hello.address)

    def _drop_dead(self) -> None:
        """Forget agents that ended: nobody here asked for their endpoints, so nobody says when they may go.

        What is still being sent over one keeps it until UCX has given that up.
        """
        self._endpoints = {agent: endpoint for agent, endpoint in self._endpoints.items() if endpoint.alive}
