"""Frames are how messages lie in a stream: 4 bytes of length (big endian) and that many bytes.

The length is checked before anything is read, so a peer can make us hold at most one frame.
"""

from __future__ import annotations

import asyncio

from ..common.errors import ProtocolError, WorkerLost
from ..common.request import MAX_CHOICES

DEFAULT_MAX_FRAME_BYTES = 1 << 20
READ_BUFFER_BYTES = 1 << 18  # asyncio stops reading a connection at twice as much
_FRAME_SLACK_BYTES = 1 << 17  # everything else that a message says, a grammar among it
_SIZE_BYTES = 4  # of a frame's size, before it


def max_frame_bytes(max_model_len: int) -> int:
    """Return the largest frame between router and worker: prompt and accepted tokens of every choice, 4 bytes each."""
    return max(DEFAULT_MAX_FRAME_BYTES, 4 * max_model_len * (1 + MAX_CHOICES) + _FRAME_SLACK_BYTES)


def size_prefix(num_bytes: int) -> bytes:
    """Return what stands before a frame of so many bytes."""
    return num_bytes.to_bytes(_SIZE_BYTES, "big")


class FrameReader:
    """Frames out of a stream: each is its size in four bytes, and as many bytes. One read may bring many."""

    def __init__(self, stream: asyncio.StreamReader, peer: str) -> None:
        self.peer = peer  # for error texts
        self._stream = stream
        self._received = b""  # what has come of frames that `next` has not returned, and before that what it has
        self._begin = 0  # of the next frame in it

    async def next(self, max_bytes: int) -> bytes:
        """Return the next frame. Raises ProtocolError for one that is larger, WorkerLost where the peer is gone."""
        while True:
            begin = self._begin + _SIZE_BYTES
            num_missing = begin - len(self._received)
            if num_missing <= 0:
                size = int.from_bytes(self._received[self._begin : begin], "big")
                if size > max_bytes:
                    text = f"{self.peer} announced a frame of {size} bytes, the bound is {max_bytes}"
                    raise ProtocolError(text, kind="size")
                num_missing += size
                if num_missing <= 0:
                    self._begin = begin + size
                    return self._received[begin : self._begin]
            await self._receive(num_missing)

    async def _receive(self, num_bytes: int) -> None:
        """Take what has come: of a small frame perhaps many more, of a large one the rest of it."""
        try:
            if num_bytes > READ_BUFFER_BYTES:
                data = await self._stream.readexactly(num_bytes)
            else:
                data = await self._stream.read(READ_BUFFER_BYTES)
                if not data:
                    raise asyncio.IncompleteReadError(data, num_bytes)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise WorkerLost(f"connection to {self.peer} ended: {error}") from error
        self._received, self._begin = self._received[self._begin :] + data, 0
