"""Matrices as C++ reads them: packed into tiles, described field by field as in `native/`.

    Packer(library)(weight)   takes the weight's numbers over, and gives their description and the memory it points to

In which order a packed matrix lies is known to the C++ alone (`native/machine/tiles.hpp`,
`native/products/integer_tiles.hpp`).
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.experts import Gate
from ..nn.layers import Linear
from ..weights.grouped import GroupedWeight
from ..weights.weight import DenseWeight
from .compiler import NativeUnavailable
from .factors import halves, smallest

_INTEGER_SIZES = ("columns", "inputs", "bits", "group", "has_minima", "factor_size", "span", "is_e2m1")
_TILE_OUTPUTS = 64
_GROUP_UNIT = 8  # inputs of which a group is made, if it is not a whole row


class IntegerTiles(ctypes.Structure):
    """The C++ `IntegerTiles`: a matrix of whole numbers."""

    _fields_ = [
        ("memory", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in _INTEGER_SIZES),
    ]


class _IntegerMatrix(ctypes.Structure):
    _fields_ = [("numbers", ctypes.c_void_p), ("factors", ctypes.c_void_p * 2), ("bases", ctypes.c_void_p * 2)]


class Tiles(ctypes.Structure):
    """The C++ `Tiles`: a matrix, of elements or else of `integers`."""

    _fields_ = [
        ("weights", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("pairs", ctypes.c_int64),
        ("integers", ctypes.POINTER(IntegerTiles)),
    ]


class Packed(NamedTuple):
    """A packed matrix."""

    tiles: Tiles
    memory: tuple[object, ...]  # what `tiles` points to


def check_known(linear: Linear, dtype: torch.dtype) -> DenseWeight | GroupedWeight:
    """Return the linear's weight if there is C++ for it in a model of this type. Raises NativeUnavailable."""
    weight, reason = linear.weight, ""
    if type(weight) is DenseWeight:
        is_known = weight.dtype == dtype or type(linear) is Gate  # a gate's is rounded when it is packed
        if is_known and weight.plain.device.type == "cpu":
            return weight
    elif type(weight) is GroupedWeight:
        size = weight.group_size
        is_size_known = size % _GROUP_UNIT == 0 or size == weight.num_inputs
        if is_size_known and weight.dtype == dtype == torch.bfloat16 and weight.numbers.device.type == "cpu":
            return weight
        reason = f", {size} inputs to a group"
    raise NativeUnavailable(f"no C++ for {linear.name} in {weight.dtype} as {type(weight).__name__}{reason}")


class Packer:
    """Packs matrices by the library's functions."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        """`dtype`: the type of the library's elements."""
        self._dtype = dtype
        self._size, self._pack = library.kvferry_tiled_size, library.kvferry_pack
        self._size.restype, self._size.argtypes = ctypes.c_long, [ctypes.c_long, ctypes.c_long]
        self._pack.restype = Tiles
        self._pack.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_void_p]
        self._integers_size, self._pack_integers = library.kvferry_integers_size, library.kvferry_pack_integers
        self._integers_size.restype = ctypes.c_long
        self._integers_size.argtypes = [ctypes.POINTER(IntegerTiles)]
        self._pack_integers.argtypes = [ctypes.POINTER(IntegerTiles), ctypes.POINTER(_IntegerMatrix), ctypes.c_void_p]

    def __call__(self, weight: DenseWeight | GroupedWeight, *, in_turns: bool = False) -> Packed:
        """Pack the numbers, which the weight is without from now on; see `Linear.in_turns`."""
        if isinstance(weight, GroupedWeight):
            return self._grouped(weight.take(), in_turns)
        matrix = weight.take().to(self._dtype)
        return self._dense(two_apart(matrix) if in_turns else matrix)

    def heads(self, matrices: Tensor) -> Packed:
        """Pack matrices [heads, outputs, inputs] one behind the other; each fills tiles of its own, of which some
        outputs may be zeros.
        """
        return self._dense(F.pad(matrices, (0, 0, 0, -matrices.shape[1] % _TILE_OUTPUTS)).flatten(0, 1).contiguous())

    def _dense(self, matrix: Tensor) -> Packed:
        assert matrix.is_contiguous()
        memory = torch.empty(self._size(*matrix.shape), dtype=self._dtype)
        return Packed(self._pack(matrix.data_ptr(), *matrix.shape, memory.data_ptr()), (memory,))

    def _grouped(self, weight: GroupedWeight, in_turns: bool) -> Packed:
        numbers, order = weight.numbers.contiguous(), weight.order
        found = [weight.scales] if weight.minima is None else [weight.scales, weight.minima]
        if in_turns:
            numbers, found = two_apart(numbers), [two_apart(values) for values in found]
        factors = halves(found[0]) if weight.is_e2m1 else smallest(found)
        integers = IntegerTiles(
            order=address(order),
            columns=weight.num_outputs,
            inputs=weight.num_inputs,
            bits=weight.bits,
            group=weight.group_size,
            has_minima=weight.minima is not None,
            factor_size=factors.values[0].itemsize,
            span=factors.span,
            is_e2m1=weight.is_e2m1,
        )
        matrix = _IntegerMatrix(address(numbers), _addresses(factors.values), _addresses(factors.bases))
        memory = torch.empty(self._integers_size(ctypes.byref(integers)), dtype=torch.uint8)
        integers.memory = memory.data_ptr()
        self._pack_integers(ctypes.byref(integers), ctypes.byref(matrix), memory.data_ptr())
        tiles = Tiles(columns=weight.num_outputs, integers=ctypes.pointer(integers))
        return Packed(tiles, (integers, memory, order))


def two_apart(rows: Tensor) -> Tensor:
    """Copy rows of two kinds in turns to those of the first before those of the second."""
    return torch.cat((rows[::2], rows[1::2]))


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _addresses(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * 2)(*map(address, tensors))
