"""Random inputs of kernels, and how far a kernel's results are from float32's."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 2e-2  # relative and absolute: two roundings to bfloat16


def random_rows(*shape: int, device: torch.device, seed: int) -> Tensor:
    """Draw them on the CPU, so that every card has the same; bfloat16."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)


def agreement(out: Tensor, expected: Tensor) -> str:
    """Say how far both on the CPU are apart. Raises AssertionError where that is too far."""
    out = out.float()
    torch.testing.assert_close(out, expected, rtol=TOLERANCE, atol=TOLERANCE)
    return f"largest difference {float((out - expected).abs().max()):.1e}"
