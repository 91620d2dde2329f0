"""Quantized weights in one form, whatever file they come from: small numbers, and a scale for each group of inputs.

    w[o, i] = numbers[o, i] * scales[o, i // group_size] + minima[o, i // group_size]

Checkpoint formats are unpacked into it (`formats.py`), plain weights rounded into it (`quantized`); processors have
their products for it. Those here are the reference: weight-only, by the numbers that the form stands for.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.errors import ConfigError
from ...models.storage import FEWER_RANKS, NO_SHARED_ACT_ORDER, Form
from .float8 import to_float8
from .rounding import round_groups
from .weight import PIECE_ROWS, DenseWeight, StoredMatrix, WeightSlot

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # what 4 bits mean
_CODED_CAPABILITY = (8, 0)  # of cards whose products of bfloat16 the kernel is compiled to
_ZERO = 8  # what a symmetrical nibble stands above the number that it means


def has_coded_products(device: torch.device) -> bool:
    """Tell whether a device has `engine/cuda/coded_kernel.py`, which multiplies by numbers in few bits."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CODED_CAPABILITY and has_triton()


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class GroupedWeight:
    """Implements `Weight`: groups of inputs with a scale, and maybe a minimum, of each output.

    bits          numbers
    8             int8 [out, in]
    4             uint8 [out, in / 2]: input 2i in the low half, 0 to 15; without minima the number meant is 8 less
    4, `is_e2m1`  the same, each half a float of 4 bits: of MXFP4, whose scales are powers of 2, or NVFP4; no minima
    8, `is_e4m3`  8-bit floats [out, in]; no minima
    """

    def __init__(
        self,
        numbers: Tensor,
        scales: Tensor,  # float32 [out, in / group_size]; or uint8, powers of 2 with 127 added
        minima: Tensor | None = None,  # as `scales`; None: symmetrical
        order: Tensor | None = None,  # int32 [in]: the numbers' input i is x[:, order[i]]; None: in order
        *,
        dtype: torch.dtype,
        is_e2m1: bool = False,
    ) -> None:
        self.is_e2m1 = is_e2m1
        self.is_e4m3 = numbers.dtype == torch.float8_e4m3fn
        self.bits = 4 if numbers.dtype == torch.uint8 else 8
        self.numbers, self.scales, self.minima, self.order = numbers, scales, minima, order
        self.num_outputs, self.num_inputs = numbers.shape[0], numbers.shape[1] * 8 // self.bits
        self.group_size = self.num_inputs // scales.shape[1]
        self.dtype = dtype
        self._widened: DenseWeight | None = None
        assert self.num_inputs == self.group_size * scales.shape[1], (numbers.shape, scales.shape)

    @classmethod
    def empty(cls, num_outputs: int, num_inputs: int, form: Form, *, dtype: torch.dtype, device: torch.device) -> Self:
        """Make one to be filled by `put`."""
        number_type = torch.float8_e4m3fn if form.is_e4m3 else torch.uint8 if form.bits == 4 else torch.int8
        numbers = torch.zeros(num_outputs, num_inputs * form.bits // 8, dtype=number_type, device=device)
        scales = torch.zeros(num_outputs, num_inputs // form.group_size, device=device)
        minima = torch.zeros_like(scales) if form.has_minima else None
        return cls(numbers, scales, minima, dtype=dtype, is_e2m1=form.is_e2m1)

    @classmethod
    def quantized(cls, matrix: Tensor, form: Form, *, dtype: torch.dtype | None = None) -> Self:
        """Round each number of a plain matrix to the nearest one that its group can hold (`rounding.py`)."""
        assert not form.is_e4m3, "`to_float8` rounds to these"
        made = cls.empty(len(matrix), matrix.shape[1], form, dtype=dtype or matrix.dtype, device=matrix.device)
        symmetric, floats = not form.has_minima, E2M1[: len(E2M1) // 2] if form.is_e2m1 else ()
        for at in range(0, len(matrix), PIECE_ROWS):
            rows = slice(at, at + PIECE_ROWS)
            groups = matrix[rows].float().reshape(-1, matrix.shape[1] // form.group_size, form.group_size)
            numbers, made.scales[rows], minima = round_groups(groups, form.bits, symmetric=symmetric, floats=floats)
            numbers = numbers.flatten(1)
            made.numbers[rows] = join_nibbles(numbers.to(torch.uint8)) if form.bits == 4 else numbers
            if made.minima is not None and minima is not None:
                made.minima[rows] = minima
        return made

    @property
    def form(self) -> Form:
        return Form(self.bits, self.group_size, self.minima is not None, self.is_e2m1, self.is_e4m3)

    # --- what it stands for --------------------------------------------------------------------------------------

    def dequantized(self) -> Tensor:
        """Return the plain matrix, [out, in] float32, inputs in the model's order."""
        numbers = self._meant().view(self.num_outputs, -1, self.group_size)
        scales = power_of_2(self.scales) if self.scales.dtype == torch.uint8 else self.scales
        matrix = numbers * scales.unsqueeze(2)
        if self.minima is not None:
            matrix += self.minima.unsqueeze(2)
        matrix = matrix.flatten(1)
        if self.order is None:
            return matrix
        return torch.empty_like(matrix).index_copy_(1, self.order.long(), matrix)

    def widened(self) -> Tensor:
        """Return the plain matrix as `dequantized` does, in the type of rows, without one in float32 beside it."""
        matrix = torch.empty(self.num_outputs, self.num_inputs, dtype=self.dtype, device=self.numbers.device)
        self.widen_into(matrix)
        return matrix

    def widen_into(self, target: Tensor, dim: int = 0, start: int = 0) -> None:
        """Fill a plain matrix with as many outputs (`dim` 0) or inputs, from `start` on, a piece at a time."""
        first_row, first_input = (0, start) if dim == 1 else (start, 0)
        for at in range(0, len(target), PIECE_ROWS):
            part = target[at : at + PIECE_ROWS]
            plain = self.narrow(0, first_row + at, len(part)).dequantized()
            part.copy_(plain.narrow(1, first_input, part.shape[1]))

    def _meant(self) -> Tensor:
        """Return the numbers as float32, each in a place of its own."""
        if self.bits == 8:
            return self.numbers.float()
        if self.is_e2m1:
            return e2m1(split_nibbles(self.numbers))
        numbers = split_nibbles(self.numbers).float()
        return numbers if self.minima is not None else numbers.sub_(_ZERO)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._widened is not None:
            return self._widened.product(x, bias)
        return F.linear(x, self.widened(), bias)

    def pack(self) -> None:
        """Widen it: torch has no product of these on a CPU, and would make each plain matrix anew in every step."""
        if self._widened is None:
            self._widened = DenseWeight(self.take().widened())
            self._widened.pack()

    def take(self) -> GroupedWeight:
        """Give all of it up to the caller, who has a form of its own for it."""
        taken = self._with(self.numbers, self.scales, self.minima, self.order)
        self.numbers, self.scales = self.numbers.new_empty(0), self.scales.new_empty(0)
        self.minima = self.order = None
        return taken

    # --- how it is filled ----------------------------------------------------------------------------------------

    def slots(
        self, name: str, shape: tuple[int, int], *, rows: slice = slice(None), dim: int = 0, start: int = 0
    ) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{name}.weight", shape, self.numbers[rows], dim, start, GroupedRows(self, rows))

    def narrow(self, dim: int, start: int, length: int) -> GroupedWeight:
        """Return a view of some outputs (`dim` 0) or inputs. Raises ConfigError where a group would be cut."""
        if length == (self.num_outputs, self.num_inputs)[dim]:
            return self
        if dim == 0:
            minima = None if self.minima is None else self.minima.narrow(0, start, length)
            numbers, scales = self.numbers.narrow(0, start, length), self.scales.narrow(0, start, length)
            return self._with(numbers, scales, minima, self.order)
        if self.order is not None:
            raise ConfigError(NO_SHARED_ACT_ORDER)
        numbers = self.numbers.narrow(1, start * self.bits // 8, length * self.bits // 8)
        if self.group_size == self.num_inputs:
            return self._with(numbers, self.scales, self.minima)
        if start % self.group_size or length % self.group_size:
            if self.is_e4m3:  # blocks are cut into smaller ones of the same scale
                group_size = math.gcd(self.group_size, start, length)
                return self.raised(self.form._replace(group_size=group_size)).narrow(dim, start, length)
            raise ConfigError(
                f"a rank's {length} inputs of {self.num_inputs} are no whole groups of {self.group_size}; {FEWER_RANKS}"
            )
        first, count = start // self.group_size, length // self.group_size
        minima = None if self.minima is None else self.minima.narrow(1, first, count)
        return self._with(numbers, self.scales.narrow(1, first, count), minima)

    def _with(
        self, numbers: Tensor, scales: Tensor, minima: Tensor | None, order: Tensor | None = None
    ) -> GroupedWeight:
        """Return a weight whose numbers mean the same."""
        return GroupedWeight(numbers, scales, minima, order, dtype=self.dtype, is_e2m1=self.is_e2m1)

    def put(self, rows: slice, part: GroupedWeight) -> None:
        """Copy `part` into some rows. One of fewer bits, or in larger groups, is raised to this form, exactly.

        Raises ConfigError where its inputs stand in another order than those of other rows.
        """
        raised = part.raised(self.form)
        assert raised.form == self.form, "numbers that mean something else"
        self.numbers[rows] = raised.numbers
        self.scales[rows] = raised.scales
        if self.minima is not None and raised.minima is not None:
            self.minima[rows] = raised.minima
        order = None if part.order is None else part.order.to(self.numbers.device)
        if rows.start in (None, 0):
            self.order = order
        elif not _same_order(order, self.order):
            raise ConfigError("its inputs are in another act-order than those of the matrix that it is fused with")

    def raised(self, form: Form) -> GroupedWeight:
        """Return the same weights in a form of no fewer bits, no larger groups, and minima if there are any."""
        numbers, minima, scales = self.numbers, self.minima, self.scales
        if form.bits < self.bits or self.group_size % form.group_size or (minima is not None and not form.has_minima):
            raise AssertionError(f"{self.form} is not raised to {form}")
        if form.bits == 8 and self.is_e2m1:
            numbers, scales = (2 * self._meant()).to(torch.int8), scales / 2
        elif form.bits == 8 and self.bits == 4:
            numbers = split_nibbles(numbers).to(torch.int8)
            numbers = numbers if minima is not None else numbers.sub_(_ZERO)
        if form.has_minima and minima is None:
            zero = _ZERO if form.bits == 4 else 0  # of nibbles with minima the number meant is the nibble itself
            minima = scales * -zero
        repeats = self.group_size // form.group_size
        scales = scales.repeat_interleave(repeats, 1)
        minima = None if minima is None else minima.repeat_interleave(repeats, 1)
        is_e2m1 = self.is_e2m1 and form.bits == 4
        return GroupedWeight(numbers, scales, minima, self.order, dtype=self.dtype, is_e2m1=is_e2m1)


@dataclass(slots=True, frozen=True)
class GroupedRows:
    """Implements `Rows`, of a `GroupedWeight`."""

    weight: GroupedWeight
    rows: slice

    def put(self, matrix: Tensor | StoredMatrix, dim: int, start: int) -> None:
        if isinstance(matrix, Tensor) and self.weight.is_e4m3:
            matrix = GroupedWeight(*to_float8(matrix), dtype=self.weight.dtype)
        assert isinstance(matrix, GroupedWeight), "plain numbers are rounded before"
        length = self.weight.num_inputs if dim == 1 else len(self.weight.numbers[self.rows])
        self.weight.put(self.rows, matrix.narrow(dim, start, length))


def _same_order(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def power_of_2(exponents: Tensor) -> Tensor:
    """Uint8, 127 above what is meant -> float32."""
    return torch.ldexp(torch.ones(exponents.shape, device=exponents.device), exponents.int() - 127)


def e2m1(numbers: Tensor) -> Tensor:
    """Return what 4 bits mean (`E2M1`), by arithmetic: a graph of a GPU takes no table from the host."""
    sizes = (numbers & 7).int()
    twice = torch.where(sizes < 2, sizes, (2 + (sizes & 1)) << ((sizes >> 1) - 1).clamp(min=0))
    return torch.where(numbers < 8, twice, -twice).float() / 2


def split_nibbles(numbers: Tensor) -> Tensor:
    """[rows, n] bytes -> [rows, 2 n] uint8, low half first."""
    return torch.stack((numbers & 15, numbers >> 4), 2).flatten(1)


def join_nibbles(numbers: Tensor) -> Tensor:
    """[rows, 2 n] uint8, each 0 to 15 -> [rows, n] bytes, low half first."""
    return numbers[:, ::2] | (numbers[:, 1::2] << 4)
