"""Positions as rotations: cosines and sines of a step, and the turn of queries and keys by them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...models.parts.rope import RopeConfig


class Rope(NamedTuple):
    """Cosines and sines turn a step's queries and keys."""

    cos: Tensor  # [num_tokens, 1, turned part of head_dim]
    signed_sin: Tensor
    query_scale: Tensor | None = None  # [num_tokens, 1, 1]: of queries, once they are turned

    def turn_(self, heads: Tensor, num_q: int) -> None:
        """Turn [num_tokens, heads, head_dim] in place, of which the first `num_q` are queries."""
        rotate_(heads, self.cos, self.signed_sin)
        if self.query_scale is not None:
            heads[:, :num_q].mul_(self.query_scale)


class RotaryEmbedding:
    """Cosines and sines of a step's positions, made once for all of its layers."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device, *, max_model_len: int = 0) -> None:
        """`max_model_len`: what sequences may grow to, by which a scaling may choose its frequencies."""
        self.rope = rope
        self.attention_factor = rope.attention_factor
        self.inv_freq = _inverse_frequencies(rope, int(head_dim * rope.fraction), max_model_len).to(device)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """[num_tokens] -> what turns them, rounded to `dtype` as in the reference implementation, but float32 to
        calculate with.
        """
        angles = positions.to(torch.float32).unsqueeze(1) * self.inv_freq  # [num_tokens, head_dim / 2]
        cos = angles.cos().mul_(self.attention_factor).to(dtype).float()
        sin = angles.sin().mul_(self.attention_factor).to(dtype).float()
        cos, signed_sin = torch.cat((cos, cos), 1).unsqueeze(1), torch.cat((-sin, sin), 1).unsqueeze(1)
        return Rope(cos, signed_sin, self._query_scale(positions, dtype))

    def _query_scale(self, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return Llama 4's temperature of attention (transformers: `get_llama_4_attn_scale`); None: always 1."""
        if not self.rope.query_beta:
            return None
        multiples = torch.floor((positions + self.rope.query_shift).float() / self.rope.query_len)
        return (1 + self.rope.query_beta * torch.log1p(multiples)).to(dtype)[:, None, None]


def by_halves(x: Tensor) -> Tensor:
    """[..., d] with the two of each pair side by side -> half of it apart, as `rotate_` has them."""
    return x.reshape(*x.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)


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
    if rope.kind == "proportional":
        inv_freq[int(rope.turned_share * head_dim // 2) :] = 0.0
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
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = (turns > low).float() if low == high else ((turns - low) / (high - low)).clamp(0.0, 1.0)  # Llama 4: a step
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
