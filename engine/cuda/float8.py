"""Products in 8-bit floats (e4m3): a scale for each output of a weight, and one for each token.

    y[t, o] = (sum over i of x8[t, i] * w8[o, i]) * scale of t * scale of o

A token's scale is made of the token, so a result does not depend on what else a step computes, but for the order of
sums. A checkpoint with a scale for each output is multiplied by its own numbers: the largest of an output is 448 there,
so that its scale is found again. Where it has one scale for more, numbers are rounded anew.

Not run on a card: shown on an emulated device, which takes the arguments that CUDA's product takes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..nn.decoder import Decoder
from ..nn.layers import ColumnParallelLinear, Linear
from ..nn.weight import DenseWeight, WeightSlot

_MAX = 448.0  # the largest number of the type
_MULTIPLE = 16  # numbers: of which CUDA's product takes rows and columns
_MIN_CAPABILITY = (9, 0)  # whose products take a scale for each row and each column


class Float8Weight:
    """Implements `Weight`, of a rank whose weights are loaded."""

    def __init__(self, plain: Tensor) -> None:
        self.num_outputs, self.num_inputs = plain.shape
        self.dtype = plain.dtype
        self._numbers, scales = to_float8(plain)  # [out, in]
        self._scales = scales.view(1, -1)  # [1, out]

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


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[n, m] -> the nearest 8-bit floats [n, m], and the scale of each row, [n, 1] float32. A row of zeros stays so."""
    scales = rows.abs().amax(1, keepdim=True).float().div_(_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    scaled = (rows.float() / scales).clamp_(-_MAX, _MAX)  # a quotient may be rounded up
    return scaled.to(torch.float8_e4m3fn), scales


def narrow(decoder: Decoder, device: torch.device) -> int:
    """Trade loaded weights that the checkpoint has in 8-bit floats for such, one by one.

    Those that CUDA's product does not take stay as they are. Returns how many were traded: none on a card without it.
    """
    if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return 0
    count = 0
    for linear in _stored_so(decoder):
        weight = linear.weight
        if (
            isinstance(weight, DenseWeight)
            and weight.dtype == torch.bfloat16
            and not any(size % _MULTIPLE for size in (weight.num_outputs, weight.num_inputs))
        ):
            linear.weight = Float8Weight(weight.take())
            count += 1
    return count


def _stored_so(decoder: Decoder) -> Iterator[Linear]:
    """Yield the layers' linears of which the checkpoint has every part in 8-bit floats."""
    quantization = decoder.config.quantization
    for linear in decoder.linears():
        if quantization is None or linear is decoder.head.linear:  # logits have kernels of their own
            continue
        modules = [part.name for part in linear.parts] if isinstance(linear, ColumnParallelLinear) else [linear.name]
        stored = [quantization.storage(module) for module in modules]
        if all(each is not None and each.layout == "float8" for each in stored):
            yield linear
