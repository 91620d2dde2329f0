"""Products in 8-bit floats (e4m3): a scale for each output of a weight, and one for each token.

    y[t, o] = (sum over i of x8[t, i] * w8[o, i]) * scale of t * scale of o

A token's scale is made of the token, so a result does not depend on what else a step computes, but for the order of
sums. Weights were rounded while they were loaded (`engine/weights/float8.py`) and are multiplied by as they are. Of a
checkpoint with a scale for each output they are its own: the largest of an output is 448 there, so its scale is found
again. Where it has one scale for more, numbers are rounded anew.

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
    """Trade the weights that were rounded to 8-bit floats for such as are multiplied by, one by one.

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
