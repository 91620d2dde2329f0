"""Positions as rotations: cosines and sines of a step, and the turn of queries and keys by them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...models.rope import RopeConfig


class RotaryEmbedding:
    """Cosines and sines of a step's positions, made once for all of its layers."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device, *, max_model_len: int = 0) -> None:
        """`max_model_len`: what sequences may grow to, by which a scaling may choose its frequencies."""
        self.attention_factor = rope.attention_factor
        self.inv_freq = _inverse_frequencies(rope, int(head_dim * rope.fraction), max_model_len).to(device)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[num_tokens] -> cos and signed sin, each [num_tokens, 1, turned part of head_dim], for `rotate_`.

        Rounded to `dtype` as in the reference implementation, but float32 to calculate with.
        """
        angles = positions.to(torch.float32).unsqueeze(1) * self.inv_freq  # [num_tokens, head_dim / 2]
        cos = angles.cos().mul_(self.attention_factor).to(dtype).float()
        sin = angles.sin().mul_(self.attention_factor).to(dtype).float()
        return torch.cat((cos, cos), 1).unsqueeze(1), torch.cat((-sin, sin), 1).unsqueeze(1)


def rotate_(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn [num_tokens, heads, head_dim] in place: the pair (x_i, x_{i + d/2}) by its position's angle.

    In float32, rounded once at the end. d: as many as there are cosines, from the head's beginning on.
    """
    part = heads[..., : cos.shape[-1]]
    turned = part.roll(cos.shape[-1] // 2, -1) * signed_sin
    part.copy_(turned.addcmul_(part, cos))
    return heads


def _inverse_frequencies(rope: RopeConfig, head_dim: int, max_model_len: int) -> Tensor:  # [head_dim / 2] float32
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    if rope.kind == "none":
        return torch.zeros_like(exponents)
    inv_freq = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind == "llama3":
        return _llama3_frequencies(rope, inv_freq)
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, inv_freq, head_dim)
    if rope.kind == "longrope":
        factors = rope.long_factors if rope.is_long(max_model_len) else rope.short_factors
        return 1.0 / (torch.tensor(factors) * rope.theta**exponents)
    return inv_freq


def _llama3_frequencies(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Stretch slow turns by `factor`, fast ones kept, those between blended (Llama 3.1 release notes)."""
    turns = rope.original_max_len * inv_freq / (2 * math.pi)  # over the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1 - keep) * inv_freq / rope.factor + keep * inv_freq


def _yarn_frequencies(rope: RopeConfig, inv_freq: Tensor, head_dim: int) -> Tensor:
    """Blend stretched and kept frequencies by turns over the original context (Peng et al. 2023, section 3.2)."""

    def dimension(turns: float) -> float:  # whose frequency makes so many turns
        return head_dim * math.log(rope.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step, not a division by zero
    stretch = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inv_freq / rope.factor * stretch + inv_freq * (1 - stretch)
