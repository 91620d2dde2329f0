"""Mamba's second kind of layers: a mixer that keeps a state of one size in place of keys and values.

    x, B, C      a convolution over the last few tokens' rows, then silu: values, what they are written and read by
    step t       of each token and head: softplus(.), within the model's limits
    memory S     S' = exp(-A t) S + B (t x);  what a head yields is C S' + D x
    output       times the silu of a gate, then normed in groups; or in the other order, or not normed

Dao, Gu 2024, "Transformers are SSMs": section 7 for the layer, section 6 for `_by_chunks`, which takes many tokens in
few products. All of it is computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.parts.mamba import MambaConfig
from ...models.parts.states import RowPart
from ..weights.weight import Leaf
from .builder import Builder
from .convolution import Convolution, Vectors, left_of
from .layers import ColumnParallelLinear, RowParallelLinear, normed_over_ranks, parts_of
from .mixer import StatefulMixer
from .rotary import Rope
from .states import LayerStates

_CHUNK = 64  # tokens that are taken at once; more products of fewer tokens below, triangles of more numbers above


class _Heads(NamedTuple):
    """Each token reads and writes by these: first dimensions [num_tokens], then groups or heads."""

    c: Tensor  # [..., groups, state_dim]
    b: Tensor  # [..., groups, state_dim]
    x: Tensor  # [..., heads, head_dim], times the token's step
    log_decay: Tensor  # [..., heads], at most 0

    def part(self, tokens: slice) -> _Heads:
        return _Heads(*(each[tokens] for each in self))


class Mamba(StatefulMixer):
    """A rank has some heads, with their groups, or the one that there is."""

    def __init__(self, builder: Builder, name: str, index: int, states: LayerStates) -> None:
        """`index`: among the layers with states."""
        config, whole, hidden = states.config, builder.config.states, builder.config.hidden_size
        assert isinstance(config, MambaConfig) and isinstance(whole, MambaConfig)
        self.states, self.config, self.eps = states, config, builder.config.rms_norm_eps
        self.normed_with = builder.comm if whole.is_normed_whole and builder.comm.size > 1 else None
        rows = RowPart(whole.num_values), *whole.row_parts, RowPart(whole.num_heads)
        parts = parts_of(f"{name}.in_proj", rows)
        self.factors = _factors(builder, config)  # of projected numbers; None: 1
        self.in_proj = ColumnParallelLinear(builder, f"{name}.in_proj", hidden, parts, bias=config.proj_bias)
        self.convolution = Convolution(builder, f"{name}.conv1d", states, index, has_bias=config.conv_bias)
        heads = dict.fromkeys(("A_log", "D", "dt_bias"), whole.num_heads)
        norms = {} if config.norm == "none" else {"norm.weight": whole.num_values}
        self.vectors = Vectors(builder, name, heads | norms)
        self.out_proj = RowParallelLinear(builder, f"{name}.out_proj", whole.num_values, hidden, bias=config.proj_bias)

    @property
    def num_projected(self) -> int:
        return self.in_proj.weight.num_outputs

    def project(self, x: Tensor, rope: Rope) -> Tensor:
        """Return gates, rows for the convolution and steps, [num_tokens, numbers of all]."""
        return self.in_proj(x)

    def read(self, projected: Tensor) -> Tensor:
        """Return the heads' outputs, [num_tokens, num_values]; zeros of tokens that are padding."""
        config, vectors = self.config, self.vectors.by_name
        sizes = [config.num_values, config.num_convolved, config.num_heads]
        known = projected[: self.states.num_tokens].float()
        gates, rows, steps = torch.split(known if self.factors is None else known * self.factors, sizes, 1)
        steps = F.softplus(steps + vectors["dt_bias"]).clamp_(*config.step_limits)
        decays = -vectors["A_log"].exp() * steps
        said = rows.new_empty(len(rows), config.num_heads, config.head_dim)
        for part in self.convolution.parts(rows):
            c, b, x = self._split(F.silu(part.convolved))
            heads = _Heads(c, b, x * steps[part.tokens].unsqueeze(-1), decays[part.tokens])
            read = _by_chunks(heads, part.memory[0]) if part.is_stretch else _by_token(heads, part.memory)
            said[part.tokens] = read + vectors["D"].unsqueeze(-1) * x
        gated = self._gated(said.flatten(1), F.silu(gates))
        return F.pad(gated, (0, 0, 0, len(projected) - len(gated))).to(projected.dtype)

    def _gated(self, said: Tensor, gates: Tensor) -> Tensor:
        match self.config.norm:
            case "behind gates":
                return self._normed(said * gates)
            case "before gates":
                return self._normed(said) * gates
            case "none":
                return said * gates

    def _split(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is read by, what is written by, and values."""
        config, n = self.config, len(convolved)
        x, b, c = torch.split(convolved, [config.num_values, config.num_keys, config.num_keys], 1)
        by_group = (n, config.num_groups, config.state_dim)
        return c.reshape(by_group), b.reshape(by_group), x.reshape(n, config.num_heads, config.head_dim)

    def _normed(self, said: Tensor) -> Tensor:
        if self.normed_with is not None:
            normed = normed_over_ranks(said, self.normed_with, self.eps)
        else:
            groups = said.view(len(said), self.config.num_groups, said.shape[1] // self.config.num_groups)
            normed = F.rms_norm(groups, groups.shape[2:], eps=self.eps).flatten(1)
        return normed.mul_(self.vectors.by_name["norm.weight"])

    def leaves(self) -> Iterator[Leaf]:
        yield from (self.in_proj, self.convolution, self.vectors, self.out_proj)


def _factors(builder: Builder, config: MambaConfig) -> Tensor | None:
    """Return what a rank's projected numbers of a token are multiplied by; None: by nothing."""
    factors = builder.config.multipliers.projected
    if not factors:
        return None
    sizes = [config.num_values, *(part.size for part in config.row_parts), config.num_heads]
    parts = [torch.full((size,), factor) for size, factor in zip(sizes, factors, strict=True)]
    return torch.cat(parts).to(builder.device)


def _by_token(heads: _Heads, memory: Tensor) -> Tensor:
    """Take one token of each row, [n, ...]; `memory` [n, heads, state_dim, head_dim] is updated. Returns what is read
    of it, [n, heads, head_dim].
    """
    n, groups = heads.b.shape[:2]
    memory.mul_(heads.log_decay.exp()[..., None, None])
    by_group = memory.view(n, groups, -1, *memory.shape[2:])  # [n, groups, heads of each, state_dim, head_dim]
    by_group += torch.einsum("ngs,nghp->nghsp", heads.b, heads.x.view(n, groups, -1, heads.x.shape[2]))
    return torch.einsum("ngs,nghsp->nghp", heads.c, by_group).flatten(1, 2)


def _by_chunks(heads: _Heads, memory: Tensor) -> Tensor:
    """Take tokens that follow each other, [n, ...]; `memory` [heads, state_dim, head_dim] is updated. Returns what each
    read of it, [n, heads, head_dim].
    """
    chunks = [_chunk(heads.part(slice(i, i + _CHUNK)), memory) for i in range(0, len(heads.c), _CHUNK)]
    return torch.cat(chunks, 1).transpose(0, 1)


def _chunk(heads: _Heads, memory: Tensor) -> Tensor:
    """Take up to _CHUNK tokens: what each reads of those among them, and of the memory before."""
    repeats = heads.x.shape[1] // heads.b.shape[1]
    c, b, x = (each.transpose(0, 1) for each in heads[:3])  # [groups or heads, n, numbers]
    since = heads.log_decay.cumsum(0).T  # [heads, n]
    scores = (c @ b.transpose(1, 2)).repeat_interleave(repeats, 0)
    c, b = c.repeat_interleave(repeats, 0), b.repeat_interleave(repeats, 0)
    read: Tensor = since.exp().unsqueeze(-1) * (c @ memory) + (scores * left_of(since)) @ x
    at_end = (since[:, -1:] - since).exp().unsqueeze(-1)
    memory.mul_(since[:, -1].exp()[:, None, None]).add_((b * at_end).transpose(1, 2) @ x)
    return read
