from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvferry.tests.emulation.stream import launch

from .checks import check, whole


def silu_and_mul(input: Tensor, out: Tensor | None = None, enable_pdl: bool | None = None) -> Tensor:
    made = torch.empty(*input.shape[:-1], input.shape[-1] // 2, dtype=input.dtype, device=input.device)
    out = made if out is None else out
    source, target = whole("input", input), whole("out", out, input.dtype)
    check(input.shape[-1] * input.element_size() // 2 % 16 == 0, "a half is no multiple of 16 bytes")

    def kernel() -> None:
        gate, up = source.float().chunk(2, -1)
        target.copy_(F.silu(gate) * up)

    launch(kernel)
    return out
