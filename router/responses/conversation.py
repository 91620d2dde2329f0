"""A conversation as it is kept: its parts, each as JSON behind the lengths of all, and their checksums.

items      of the response itself, as it was answered
messages   what the model is told where it goes on, this answer at the end; empty: there is no answer (yet)
names      in the messages: those of namespaces' functions, and of custom tools
response   the whole of it
input      the items that it answers, earlier turns included
answer     the name of the kept answer that it was told from; empty: there is none
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from ...common.errors import RequestError
from ..turns.places import Message
from .tools import Names

_FORMAT = b"kvr3"  # of the file
_PARTS = ("items", "messages", "names", "response", "input", "answer")
# By format, how many parts it has, and how many of them a checksum. No other is read.
_NUMBERS = {_FORMAT: (6, 6), b"kvr2": (6, 0), b"kvr1": (4, 0)}
_HEADS = {form: struct.Struct(f"<{parts}I{checksums}I") for form, (parts, checksums) in _NUMBERS.items()}

Part = bytes | memoryview

_messages_of = msgspec.json.Decoder(list[Message]).decode
_names_of = msgspec.json.Decoder(Names).decode


class Asked(NamedTuple):
    """`Asked` is what a response answers, and from where it is told: known before there is an answer."""

    items: Part = b"[]"
    answer: str = ""


class Earlier(NamedTuple):
    """A conversation that goes on, with its last answer."""

    messages: Sequence[Message]
    names: Names
    items: bytes  # as JSON


@dataclass(slots=True, frozen=True)
class Conversation:
    """The parts as they are kept; each is decoded by who needs it."""

    items: Part
    messages: Part
    names: Part
    response: Part
    input: Part = b"[]"
    answer: Part = b""

    @property
    def asked(self) -> Asked:
        return Asked(self.input, bytes(self.answer).decode())

    def told(self, param: str) -> Earlier:
        """Return what a next turn goes on with. Raises RequestError (400), which names `param`, without an answer."""
        if not self.messages:
            text = f"{param}: the response has no answer (yet): it is under way, or was cancelled, or has failed"
            raise RequestError(text, param=param, code="response_not_completed")
        return Earlier(_messages_of(self.messages), _names_of(self.names), joined_arrays(self.input, self.items))

    def joined(self) -> bytes:
        parts = (self.items, self.messages, self.names, self.response, self.input, self.answer)
        return b"".join((_FORMAT, _HEADS[_FORMAT].pack(*map(len, parts), *map(zlib.crc32, parts)), *parts))

    @classmethod
    def parted(cls, data: memoryview, looked_at: Collection[str] = _PARTS) -> Conversation | None:
        """Return None for what is not whole, as a machine's crash may leave it: nothing waits for the disk.

        `looked_at`: parts that are held against their checksums.
        """
        form = bytes(data[: len(_FORMAT)])
        head = _HEADS.get(form)
        if head is None or len(data) < len(_FORMAT) + head.size:
            return None
        numbers, start = head.unpack_from(data, len(_FORMAT)), len(_FORMAT) + head.size
        num_parts, _ = _NUMBERS[form]
        lengths, checksums = numbers[:num_parts], numbers[num_parts:]
        if start + sum(lengths) != len(data):
            return None
        parts = []
        for length in lengths:
            parts.append(data[start : start + length])
            start += length
        summed = zip(_PARTS, parts, checksums, strict=False)  # earlier formats have none
        if any(name in looked_at and zlib.crc32(part) != checksum for name, part, checksum in summed):
            return None
        return cls(*parts)


def joined_arrays(*arrays: Part) -> bytes:
    """Return arrays of JSON as one, without a look at what is in them. They have no spaces around their elements."""
    return b"[%b]" % b",".join([bytes(array[1:-1]) for array in arrays if len(array) > len("[]")])
