"""An answer as it has been told so far, in a file that outlives the router which tells it.

    head         what the answer is one to, and what was drawn for it: seeds, lengths, name
    told, told   the tokens of one choice, in the order and the portions in which they became text

A record is written before its text is sent, in one call to the system: whoever finds the file after a death knows all
that a client may have seen. Portions are kept as they were, so that the same text is cut into the same events. A record
that is torn ends the log; what stands behind it was never told. Nothing waits for the disk: the file is for the death
of a process, not of a machine.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from ...common.request import SampledToken

MAX_BYTES = 32 * 2**20  # of one answer
_FRAME_BYTES = 8  # length and checksum of a record, before it
_MAX_PROMPTS = 2**16  # of one call, more than a body may have


class Head(msgspec.Struct, frozen=True, array_like=True):
    """The head of an answer: what another try is held against, and what it must find as it was."""

    asked: bytes  # digest of the request
    served: str  # which version of which model tells it
    answer_id: str
    created_s: int
    seeds: Annotated[tuple[int, ...], msgspec.Meta(max_length=_MAX_PROMPTS)]  # by prompt
    limits: Annotated[tuple[int, ...], msgspec.Meta(max_length=_MAX_PROMPTS)]  # tokens of an answer, by prompt


class Told(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A portion of one choice's answer, as it became text."""

    index: int  # of the choice in the whole answer
    tokens: tuple[SampledToken, ...]
    finish: str | None = None  # as the worker says, or a stop string; None: it goes on


_encode = msgspec.msgpack.Encoder().encode
_decode_head = msgspec.msgpack.Decoder(Head).decode
_decode_told = msgspec.msgpack.Decoder(Told).decode


class AnswerLog:
    """`AnswerLog` reads a file that this process has locked, and appends to it."""

    def __init__(self, fd: int) -> None:
        """Take over a descriptor, at the file's beginning. Raises OSError; a file that is none of ours is emptied."""
        self._fd = fd
        self.head: Head | None = None  # None: it is a new one
        self.told: list[Told] = []  # when it was opened
        self.num_bytes = 0
        data = _read(fd)
        try:
            for record in _records(data):
                if self.head is None:
                    self.head = _decode_head(record)
                else:
                    self.told.append(_decode_told(record))
                self.num_bytes += _FRAME_BYTES + len(record)
        except msgspec.MsgspecError:
            self.empty()
        if self.num_bytes < len(data):
            os.ftruncate(fd, self.num_bytes)

    def empty(self) -> None:
        """Forget what was told."""
        os.ftruncate(self._fd, 0)
        self.head, self.num_bytes = None, 0
        self.told.clear()

    def begin(self, head: Head) -> None:
        """Raises OSError."""
        self.head = head
        self._append(_encode(head))

    def add(self, told: Told) -> None:
        """Raises OSError, also where it has become too long."""
        self._append(_encode(told))

    def _append(self, record: bytes) -> None:
        frame = b"%b%b%b" % (len(record).to_bytes(4, "little"), zlib.crc32(record).to_bytes(4, "little"), record)
        if self.num_bytes + len(frame) > MAX_BYTES:
            raise OSError(f"the answer takes more than {MAX_BYTES} bytes")
        num_written = os.write(self._fd, frame)
        if num_written < len(frame):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.num_bytes += num_written

    def close(self) -> None:
        """Let go of the file, and of its lock."""
        os.close(self._fd)


def _read(fd: int) -> bytes:
    data = bytearray()
    while len(data) <= MAX_BYTES and (part := os.read(fd, 2**20)):
        data += part
    return bytes(data)


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the records that are whole, up to the first one that is not."""
    start = 0
    while start + _FRAME_BYTES <= len(data):
        length, checksum = (int.from_bytes(data[start + at : start + at + 4], "little") for at in (0, 4))
        start += _FRAME_BYTES
        record = data[start : start + length]
        if len(record) < length or zlib.crc32(record) != checksum:
            return
        yield record
        start += length


def has_told(path: Path) -> bool:
    """Tell whether the file of an answer has more than its head, without its lock. A torn record counts, too."""
    try:
        with path.open("rb", buffering=0) as file:
            length = int.from_bytes(file.read(4), "little")
            return os.fstat(file.fileno()).st_size > _FRAME_BYTES + length
    except OSError:
        return False
