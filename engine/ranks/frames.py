"""Whole frames between rank 0 and a follower, over a socket pair.

A frame is one byte of kind, four of length and so many bytes; nothing is pickled. What the bytes of a kind mean is said
beside it; the owner's mean nothing here.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from enum import IntEnum

import msgspec

from ...common.config import LogFormat, LogLevel
from ...common.errors import KVFerryError

_FRAME = struct.Struct("<BI")
_TIME = struct.Struct("@ll")  # the system's timeval


class FrameKind(IntEnum):
    START = 0  # to a follower: StartFollower
    STEP = 1  # to a follower: a StepPlan
    USER = 2  # both ways: the owner's bytes
    CLOSE = 3  # to a follower: end in good order
    HELLO = 4  # from a follower: it runs
    FAILED = 5  # from a follower: why it ends
    DISK = 6  # to a follower: a DiskTask; from it: the DiskResult
    ADAPTER = 7  # to a follower: an AdapterTask; from it: the AdapterResult
    BROKE = 8  # from a follower: it ends, as another rank is gone
    OPEN_DISK = 9  # to a follower: the DiskSet that its file is to be of; from it: whether there was one, a bool


class FollowerLogs(msgspec.Struct, frozen=True, kw_only=True):
    """`FollowerLogs` say how a follower logs: as its worker does, with its rank in each line."""

    level: LogLevel
    format: LogFormat
    worker_id: str


class StartFollower(msgspec.Struct, frozen=True, kw_only=True):
    """All that a follower needs to build its engine."""

    engine_config: str  # EngineConfig as JSON
    tp_rank: int
    tp_size: int
    store_port: int
    num_blocks: int | None
    handler: str  # "module:function" that makes its FollowerHandler; empty: none
    handler_config: bytes
    logs: FollowerLogs | None = None


class FrameSocket:
    """Whole frames over a stream socket. One thread receives; any thread may send."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._send_lock = threading.Lock()

    def set_timeout(self, seconds: float | None) -> None:
        """Set how long `receive` waits within a frame before it takes the other side for gone."""
        self._sock.settimeout(seconds)

    def limit_sends(self, seconds: float) -> None:
        """Take the other side for gone where it makes no room for a frame within so long. For sends that follow."""
        whole = int(seconds)
        self._sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIME.pack(whole, round((seconds - whole) * 1_000_000))
        )

    def send(self, kind: FrameKind, payload: bytes = b"") -> None:
        """Raises OSError when the other side is gone."""
        with self._send_lock:
            self._sock.sendall(_FRAME.pack(kind, len(payload)) + payload)

    def receive(self) -> tuple[FrameKind, bytes] | None:
        """Return the next frame; None at the end of the stream, also in the middle of a frame."""
        try:
            head = self._exactly(_FRAME.size)
            if head is None:
                return None
            kind, length = _FRAME.unpack(head)
            payload = self._exactly(length)
        except OSError:
            return None
        return None if payload is None else (FrameKind(kind), payload)

    def _exactly(self, count: int) -> bytes | None:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            received = self._sock.recv_into(view)
            if received == 0:
                return None
            view = view[received:]
        return bytes(data)

    def shutdown(self) -> None:
        """Wake a thread that receives."""
        with contextlib.suppress(OSError):  # the other side closed first
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


def describe(error: BaseException) -> str:
    """Describe an error as a follower reports it."""
    return str(error) if isinstance(error, KVFerryError) else f"{type(error).__name__}: {error}"
