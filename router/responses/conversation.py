"""A conversation as it is kept: its parts, each as JSON behind the lengths of all.

items      of the response itself, as it was answered
messages   what the model is told where it goes on, this answer at the end; empty: there is no answer (yet)
names      in the messages: those of namespaces' functions, and of custom tools
response   the whole of it
input      the items that it answers, earlier turns included
answer     the name of the kept answer that it was told from; empty: there is none
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from ...common.errors import RequestError
from ..turns.places import Message
from .tools import Names

_FORMAT = b"kvr2"  # of the file
_NUM_PARTS = {_FORMAT: 6, b"kvr1": 4}  # by format; the earlier one ends with the response, and no other is read
_LENGTHS = {form: struct.Struct(f"<{number}I") for form, number in _NUM_PARTS.items()}

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
        return b"".join((_FORMAT, _LENGTHS[_FORMAT].pack(*map(len, parts)), *parts))

    @classmethod
    def parted(cls, data: memoryview) -> Conversation | None:
        """Return None for what is not whole, as a machine's crash may leave it."""
        packed = _LENGTHS.get(bytes(data[: len(_FORMAT)]))
        if packed is None or len(data) < len(_FORMAT) + packed.size:
            return None
        lengths, start = packed.unpack_from(data, len(_FORMAT)), len(_FORMAT) + packed.size
        if start + sum(lengths) != len(data):
            return None
        parts = []
        for length in lengths:
            parts.append(data[start : start + length])
            start += length
        return cls(*parts)


def joined_arrays(*arrays: Part) -> bytes:
    """Return arrays of JSON as one, without a look at what is in them. They have no spaces around their elements."""
    return b"[%b]" % b",".join([bytes(array[1:-1]) for array in arrays if len(array) > len("[]")])
