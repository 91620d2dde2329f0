"""Tensors of a GGUF file, as a checkpoint has them: by name, in the order of its rows, unstacked.

A matrix of blocks is a row of them for each output. Blocks lie within a row, so rows are moved, and experts taken
apart, without a look into blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from gguf import ReaderTensor

    Array = npt.NDArray[np.generic]

_ROWS_AT_ONCE = 4096  # of a tensor, dequantized to float32: bounds the memory that a conversion takes
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}
PLAIN = ("F32", "F16", "BF16")  # safetensors' names, GGUF's too


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file, and what makes its bytes."""

    name: str
    dtype: str  # safetensors' name of its type: blocks are bytes
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Array]]  # one after the other, in the order of rows
    kind: str = ""  # of its blocks; empty: plain numbers
    widened_from: str = ""  # the kind of the file's blocks, where plain numbers take their place

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a tensor of the file: all of it, or one expert's matrix."""

    name: str
    rows: Array  # [outputs, ...], blocks or numbers as the file has them
    kind: str
    shape: tuple[int, ...]  # in numbers

    @classmethod
    def whole(cls, source: ReaderTensor) -> Part:
        return cls(source.name, source.data, str(source.tensor_type.name), shape_of(source))

    def of_experts(self) -> list[Part]:
        return [Part(self.name, rows, self.kind, self.shape[1:]) for rows in self.rows]

    def as_row(self) -> Part:
        """Return a vector as the one row of a matrix."""
        return replace(self, rows=self.rows[None], shape=(1, *self.shape))

    def some_rows(self, start: int, count: int) -> Part:
        return replace(self, rows=self.rows[start : start + count], shape=(count, *self.shape[1:]))

    def rows_of_experts(self, start: int, count: int) -> Part:
        """Return some rows of each expert's matrix."""
        rows, shape = self.rows[:, start : start + count], (self.shape[0], count, *self.shape[2:])
        return replace(self, rows=rows, shape=shape)

    def numbers(self) -> npt.NDArray[np.float32]:
        """Return what the blocks stand for. Raises ValueError for a kind that nobody here reads."""
        from gguf import GGMLQuantizationType, quants

        try:
            found: npt.NDArray[np.float32] = quants.dequantize(self.rows, GGMLQuantizationType[self.kind])
        except NotImplementedError as error:
            raise ValueError(f"{self.name} is {self.kind}, which cannot be read") from error
        return found


def shape_of(source: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(source.shape))  # GGUF: fastest dimension first


def stored(part: Part, name: str, kept: Collection[str], *, may_widen: bool = False) -> StoredTensor:
    """Return a part as it is, or in bfloat16 where no kind is `kept`, or where it `may_widen` and its own is not.

    Raises ValueError for another kind.
    """
    if kept and part.kind in PLAIN:
        return StoredTensor(name, part.kind, part.shape, partial(_as_it_is, part))
    if part.kind in kept:
        return StoredTensor(name, "U8", part.rows.shape, partial(_as_it_is, part), kind=part.kind)
    if kept and not may_widen:
        raise ValueError(f"{part.name} is {part.kind}; these are read: {', '.join([*kept, *PLAIN])}")
    return StoredTensor(name, "BF16", part.shape, partial(_widened, part), widened_from=part.kind)


def _as_it_is(part: Part) -> Iterator[Array]:
    for rows in _chunks(part):
        yield bytes_of(rows.rows)


def _widened(part: Part) -> Iterator[Array]:
    for rows in _chunks(part):
        yield to_bfloat16(rows.numbers())


def _chunks(part: Part) -> Iterator[Part]:
    for start in range(0, len(part.rows), _ROWS_AT_ONCE):
        rows = part.rows[start : start + _ROWS_AT_ONCE]
        yield Part(part.name, rows, part.kind, (len(rows), *part.shape[1:]))


def bytes_of(values: Array) -> npt.NDArray[np.uint8]:
    import numpy as np

    return np.ascontiguousarray(values).view(np.uint8)


def undo_permutation(part: Part, num_heads: int) -> Part:
    """llama.cpp interleaves the two rotary halves of each head's rows; Hugging Face keeps one half after the other."""
    rows = part.rows
    if len(rows) % (2 * num_heads):
        raise ValueError(f"{part.name} has {len(rows)} rows, which are no {num_heads} heads")
    interleaved = rows.reshape(num_heads, len(rows) // num_heads // 2, 2, *rows.shape[1:])
    return replace(part, rows=interleaved.swapaxes(1, 2).reshape(rows.shape))


def chained(parts: Sequence[Part], name: str, kept: Collection[str]) -> StoredTensor:
    """Return the rows of some parts one behind another: as they are, or in bfloat16 where they are of several kinds."""
    kinds = {part.kind for part in parts}
    own = [stored(part, name, kept if len(kinds) == 1 else (), may_widen=True) for part in parts]
    shape = (sum(each.shape[0] for each in own), *own[0].shape[1:])
    return replace(own[0], shape=shape, pieces=lambda: (piece for each in own for piece in each.pieces()))


def with_columns(part: Part, name: str, kept: Collection[str], places: Sequence[int]) -> StoredTensor:
    """Return a matrix whose columns, in as many spans of one size as `places` has, stand in their order.

    It becomes bfloat16 where a block lies in two spans.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    is_cut = part.shape[1] // len(places) % GGML_QUANT_SIZES[GGMLQuantizationType[part.kind]][0]
    found = stored(part, name, () if is_cut else kept, may_widen=True)
    return replace(found, pieces=lambda: map(partial(_columns, places), found.pieces()))


def _columns(places: Sequence[int], rows: Array) -> Array:
    spans = rows.reshape(len(rows), len(places), -1)
    return spans[:, list(places)].reshape(rows.shape)


def computed(
    part: Part, name: str, shape: tuple[int, ...], change: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
) -> StoredTensor:
    """Return numbers of `shape` that are made of a part's, all at once: of vectors and their like."""
    return StoredTensor(name, "F32", shape, partial(_computed, part, change))


def _computed(part: Part, change: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]) -> Iterator[Array]:
    import numpy as np

    yield np.ascontiguousarray(change(part.numbers()), np.float32)


def less(part: Part, name: str, offset: float) -> StoredTensor:
    """Return numbers that stand `offset` lower than in the file."""
    return computed(part, name, part.shape, lambda numbers: numbers - offset)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16, ties to even, of finite values."""
    import numpy as np

    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    bits = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
    return (bits >> 16).astype(np.uint16)
