"""The header of a GGUF file, walked once before the library `gguf` reads it: that believes every number in it.

    magic, version, number of tensors, number of fields
    fields: name, type, value            a value may be a list: type, length, items
    tensors: name, sizes, kind, place

What a count or a length claims must lie within the file, and so must each tensor's place. The library makes an object
of each item, so all items together are limited, too: memory is bounded before any is taken.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_ITEMS = 1 << 22  # fields, their lists' items and tensors: a large vocabulary has a million or so
_MAX_DIMENSIONS = 4  # ggml's
_SHOWN_BYTES = 128  # of a name, in messages
_STRING, _LIST = 8, 9
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of the types of numbers and flags
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def check_header(path: Path) -> None:
    """Refuse a file whose header cannot be true. Raises ValueError, which names the file and the place."""
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{path.name} does not begin as a GGUF file does")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(path.name, data).check()


class _Walk:
    """`_Walk` goes through one header."""

    def __init__(self, name: str, data: mmap.mmap) -> None:
        self._name, self._data, self._size = name, data, len(data)
        self._at = len(_MAGIC)
        self._where = "its counts"
        self._num_items = 0

    def check(self) -> None:
        version = self._number(_U32)
        if version & 0xFFFF == 0:
            raise ValueError(
                f"{self._name} is in big-endian byte order, which no machine of kvferry's has: take the model's file "
                "in little-endian order (without `be` in its name)"
            )
        if version not in _VERSIONS:
            raise ValueError(f"{self._name} is of GGUF's version {version}; {_VERSIONS[0]} and {_VERSIONS[1]} are read")
        num_tensors, num_fields = self._number(_U64), self._number(_U64)
        self._count(num_fields)
        self._count(num_tensors)
        for index in range(num_fields):
            self._where = f"field {index + 1} of {num_fields}"
            self._where = f"field {self._text()}"
            self._value()
        for index in range(num_tensors):
            self._where = f"tensor {index + 1} of {num_tensors}"
            self._where = f"tensor {self._text()}"
            self._tensor()

    def _value(self) -> None:
        kind, count = self._number(_U32), 1
        if kind == _LIST:
            kind, count = self._number(_U32), self._number(_U64)
            self._count(count)
        if kind == _STRING:
            for _ in range(count):
                self._skip(self._number(_U64))
        elif (size := _BYTES.get(kind)) is not None:
            self._skip(count * size)
        else:  # a list of lists among them, which llama.cpp does not read either
            raise ValueError(f"{self._name}: {self._where} is of type {kind}, which is not read here")

    def _tensor(self) -> None:
        """Check sizes; that all of them lie in the file is seen where they are mapped."""
        if (num_dimensions := self._number(_U32)) > _MAX_DIMENSIONS:
            raise ValueError(f"{self._name}: {self._where} has {num_dimensions} dimensions")
        self._skip(num_dimensions * _U64.size + _U32.size)
        if (place := self._number(_U64)) > self._size:
            raise ValueError(f"{self._name} ends before the place of {self._where}, {place}")

    def _text(self) -> str:
        length = self._number(_U64)
        start = self._at
        self._skip(length)
        return self._data[start : min(self._at, start + _SHOWN_BYTES)].decode(errors="replace")

    def _number(self, form: struct.Struct) -> int:
        start = self._at
        self._skip(form.size)
        found: int = form.unpack_from(self._data, start)[0]
        return found

    def _skip(self, num_bytes: int) -> None:
        self._at += num_bytes
        if self._at > self._size:
            raise ValueError(f"{self._name} ends within {self._where}: it was cut short, or claims too much")

    def _count(self, count: int) -> None:
        self._num_items += count
        if self._num_items > _MAX_ITEMS:
            raise ValueError(f"{self._name}: {self._where} claims {count} items; {_MAX_ITEMS} are read in all")
