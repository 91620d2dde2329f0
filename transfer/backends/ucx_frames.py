"""Frames that two `UcxAgent`s send each other, beside the bytes of writes."""

from __future__ import annotations

from typing import Annotated

import msgspec

from ...wire.codec import Decoder
from ...wire.fields import Count, Message, Name


class UcxHello(Message, frozen=True):
    """The way back."""

    agent: Name
    address: Annotated[bytes, msgspec.Meta(max_length=65536)]


class UcxWrite(Message, frozen=True):
    """Bytes follow, under a tag with `write_id`."""

    agent: Name
    write_id: Count  # 48 random bits
    pages: tuple[Count, ...]
    runs: tuple[tuple[Count, Count], ...]  # (offset in the page, bytes)
    notify: bytes = b""


class UcxRead(Message, frozen=True):
    """Send these bytes, under a tag with `read_id`; a UcxAck of 0 bytes says that they are not sent."""

    agent: Name
    read_id: Count  # 48 random bits
    pages: tuple[Count, ...]
    runs: tuple[tuple[Count, Count], ...]


class UcxAck(Message, frozen=True):
    """The bytes of a write are in the pages."""

    write_id: Count
    num_bytes: Count  # applied; 0: refused


class UcxNote(Message, frozen=True):
    """A notification of its own."""

    agent: Name
    payload: bytes


UcxFrame = UcxHello | UcxWrite | UcxRead | UcxAck | UcxNote
ucx_frames: Decoder[UcxFrame] = Decoder(UcxFrame)
