"""Which norms run is settled when the package is imported: CUDA's own, or others that a further library brings."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from kvferry.tests.emulation.stream import launch

from .checks import check, rows

_USE_CUDA_NORM = os.environ.get("FLASHINFER_USE_CUDA_NORM", "0") == "1"


def rmsnorm(
    input: Tensor, weight: Tensor, eps: float = 1e-06, out: Tensor | None = None, enable_pdl: bool | None = None
) -> Tensor:
    out = torch.empty_like(input) if out is None else out
    source, target, factors = _sixteen_bits(input=input, out=out, weight=weight)
    check(input.shape == out.shape and input.shape[-1] == weight.shape[0], "shapes of a norm")
    launch(lambda: target.copy_(_normed(source.float(), factors, eps)))
    return out


def fused_add_rmsnorm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-06, enable_pdl: bool | None = None
) -> None:
    target, total, factors = _sixteen_bits(input=input, residual=residual, weight=weight)
    check(input.dim() == 2 and input.shape == residual.shape, "shapes of a norm")

    def kernel() -> None:
        whole = target.float() + total.float()
        total.copy_(whole)
        target.copy_(_normed(whole, factors, eps))

    launch(kernel)


def _sixteen_bits(**tensors: Tensor) -> list[Tensor]:
    check(_USE_CUDA_NORM, "FLASHINFER_USE_CUDA_NORM was not 1 when flashinfer was imported: other norms would run")
    return [rows(name, tensor, torch.bfloat16) for name, tensor in tensors.items()]


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
