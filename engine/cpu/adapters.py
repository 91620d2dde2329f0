"""Adapters as C++ reads them: strips of 16 columns, as in `native/adapters.hpp`.

What a slot holds lies in the order in which a step reads it, without gaps whatever the rank, in pages of 2 MiB where
the kernel has them: a decode step takes as long as reading it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.adapters import AdapterWeights, LinearPart, Pair
from ..nn.layers import Linear

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


def whole_strips(columns: int) -> int:
    return -(-columns // _STRIP) * _STRIP


class SlotMemory:
    """The memory of all slots: each has room for the largest adapter."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.slot_size = 0  # values
        self.num_bytes = 0
        self._next = [0] * num_slots
        self._values = torch.empty(0, dtype=torch.bfloat16)

    def make(self, linear: Linear, *, num_slots: int, max_rank: int, device: torch.device) -> StripAdapters:
        """Make a linear's matrices; `allocate` follows when all are made."""
        assert num_slots == self.num_slots and device.type == "cpu", device
        return StripAdapters(linear, self, max_rank)

    def allocate(self) -> None:
        self.num_bytes = 2 * self.num_slots * self.slot_size
        if self.num_bytes < _HUGE_FROM_BYTES:
            self._values = torch.zeros(self.num_slots, self.slot_size, dtype=torch.bfloat16)
            return
        area = mmap.mmap(-1, self.num_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            area.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(area, dtype=torch.uint8)
        start = -whole.data_ptr() % _HUGE_PAGE_BYTES
        self._values = whole[start : start + self.num_bytes].view(torch.bfloat16).view(self.num_slots, self.slot_size)

    def clear(self, slot: int) -> None:
        self._next[slot] = 0

    def put(self, slot: int, matrix: Tensor, columns: int, inputs: int) -> int:
        """Copy [columns, inputs] in, padded with zeros to so many of both; return its address.

        Inputs are even: pairs of them stand together, the 16 columns' one after another, pair after pair.
        """
        first, size = self._next[slot], columns * inputs
        self._next[slot] = first + size
        target = self._values[slot, first : first + size]
        if matrix.shape != (columns, inputs):
            matrix = F.pad(matrix, (0, inputs - matrix.shape[1], 0, columns - len(matrix)))
        pairs = matrix.contiguous().view(torch.int32).view(columns // _STRIP, _STRIP, inputs // 2)
        target.view(torch.int32).view(columns // _STRIP, inputs // 2, _STRIP).copy_(pairs.transpose(1, 2))
        return target.data_ptr()


class StripAdapters:
    """Implements `nn.adapters.SlotMatrices`: a linear's matrices of all slots, where `described` says."""

    def __init__(self, linear: Linear, memory: SlotMemory, max_rank: int) -> None:
        self.parts: tuple[LinearPart, ...] = tuple(linear.parts_of_rank())
        assert len(self.parts) <= MAX_PARTS, linear.name
        self._memory = memory
        self._is_first = memory.slot_size == 0
        self._inputs = -(-linear.weight.num_inputs // _TILE_INPUTS) * _TILE_INPUTS
        rank = whole_strips(max_rank)
        self._addresses = torch.zeros(len(self.parts), 2, memory.num_slots, dtype=torch.int64)
        self._ranks = torch.zeros(len(self.parts), memory.num_slots, dtype=torch.int32)
        self.described = _Adapters(num_parts=len(self.parts), max_rank=rank)
        for index, part in enumerate(self.parts):
            outputs = part.rows.stop - part.rows.start
            memory.slot_size += rank * (self._inputs + whole_strips(outputs))
            self.described.parts[index] = _AdapterPart(
                down=self._addresses[index, 0].data_ptr(),
                up=self._addresses[index, 1].data_ptr(),
                ranks=self._ranks[index].data_ptr(),
                first=part.rows.start,
                outputs=outputs,
                pairs=self._inputs // 2,
            )

    def put(self, slot: int, weights: AdapterWeights) -> None:
        if self._is_first:
            self._memory.clear(slot)
        pairs: list[Pair | None] = [weights.get(part.module) for part in self.parts]
        for index, pair in enumerate(pairs):
            self._ranks[index, slot] = rank = 0 if pair is None else whole_strips(len(pair.down))
            if pair is not None:
                self._addresses[index, 0, slot] = self._memory.put(slot, pair.down, rank, self._inputs)
        for index, pair in enumerate(pairs):
            if pair is not None:
                rank, outputs = whole_strips(len(pair.down)), whole_strips(len(pair.up))
                self._addresses[index, 1, slot] = self._memory.put(slot, pair.up, outputs, rank)

    def add_(self, y: Tensor, x: Tensor) -> Tensor:
        """C++ adds: torch makes this linear's products for nobody."""
        return y

    @property
    def num_bytes(self) -> int:
        return self._memory.num_bytes if self._is_first else 0
