"""Products in 8-bit floats (e4m3): a scale for each output of a weight, and one for each token.

    y[t, o] = (sum over i of x8[t, i] * w8[o, i]) * scale of t * scale of o

A token's scale is made of the token, so a result does not depend on what else a step computes, but for the order of
sums. Weights are multiplied by as they were loaded: a checkpoint's own numbers, where it has a scale for each output or
one for all, else those that plain ones were rounded to (`engine/weights/float8.py`).

Not run on a card: shown on an emulated device, which takes the arguments that CUDA's product takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn.decoder import Decoder
from ..weights.float8 import RoundedWeight, has_products, takes, to_float8
from ..weights.weight import DenseWeight, LoadedWeight


class Float8Weight(LoadedWeight):
    """Implements `Weight`, of a rank whose weights are loaded. `numbers` and `scales` may be traded for equal ones."""

    def __init__(self, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        """`numbers`: [out, in] in 8-bit floats; `scales`: of each output, [out, 1] float32."""
        self.num_outputs, self.num_inputs = numbers.shape
        self.dtype = dtype
        self.numbers = numbers
        self.scales = scales.view(1, -1)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        numbers, scales = to_float8(x)
        return torch._scaled_mm(
            numbers, self.numbers.t(), scales, self.scales, bias=bias, out_dtype=self.dtype, use_fast_accum=True
        )


def narrow(decoder: Decoder, device: torch.device) -> int:
    """Trade the weights that were loaded as 8-bit floats for such as are multiplied by, one by one.

    Those that CUDA's product does not take become plain numbers. Returns how many were traded: none on a card without
    it.
    """
    if not has_products(device):
        return 0
    count = 0
    for linear in decoder.linears():
        weight = linear.weight
        if isinstance(weight, RoundedWeight):
            is_taken = takes(weight.num_outputs, weight.num_inputs, weight.dtype)
            linear.weight = Float8Weight(*weight.take(), weight.dtype) if is_taken else DenseWeight(weight.widened())
            count += is_taken
    return count
