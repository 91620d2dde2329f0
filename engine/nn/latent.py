"""Attention over latents: of a token one vector is kept, which serves all heads as key and as value.

    kv_b of a head            W_K [nope_dim, kv_rank] makes its keys of latents, W_V [value_dim, kv_rank] its values
    score of a token          q_nope . (W_K latent) + q_rope . k_rope  =  [W_K^T q_nope, q_rope] . [latent, k_rope]
    result                    sum of weight * (W_V latent)             =  W_V (sum of weight * latent)

The right sides are computed, for prompts too: queries are as wide as what is kept, W_K and W_V are multiplied by once
for each token that is fed, and keys and values of heads are never made. So every way of cutting a prompt into steps
takes the same products. A long prompt's scores cost three times as many multiplications as of keys made for each head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...models.parts.latent import LatentConfig
from ..ranks.communicator import Communicator
from ..weights.weight import Leaf, WeightSlot
from .attention.base import AttentionBackend
from .builder import Builder
from .layers import ColumnParallelLinear, Part, RMSNorm, RowParallelLinear
from .rotary import Rope, by_halves

_NORM_EPS = 1e-6  # of latents, whatever the model's other norms have


class LatentHeads:
    """The matrices that make a rank's heads' keys and values of latents. Plain numbers, however they are stored."""

    def __init__(self, builder: Builder, name: str, latent: LatentConfig) -> None:
        num_heads, sizes = builder.config.num_qo_heads, [latent.nope_dim, latent.value_dim]
        self.name = name
        self.shape = (num_heads * sum(sizes), latent.kv_rank)
        self.plain = builder.empty(self.shape[0] // builder.comm.size, latent.kv_rank)
        self.start = builder.comm.rank * len(self.plain)
        by_head = self.plain.view(num_heads // builder.comm.size, sum(sizes), latent.kv_rank)
        self.of_keys, self.of_values = torch.split(by_head, sizes, 1)  # [heads, nope_dim or value_dim, kv_rank]

    def asked(self, queries: Tensor) -> Tensor:
        """[num_tokens, heads, nope_dim] -> [num_tokens, heads, kv_rank], to be multiplied by latents."""
        return torch.bmm(queries.transpose(0, 1), self.of_keys).transpose(0, 1)

    def answered(self, sums: Tensor) -> Tensor:
        """Sums of latents [num_tokens, heads, kv_rank] -> the heads' values, [num_tokens, heads * value_dim]."""
        return torch.bmm(sums.transpose(0, 1), self.of_values.transpose(1, 2)).transpose(0, 1).flatten(1)

    def slots(self) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{self.name}.weight", self.shape, self.plain, 0, self.start)

    def take(self) -> tuple[Tensor, Tensor]:
        """Give the matrices up to the caller, who has a form of its own for them: [heads, kv_rank, nope_dim], which
        yields what asks latents, and [heads, value_dim, kv_rank].
        """
        taken = self.of_keys.transpose(1, 2), self.of_values
        self.plain = self.of_keys = self.of_values = torch.empty(0, dtype=self.plain.dtype)
        return taken


class LatentAttention:
    """Implements `Mixer`. Each rank makes the latents, which it needs all of, and has some of the heads."""

    def __init__(self, builder: Builder, name: str, page: int, latent: LatentConfig) -> None:
        config = builder.config
        self.page = page
        self.latent = latent
        self.num_heads = config.num_qo_heads // builder.comm.size
        num_q = config.num_qo_heads * (latent.nope_dim + latent.rope_dim)
        parts = [Part(f"{name}.kv_a_proj_with_mqa", latent.token_size)]
        queries, num_inputs = f"{name}.q_proj", config.hidden_size
        self.q_norm: RMSNorm | None = None
        if latent.q_rank is not None:
            parts.append(Part(f"{name}.q_a_proj", latent.q_rank))
            queries, num_inputs = f"{name}.q_b_proj", latent.q_rank
            self.q_norm = _norm(builder, f"{name}.q_a_layernorm", latent.q_rank)
        whole = replace(builder, comm=Communicator())
        self.a_proj = ColumnParallelLinear(whole, f"{name}.a_proj", config.hidden_size, parts, bias=latent.bias)
        self.q_proj = ColumnParallelLinear(builder, queries, num_inputs, [Part(queries, num_q)], bias=False)
        self.kv_norm = _norm(builder, f"{name}.kv_a_layernorm", latent.kv_rank)
        self.heads = LatentHeads(builder, f"{name}.kv_b_proj", latent)
        self.o_proj = RowParallelLinear(
            builder, f"{name}.o_proj", config.num_qo_heads * latent.value_dim, config.hidden_size, bias=latent.bias
        )

    def project(self, x: Tensor, rope: Rope) -> Tensor:
        """Return the heads' queries, and behind them what is kept of the token, [num_tokens, heads + 1, token_size]."""
        latent, num_heads = self.latent, self.num_heads
        kept = self.a_proj(x)
        queries = x if self.q_norm is None else self.q_norm(kept[:, latent.token_size :])
        q = self.q_proj(queries).view(len(x), num_heads, latent.nope_dim + latent.rope_dim)
        projected = q.new_empty(len(x), num_heads + 1, latent.token_size)
        projected[:, :num_heads, : latent.kv_rank] = self.heads.asked(q[..., : latent.nope_dim])
        projected[:, num_heads, : latent.kv_rank] = self.kv_norm(kept[:, : latent.kv_rank])
        turned = projected[..., latent.kv_rank :]
        turned[:, :num_heads] = self._by_halves(q[..., latent.nope_dim :])
        turned[:, num_heads] = self._by_halves(kept[:, latent.kv_rank : latent.token_size])
        rope.turn_(turned, num_heads)
        if rope.query_scale is not None:  # of the part that is turned it has been
            projected[:, :num_heads, : latent.kv_rank].mul_(rope.query_scale)
        return projected

    def _by_halves(self, x: Tensor) -> Tensor:
        """[..., rope_dim] as the checkpoint has it -> the two of each pair half of it apart, as `rotate_` has them."""
        return by_halves(x) if self.latent.is_interleaved else x

    def mix(self, projected: Tensor, backend: AttentionBackend) -> Tensor:
        """Return sums of latents, [num_tokens, heads * kv_rank]."""
        q, kept = torch.split(projected, [self.num_heads, 1], 1)
        return backend.forward(q, kept, kept[..., : self.latent.kv_rank], self.page).flatten(1)

    def output(self, mixed: Tensor) -> Tensor:
        return self.o_proj(self.heads.answered(mixed.view(len(mixed), self.num_heads, self.latent.kv_rank)))

    def leaves(self) -> Iterator[Leaf]:
        yield self.a_proj
        if self.q_norm is not None:
            yield self.q_norm
        yield from (self.q_proj, self.kv_norm, self.heads, self.o_proj)


def _norm(builder: Builder, name: str, size: int) -> RMSNorm:
    norm = RMSNorm(builder, name, size)
    norm.eps = _NORM_EPS
    return norm
