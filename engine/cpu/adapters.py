"""Adapters as C++ reads them: strips of 16 columns, as in `native/products/adapters.hpp`.

What an adapter holds lies in the order in which a step reads it, without gaps whatever the rank, in pages of 2 MiB
where the kernel has them: a decode step takes as long as reading it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..nn.layers import Linear
from ..weights.slot_matrices import AdapterWeights, LinearPart, Pair

_STRIP = 16
_TILE_INPUTS = 32  # what a linear's inputs are padded to
_HUGE_PAGE_BYTES = 2 << 20
_HUGE_FROM_BYTES = 64 << 20  # below, what is lost to whole pages would be seen, and few are read
MAX_PARTS = 3  # of one linear


class _AdapterPart(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("down", "up", "ranks")),
        *((name, ctypes.c_int64) for name in ("first", "outputs", "pairs")),
    ]


class _Adapters(ctypes.Structure):
    _fields_ = [("parts", _AdapterPart * MAX_PARTS), ("num_parts", ctypes.c_int64), ("max_rank", ctypes.c_int64)]


class _StoredMatrix(ctypes.Structure):
    """The C++ `StoredMatrix`: one as an adapter's file has it."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("is_float32", "columns", "inputs", "stride")),
        ("scale", ctypes.c_double),
    ]


def whole_strips(columns: int) -> int:
    return -(-columns // _STRIP) * _STRIP


def _num_columns(part: LinearPart) -> int:
    return whole_strips(part.num_outputs)


class SlotMemory:
    """Memory of adapters on the host, which slots point to: pieces with room for the largest one each.

    As many as slots are there, and touched, from the start: pages that a load is the first to touch take longer than
    reading its file. A piece serves the next adapter when neither a slot nor the host's cache has its last one.
    """

    def __init__(self, library: ctypes.CDLL, num_slots: int, dtype: torch.dtype) -> None:
        """`dtype`: the type of the library's elements."""
        self.library, self.num_slots, self.dtype = library, num_slots, dtype
        self.write_strips = library.kvferry_write_strips
        self.write_strips.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_void_p)
        self.write_strips.restype = None
        self.piece_size = 0  # values
        self._free: list[Tensor] = []
        self._rest = torch.empty(0, dtype=dtype)

    def make(self, linear: Linear, *, num_slots: int, max_rank: int, device: torch.device) -> StripAdapters:
        """Make a linear's matrices; `allocate` follows when all are made."""
        assert num_slots == self.num_slots and device.type == "cpu", device
        return StripAdapters(linear, self, max_rank)

    def allocate(self) -> None:
        memory = _huge_pages(self.num_slots * self.piece_size, self.dtype).zero_()
        self._free = list(memory.view(self.num_slots, self.piece_size))

    def begin(self, weights: AdapterWeights) -> None:
        """Let what is taken next be of these weights, as long as they are there."""
        self._rest = self._free.pop() if self._free else _huge_pages(self.piece_size, self.dtype)
        weakref.finalize(weights, self._give_back, self._rest)

    def _give_back(self, piece: Tensor) -> None:
        if len(self._free) < self.num_slots:
            self._free.append(piece)

    def take(self, columns: int, inputs: int) -> Tensor:
        """Return room for a matrix of whole strips: [columns / 16, inputs / 2, 16 pairs of inputs, a column's each]."""
        taken, self._rest = self._rest[: columns * inputs], self._rest[columns * inputs :]
        return taken.view(columns // _STRIP, inputs // 2, 2 * _STRIP)


def _huge_pages(count: int, dtype: torch.dtype) -> Tensor:
    """Return so many values."""
    num_bytes = dtype.itemsize * count
    if num_bytes < _HUGE_FROM_BYTES:
        return torch.empty(count, dtype=dtype)
    area = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        area.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE_BYTES
    return whole[start : start + num_bytes].view(dtype)


class _PartSlots:
    """`_PartSlots` say where each slot's matrices of one part are, and of which rank."""

    __slots__ = ("down", "ranks", "up")

    def __init__(self, num_slots: int) -> None:
        self.down = (ctypes.c_void_p * num_slots)()
        self.up = (ctypes.c_void_p * num_slots)()
        self.ranks = (ctypes.c_int32 * num_slots)()


class StripAdapters:
    """Implements `nn.adapters.SlotMatrices`: a linear's matrices of all slots, where `described` says."""

    def __init__(self, linear: Linear, memory: SlotMemory, max_rank: int) -> None:
        self.parts: tuple[LinearPart, ...] = tuple(linear.parts_of_rank())
        assert len(self.parts) <= MAX_PARTS, linear.name
        self._memory = memory
        self._is_first = memory.piece_size == 0
        self._inputs = -(-linear.weight.num_inputs // _TILE_INPUTS) * _TILE_INPUTS
        rank = whole_strips(max_rank)
        self._slots = [_PartSlots(memory.num_slots) for _ in self.parts]
        self._held: list[AdapterWeights | None] = [None] * memory.num_slots
        self.described = _Adapters(num_parts=len(self.parts), max_rank=rank)
        for index, part in enumerate(self.parts):
            memory.piece_size += rank * (self._inputs + _num_columns(part))
            self.described.parts[index] = _AdapterPart(
                down=ctypes.addressof(self._slots[index].down),
                up=ctypes.addressof(self._slots[index].up),
                ranks=ctypes.addressof(self._slots[index].ranks),
                first=part.rows.start,
                outputs=part.num_outputs,
                pairs=self._inputs // 2,
            )

    def hold(self, weights: AdapterWeights, ranks: Mapping[str, int]) -> None:
        """Take all A before all B: the order in which a step reads them."""
        if self._is_first:
            self._memory.begin(weights)
        adapted = [part for part in self.parts if part.module in ranks]
        sizes = [whole_strips(ranks[part.module]) for part in adapted]
        downs = [self._memory.take(rank, self._inputs) for rank in sizes]
        ups = [self._memory.take(_num_columns(part), rank) for part, rank in zip(adapted, sizes, strict=True)]
        weights |= {part.module: Pair(down, up) for part, down, up in zip(adapted, downs, ups, strict=True)}

    def write(self, target: Tensor, matrix: Tensor, scale: float) -> None:
        is_float32 = matrix.dtype != target.dtype
        if is_float32 and matrix.dtype != torch.float32:
            matrix = matrix.float()
        if matrix.stride(1) != 1:
            matrix = matrix.contiguous()
        columns, inputs = matrix.shape
        stored = _StoredMatrix(matrix.data_ptr(), is_float32, columns, inputs, matrix.stride(0), scale)
        self._memory.write_strips(ctypes.byref(stored), target.shape[0], target.shape[1], target.data_ptr())

    def put(self, slot: int, weights: AdapterWeights) -> None:
        self._held[slot] = weights
        for part, slots in zip(self.parts, self._slots, strict=True):
            pair = weights.get(part.module)
            slots.ranks[slot] = 0 if pair is None else len(pair.down) * _STRIP
            if pair is not None:
                slots.down[slot], slots.up[slot] = pair.down.data_ptr(), pair.up.data_ptr()

    def clear(self, slot: int) -> None:
        self._held[slot] = None
        for slots in self._slots:
            slots.ranks[slot] = 0

    def add_(self, y: Tensor, x: Tensor) -> Tensor:
        """C++ adds: torch makes this linear's products for nobody."""
        return y


class StripFactors:
    """Implements `nn.expert_adapters.ExpertForm`: strips for experts, as large as what an adapter has for them."""

    def __init__(self, memory: SlotMemory, max_rank: int, point_to: Callable[[Linear, int], None]) -> None:
        """`point_to`: has C++ read from a linear's `_Adapters` at an address, from then on."""
        self.dtype = memory.dtype
        self._memory = _ExactMemory(memory.library, memory.num_slots, memory.dtype)
        self._max_rank = max_rank
        self._point_to = point_to

    def make(self, linear: Linear) -> ExpertStrips:
        linear.adapters = made = ExpertStrips(linear, self._memory, self._max_rank)
        self._point_to(linear, ctypes.addressof(made.described))
        return made

    def begin(self, num_values: int) -> None:
        self._memory.get(num_values)


class _ExactMemory(SlotMemory):
    """Memory of one adapter after another, of the system: it goes back there when nobody has the adapter."""

    def get(self, num_values: int) -> None:
        self._rest = _huge_pages(num_values, self.dtype)

    def begin(self, weights: AdapterWeights) -> None:
        """Go on in what is there: it is of these weights already."""


class ExpertStrips(StripAdapters):
    """Implements `nn.slot_matrices.ExpertMatrices`."""

    def num_values(self, ranks: Mapping[str, int]) -> int:
        return sum(
            whole_strips(ranks[part.module]) * (self._inputs + _num_columns(part))
            for part in self.parts
            if part.module in ranks
        )
