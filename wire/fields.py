"""Bounded types of which messages are made, and their base."""

from __future__ import annotations

from typing import Annotated

import msgspec

from ..common.adapter import MAX_ADAPTERS
from ..common.request import MAX_CHOICES, SampledToken

Name = Annotated[str, msgspec.Meta(max_length=256)]
MAX_TEXT = 4096  # characters: what may be longer is cut by who sends it
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Nonce = Annotated[bytes, msgspec.Meta(max_length=64)]
Choice = Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHOICES)]
Choices = Annotated[tuple[Choice, ...], msgspec.Meta(max_length=MAX_CHOICES)]
# No length of a list is left open: a frame of a few bytes for each element would become many times its size.
Tokens = Annotated[tuple[SampledToken, ...], msgspec.Meta(max_length=4096)]
Counts = Annotated[tuple[tuple[Name, Count], ...], msgspec.Meta(max_length=64)]
Checksums = Annotated[bytes, msgspec.Meta(max_length=2**22)]
DraftState = Annotated[bytes, msgspec.Meta(max_length=2**16)]  # a hidden state or two
Vector = Annotated[bytes, msgspec.Meta(min_length=4, max_length=2**18)]  # float32, little endian
BlockIds = Annotated[tuple[Count, ...], msgspec.Meta(max_length=2**19)]
Labels = Annotated[tuple[tuple[Name, Name], ...], msgspec.Meta(max_length=64)]
Hashes = Annotated[bytes, msgspec.Meta(max_length=2**22)]  # 16 bytes each
Digests = Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_ADAPTERS)]
Logprobs = Annotated[tuple[float, ...], msgspec.Meta(max_length=64)]
U64 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]  # random or an address; msgspec bounds are signed


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag=True):
    """Base of the wire messages; the type's name is the tag."""
