"""Vectors as bytes: float32 in little-endian order, as embeddings cross the wire and go out as base64.

Pure Python: neither a role nor a router knows a tensor, and a few thousand values take less than a millisecond, once
for each chunk of a prompt and each answer.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterable


def add(total: bytes, part: bytes) -> bytes:
    """Return the sum of two vectors; an empty one is nothing."""
    if not total or not part:
        return total or part
    return _pack(one + other for one, other in zip(values_of(total), values_of(part), strict=True))


def unit(vector: bytes) -> bytes | None:
    """Return the vector scaled to length 1; None where it has no direction: zero, or not finite."""
    values = values_of(vector)
    length = math.sqrt(math.fsum(value * value for value in values))
    if not length or not math.isfinite(length):
        return None
    return _pack(value / length for value in values)


def values_of(vector: bytes) -> array[float]:
    values = array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _pack(values: Iterable[float]) -> bytes:
    packed = array("f", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
