"""Products in 8-bit floats (e4m3): a scale for each output of a weight, and one for each token.

    y[t, o] = (sum over i of x8[t, i] * w8[o, i]) * scale of t * scale of o

A token's scale is made of the token, so a result does not depend on what else a step computes, but for the order of
sums. Weights that were rounded while they were loaded (`engine/weights/float8.py`) are multiplied by as they are. So is
a checkpoint with a scale for each output: the largest of an output is 448 there, so its scale is found again. Where it
has one scale for more, numbers are rounded anew.

Not run on a card: shown on an emulated device, which takes the arguments that CUDA's product takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from ...models.quantization import FLOAT8_CAPABILITY
from ..nn.decoder import Decoder
from ..nn.layers import ColumnParallelLinear, Linear
from ..weights.float8 import RoundedWeight, to_float8
from ..weights.weight import DenseWeight, WeightSlot

_MULTIPLE = 16  # numbers: of which CUDA's product takes rows and columns


class Float8Weight:
    """Implements `Weight`, of a rank whose weights are loaded."""

    def __init__(self, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        """`numbers`: [out, in] in 8-bit floats; `scales`: of each output, [out, 1] float32."""
        self.num_outputs, self.num_inputs = numbers.shape
        self.dtype = dtype
        self._numbers = numbers
        self._scales = scales.view(1, -1)

    @classmethod
    def rounded(cls, plain: Tensor) -> Self:
        """Make one of a plain matrix."""
        return cls(*to_float8(plain), plain.dtype)

    def slots(
        self, name: str, shape: tuple[int, int], *, rows: slice = slice(None), dim: int = 0, start: int = 0
    ) -> Iterator[WeightSlot]:
        raise AssertionError("it is made of a loaded weight")

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        numbers, scales = to_float8(x)
        return torch._scaled_mm(
            numbers, self._numbers.t(), scales, self._scales, bias=bias, out_dtype=self.dtype, use_fast_accum=True
        )

    def pack(self) -> None:
        """Do nothing: a weight is packed when it is made."""


def narrow(decoder: Decoder, device: torch.device) -> int:
    """Trade loaded weights that are 8-bit floats, in the checkpoint or since they were loaded, for such, one by one.

    Those that CUDA's product does not take become plain numbers. Returns how many were traded: none on a card without
    it.
    """
    if torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        return 0
    count = 0
    for linear in _stored_so(decoder):
        weight = linear.weight
        is_taken = weight.dtype == torch.bfloat16 and not any(
            size % _MULTIPLE for size in (weight.num_outputs, weight.num_inputs)
        )
        if isinstance(weight, RoundedWeight):
            linear.weight = Float8Weight(*weight.take(), weight.dtype) if is_taken else DenseWeight(weight.widened())
            count += is_taken
        elif isinstance(weight, DenseWeight) and is_taken:
            linear.weight = Float8Weight.rounded(weight.take())
            count += 1
    return count


def _stored_so(decoder: Decoder) -> Iterator[Linear]:
    """Yield the layers' linears of which every part is in 8-bit floats."""
    quantization = decoder.config.quantization
    for linear in decoder.linears():
        if quantization is None or linear is decoder.head.linear:  # logits have kernels of their own
            continue
        modules = [part.name for part in linear.parts] if isinstance(linear, ColumnParallelLinear) else [linear.name]
        stored = [quantization.storage(module) for module in modules]
        if all(each is not None and each.is_float8 for each in stored):
            yield linear
