"""Kernels that do several of torch's operations in one launch: norms, rotation, gating, logits, sampling masks.

`FusedKernels` are FlashInfer's, for CUDA in 16 bits. They sum and round as torch does but for the last bit: a norm
after an addition sees the sum before it is rounded. Kernels are compiled at first use, so whoever owns one warms it up.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.attention.flashinfer_package import import_flashinfer

_GATED_MULTIPLE = 16  # the kernel reads 16 bytes at a time, so each half is to begin at such a place


class Kernels(Protocol):
    """Names that end in an underscore write into their first arguments."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[rows, size] -> [rows, size]."""
        ...

    def norm_heads_(self, heads: Tensor, weight: Tensor, eps: float) -> None:
        """Each head of [rows, num_heads, head_dim] by itself; rows may stand apart in memory."""
        ...

    def add_norm_(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        """residual += x, then x = norm(residual); both [rows, size]."""
        ...

    def rotate_(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """Turn [rows, heads, head_dim] by `positions` [rows] int32; `cos_sin` [positions, head_dim] float32 holds the
        cosines of half a head, then its sines."""
        ...

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """[rows, 2 * size] -> silu(first half) * second half."""
        ...

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[rows, size], [vocab, size] -> [rows, vocab] float32, not rounded to 16 bits on the way."""
        ...

    def keep_top_k(self, logits: Tensor, counts: Tensor) -> Tensor:
        """-inf below each row's counts-th best; ties with it stay. counts [rows] int32; the vocabulary's size: all."""
        ...

    def keep_top_p(self, probs: Tensor, limits: Tensor) -> Tensor:
        """0 outside of each row's smallest set of best tokens that reaches limits [rows] float32, in (0, 1)."""
        ...


class FusedKernels:
    """Raises ConfigError where FlashInfer is not installed."""

    def __init__(self) -> None:
        package = import_flashinfer("a model")
        self._activation = package.activation
        self._norm = package.norm
        self._rope = package.rope
        self._sampling = package.sampling

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out: Tensor = self._norm.rmsnorm(x, weight, eps)
        return out

    def norm_heads_(self, heads: Tensor, weight: Tensor, eps: float) -> None:
        self._norm.rmsnorm(heads, weight, eps, out=heads)

    def add_norm_(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        self._norm.fused_add_rmsnorm(x, residual, weight, eps)

    def rotate_(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        # A row's heads lie side by side, so that flattening them makes a view and the rotation stays in place.
        self._rope.apply_rope_with_cos_sin_cache_inplace(
            positions, q.flatten(1), k.flatten(1), q.shape[-1], cos_sin, is_neox=True
        )

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        if gate_up.shape[-1] % _GATED_MULTIPLE:
            return _silu_and_mul(gate_up)
        out: Tensor = self._activation.silu_and_mul(gate_up)
        return out

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(hidden, weight.t(), torch.float32)

    def keep_top_k(self, logits: Tensor, counts: Tensor) -> Tensor:
        out: Tensor = self._sampling.top_k_mask_logits(logits, counts)
        return out

    def keep_top_p(self, probs: Tensor, limits: Tensor) -> Tensor:
        # Deterministic: sums of integers, whose order does not matter. A seeded stream must not depend on the others.
        out: Tensor = self._sampling.top_p_renorm_probs(probs, limits, is_deterministic=True)
        return out


def _silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate.float()) * up).to(gate.dtype)
