"""Gated delta nets: a mixer whose layers keep a state of one size in place of keys and values.

    queries, keys, values   a convolution over the last few tokens' rows, then silu; of queries and keys the direction
    memory S                S' = a S;  S = S' + k b (v - k S');  what a head yields is q S
    decay a, strength b     of each token and head: exp(-A softplus(.)), sigmoid(.)
    output                  normed by head, times the silu of a gate

Yang, Kautz, Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule": equation 10 for the memory,
section 3.3 for `_by_chunks`, which takes many tokens in few products (the WY form). All of it is computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.parts.delta_nets import DeltaNetsConfig
from ..weights.weight import Leaf
from .builder import Builder
from .convolution import Convolution, Vectors, left_of
from .layers import ColumnParallelLinear, Part, RMSNorm, RowParallelLinear, parts_of
from .mixer import StatefulMixer
from .rotary import Rope
from .states import LayerStates

_CHUNK = 64  # tokens that are taken at once; more products of fewer tokens below, triangles of more numbers above
_CHUNKS = 32  # that a GPU takes at once, to launch less and in larger pieces; a CPU's cache holds one of large models
_SMALL = 1e-6  # is added to a square length before its root is divided by


class _Heads(NamedTuple):
    """Each token asks, shows and says these: first dimensions [num_tokens], then heads of values."""

    q: Tensor  # [..., heads, key_dim], of length key_dim ** -0.5
    k: Tensor  # [..., heads, key_dim], of length 1
    v: Tensor  # [..., heads, value_dim]
    log_decay: Tensor  # [..., heads], at most 0
    strength: Tensor  # [..., heads], in (0, 1)

    def part(self, tokens: Tensor | slice) -> _Heads:
        return _Heads(*(each[tokens] for each in self))


class GatedDeltaNet(StatefulMixer):
    """A rank has some key heads, with the value heads that these serve."""

    def __init__(self, builder: Builder, name: str, index: int, states: LayerStates) -> None:
        """`index`: among the layers with states."""
        config, whole, hidden = states.config, builder.config.states, builder.config.hidden_size
        assert isinstance(config, DeltaNetsConfig) and isinstance(whole, DeltaNetsConfig)
        self.index, self.states, self.config = index, states, config
        self.rows_proj, self.rates_proj = (
            ColumnParallelLinear(builder, f"{name}.{fused}", hidden, parts, bias=False)
            for fused, parts in (("in_proj_qkvz", _row_parts(whole, name)), ("in_proj_ba", _rate_parts(whole, name)))
        )
        self.convolution = Convolution(builder, f"{name}.conv1d", states, index, has_bias=False)
        self.vectors = Vectors(builder, name, dict.fromkeys(("A_log", "dt_bias"), whole.num_value_heads))
        self.norm = RMSNorm(builder, f"{name}.norm", config.value_dim)
        self.norm.offset = 0.0  # whatever the family's other norms have
        self.out_proj = RowParallelLinear(builder, f"{name}.out_proj", whole.num_values, hidden, bias=False)

    @property
    def num_projected(self) -> int:
        return self.rows_proj.weight.num_outputs + self.rates_proj.weight.num_outputs

    def project(self, x: Tensor, rope: Rope) -> Tensor:
        """Return rows for the convolution, gates, strengths and decays, [num_tokens, numbers of all]."""
        rows, rates = self.rows_proj(x), self.rates_proj(x)
        if self.config.is_grouped:
            rows, rates = self._by_kind(rows), rates.view(len(rates), self.config.num_key_heads, 2, -1)
            rates = rates.transpose(1, 2).flatten(1)
        return torch.cat((rows, rates), 1)

    def _by_kind(self, rows: Tensor) -> Tensor:
        """Bring what stands key head by key head into the order of kinds: queries, keys, values, gates."""
        config = self.config
        values = config.num_values // config.num_key_heads
        by_head = rows.view(len(rows), config.num_key_heads, -1)
        parts = torch.split(by_head, [config.key_dim] * 2 + [values] * 2, 2)
        return torch.cat([part.flatten(1) for part in parts], 1)

    def read(self, projected: Tensor) -> Tensor:
        """Return the heads' outputs, [num_tokens, num_values]; zeros of tokens that are padding."""
        config, vectors = self.config, self.vectors.by_name
        sizes = [config.num_convolved, config.num_values, config.num_value_heads, config.num_value_heads]
        rows, gates, strengths, rates = torch.split(projected[: self.states.num_tokens], sizes, 1)
        strengths = strengths.float().sigmoid()
        decays = -vectors["A_log"].exp() * F.softplus(rates.float() + vectors["dt_bias"])
        said = strengths.new_empty(len(rows), config.num_value_heads, config.value_dim)
        for part in self.convolution.parts(rows):
            heads = self._heads(part.convolved, decays[part.tokens], strengths[part.tokens])
            read = _by_chunks(heads, part.memory[0]) if part.is_stretch else _by_token(heads, part.memory)
            said[part.tokens] = read
        said = self.norm.in_type_of(said).flatten(1).mul_(F.silu(gates.float()))
        return F.pad(said, (0, 0, 0, len(projected) - len(said))).to(projected.dtype)

    def _heads(self, convolved: Tensor, decays: Tensor, strengths: Tensor) -> _Heads:
        config = self.config
        q, k, v = torch.split(F.silu(convolved), [config.num_keys, config.num_keys, config.num_values], 1)
        repeats = config.num_value_heads // config.num_key_heads
        q, k = (_directions(each.view(len(each), config.num_key_heads, -1), repeats) for each in (q, k))
        v = v.view(len(v), config.num_value_heads, -1)
        return _Heads(q * config.key_dim**-0.5, k, v, decays, strengths)

    def leaves(self) -> Iterator[Leaf]:
        yield from (self.rows_proj, self.rates_proj, self.convolution, self.vectors, self.norm, self.out_proj)


def _row_parts(whole: DeltaNetsConfig, name: str) -> list[Part]:
    """Return what rows and gates are made by. Of queries, keys and values in one tensor a rank has its part of each;
    where they stand key head by key head, what is one rank's stands together.
    """
    matrices = {f"{name}.{part}": size for part, size in whole.row_matrices.items()}
    if whole.is_grouped:
        return [Part(*matrix) for matrix in matrices.items()]
    convolved, gates = matrices
    return [*parts_of(convolved, whole.row_parts), Part(gates, matrices[gates])]


def _rate_parts(whole: DeltaNetsConfig, name: str) -> list[Part]:
    return [Part(f"{name}.{part}", size) for part, size in whole.rate_matrices.items()]


def _directions(heads: Tensor, repeats: int) -> Tensor:
    """Return vectors of length 1, each for as many heads of values as share it."""
    directions = heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + _SMALL)
    return directions.unsqueeze(2).expand(-1, -1, repeats, -1).flatten(1, 2)


def _by_token(heads: _Heads, memory: Tensor) -> Tensor:
    """Take one token of each row, [n, ...]; `memory` [n, heads, key_dim, value_dim] is updated. Returns what is read of
    it, [n, heads, value_dim].
    """
    memory.mul_(heads.log_decay.exp()[..., None, None])
    matrices = memory.view(-1, *memory.shape[2:])  # of all rows' heads
    q, k, v, strength = (each.reshape(len(matrices), 1, -1) for each in (heads.q, heads.k, heads.v, heads.strength))
    corrections = torch.baddbmm(v, k, matrices, alpha=-1).mul_(strength)
    matrices.baddbmm_(k.transpose(1, 2), corrections)
    return (q @ matrices).view_as(heads.v)


def _by_chunks(heads: _Heads, memory: Tensor) -> Tensor:
    """Take tokens that follow each other, [n, ...]; `memory` [heads, key_dim, value_dim] is updated. Returns what each
    read of it, [n, heads, value_dim].
    """
    is_cpu = memory.device.type == "cpu"
    take, step = (_chunk, _CHUNK) if is_cpu else (_solved_chunks, _CHUNK * _CHUNKS)
    chunks = [take(heads.part(slice(i, i + step)), memory) for i in range(0, len(heads.q), step)]
    return torch.cat(chunks, 1).transpose(0, 1)


def _chunk(heads: _Heads, memory: Tensor) -> Tensor:
    """Take up to _CHUNK tokens. What token i corrects is v_i - k_i S', of which each earlier token's part is known but
    for its own correction: a triangle of equations, solved at once.
    """
    q, k, v = (each.transpose(0, 1) for each in heads[:3])  # [heads, n, numbers]
    strength, since = heads.strength.T.unsqueeze(-1), heads.log_decay.cumsum(0).T  # [heads, n, 1], [heads, n]
    left = left_of(since)
    reached = since.exp().unsqueeze(-1)  # [heads, n, 1]: of what was there before the chunk
    triangle = strength * (k @ k.transpose(1, 2)) * left
    wanted = strength * (v - reached * (k @ memory))
    corrections = torch.linalg.solve_triangular(triangle, wanted, upper=False, unitriangular=True)
    read: Tensor = reached * (q @ memory) + ((q @ k.transpose(1, 2)) * left) @ corrections
    at_end = (since[:, -1:] - since).exp().unsqueeze(-1)
    memory.mul_(since[:, -1].exp()[:, None, None]).add_((k * at_end).transpose(1, 2) @ corrections)
    return read


def _solved_chunks(heads: _Heads, memory: Tensor) -> Tensor:
    """Do as `_chunk` does, of several ones. Their triangles are solved at once, for the values and for the keys that
    meet the memory before a chunk, so that what is left to do chunk after chunk are a few products.
    """
    count, size = len(heads.q), min(_CHUNK, len(heads.q))
    q, k, v, log_decay, strength = (_in_chunks(each, size) for each in heads)
    strength, since = strength.unsqueeze(-1), log_decay.cumsum(2)  # [chunks, heads, size, 1], [chunks, heads, size]
    left, reached = left_of(since), since.exp().unsqueeze(-1)
    triangle = strength * (k @ k.transpose(2, 3)) * left
    wanted = strength * torch.cat((v, reached * k), 3)
    solved = torch.linalg.solve_triangular(triangle, wanted, upper=False, unitriangular=True)
    values, keys = torch.split(solved, [v.shape[3], k.shape[3]], 3)
    within, asked = (q @ k.transpose(2, 3)) * left, reached * q
    at_end = (k * (since[..., -1:] - since).exp().unsqueeze(-1)).transpose(2, 3)
    ends = since[..., -1].exp()[..., None, None]
    read = []
    for chunk in range(len(values)):
        corrections = torch.baddbmm(values[chunk], keys[chunk], memory, alpha=-1)
        read.append(torch.baddbmm(asked[chunk] @ memory, within[chunk], corrections))
        memory.mul_(ends[chunk]).baddbmm_(at_end[chunk], corrections)
    return torch.cat(read, 1)[:, :count]


def _in_chunks(x: Tensor, size: int) -> Tensor:
    """[n, heads, ...] -> [chunks, heads, size, ...]; behind the end tokens of zeros, which change and read nothing."""
    x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, -len(x) % size))
    return x.view(-1, size, *x.shape[1:]).transpose(1, 2)
