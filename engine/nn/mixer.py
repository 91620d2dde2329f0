"""A mixer lets a token meet the tokens before it: `Attention` over the pages, or over latents (`latent.py`), or one
that keeps a state, or two of these side by side.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.parts.rank_counts import heads_of_rank
from ...models.parts.uneven_heads import Heads
from ..weights.weight import Leaf
from .attention.base import AttentionBackend
from .builder import Builder
from .layers import ColumnParallelLinear, ParallelRMSNorm, RMSNorm, RowParallelLinear, Sinks, column_parts
from .rotary import Rope, by_halves
from .states import LayerStates


class Mixer(Protocol):
    """A token's way past the others: to what it shows them and asks of them, by them, and back.

    `project` and `output` treat each token by itself, so they may be given any part of a step's tokens; `mix` is given
    all of them, in the order of the backend's plan.
    """

    def project(self, x: Tensor, rope: Rope) -> Tensor:
        """[num_tokens, hidden_size], normed -> [num_tokens, ...], what `mix` takes."""
        ...

    def mix(self, projected: Tensor, backend: AttentionBackend) -> Tensor:
        """Write the tokens' state into the pages, then read what each may see. Returns [num_tokens, size]."""
        ...

    def output(self, mixed: Tensor) -> Tensor:
        """[num_tokens, size] -> [num_tokens, hidden_size], what is added to the residual stream."""
        ...

    def leaves(self) -> Iterator[Leaf]:
        """Yield all that holds weights."""
        ...


class StatefulMixer(ABC):
    """Implements `Mixer`: one that keeps a state."""

    states: LayerStates
    out_proj: RowParallelLinear  # behind `mix`, all that `output` computes

    @property
    @abstractmethod
    def num_projected(self) -> int:
        """Count the numbers of a token that `project` yields."""

    @abstractmethod
    def project(self, x: Tensor, rope: Rope) -> Tensor:
        """Return [num_tokens, num_projected]."""

    @abstractmethod
    def read(self, projected: Tensor) -> Tensor:
        """Take a step's tokens into the states of their rows. Returns what each reads of them, [num_tokens, size];
        zeros of tokens that are padding.
        """

    def mix(self, projected: Tensor, backend: AttentionBackend) -> Tensor:
        around = self.states.around
        return self.read(projected) if around is None else around(self.read, projected)

    def output(self, mixed: Tensor) -> Tensor:
        return self.out_proj(mixed)

    @abstractmethod
    def leaves(self) -> Iterator[Leaf]:
        """Yield all that holds weights."""


class Attention:
    """Implements `Mixer`: QKV projection, norms of queries and keys or none, rotation, attention over pages, output."""

    def __init__(
        self,
        builder: Builder,
        name: str,
        page: int,
        *,
        num_q: int | None = None,
        heads: Heads | None = None,
        made: str = "qkv",
    ) -> None:
        """`page`: which of a block's keys and values are the layer's. `num_q`: numbers that a token's queries are made
        with; None: theirs. `heads`: the layer's; None: all layers'. `made`: what there are matrices for.
        """
        config, num_ranks = builder.config, builder.comm.size
        family = config.family
        self.page, self.num_made = page, len(made)
        num_kv_heads, self.head_dim = heads or (config.num_kv_heads, config.head_dim)
        self.num_qo_heads = config.num_qo_heads // num_ranks
        self.num_kv_heads = heads_of_rank(num_kv_heads, num_ranks) if "k" in made else 0
        own_q, num_kv = config.num_qo_heads * self.head_dim, num_kv_heads * self.head_dim
        names = [f"{name}.{part}_proj" for part in made]
        sizes = [num_q or own_q, num_kv, num_kv][: len(made)]
        queries, *kept = column_parts(names, sizes, fused=f"{name}.qkv_proj" if family.fusion == "all" else None)
        parts = [queries, *(replace(part, num_heads=num_kv_heads) for part in kept)]
        self.qkv_proj = ColumnParallelLinear(
            builder, f"{name}.qkv_proj", config.hidden_size, parts, bias=config.qkv_bias
        )
        self.o_proj = RowParallelLinear(
            builder, f"{name}.{family.output_name}", own_q, config.hidden_size, bias=config.o_bias
        )
        self.head_norms: tuple[RMSNorm, ...] = ()
        self.whole_norms: tuple[RMSNorm, ...] = ()  # of all of a token's queries, and of its keys
        if config.qk_norm and family.head_norms == "whole":
            norms = zip(family.head_norm_names, (own_q, num_kv), strict=True)
            self.whole_norms = tuple(ParallelRMSNorm(builder, f"{name}.{norm}", size) for norm, size in norms)
        elif config.qk_norm:
            self.head_norms = tuple(
                RMSNorm(builder, f"{name}.{norm}", self.head_dim) for norm in family.head_norm_names[: len(made)]
            )
        self.sinks = Sinks(builder, f"{name}.sinks") if family.has_sinks else None
        is_bare = family.head_norms == "bare" and not config.local_layers[page]
        self._eps = config.rms_norm_eps
        self.bare_eps = config.rms_norm_eps if is_bare else None  # of norms without weights; None: there are none
        self._turns_first = family.head_norms == "turned"
        self._has_neighbours = config.rope.has_neighbours

    def project(self, x: Tensor, rope: Rope) -> Tensor:
        """Return queries, keys and values as attention takes them, [num_tokens, heads of all three, head_dim]."""
        num_q, num_kv = self.num_qo_heads, self.num_kv_heads
        return self._turned(self.qkv_proj(x).view(x.shape[0], num_q + 2 * num_kv, self.head_dim), rope)

    def _turned(self, heads: Tensor, rope: Rope) -> Tensor:
        """Norm and turn queries and keys in place."""
        num_q, num_kv = self.num_qo_heads, self.num_kv_heads
        if not self._turns_first:
            self._norm_heads_(heads)
        if self.whole_norms:
            for part, norm in zip(torch.split(heads, [num_q, num_kv, num_kv], 1), self.whole_norms, strict=False):
                part.copy_(norm(part.flatten(1)).view_as(part))
        asking = heads[:, : num_q + num_kv]
        if self._has_neighbours:
            turned = asking[..., : rope.cos.shape[-1]]
            turned.copy_(by_halves(turned))
        rope.turn_(asking, num_q)
        if self.bare_eps is not None:
            asking.copy_(F.rms_norm(asking.float(), asking.shape[-1:], eps=self.bare_eps))
        if self._turns_first:
            self._norm_heads_(heads)
        return heads

    def _norm_heads_(self, heads: Tensor) -> None:
        start = 0
        for norm, count in zip(self.head_norms, (self.num_qo_heads, self.num_kv_heads), strict=False):
            heads[:, start : start + count] = norm(heads[:, start : start + count])
            start += count

    def mix(self, projected: Tensor, backend: AttentionBackend) -> Tensor:
        """Return attention's output, [num_tokens, num_qo_heads * head_dim]."""
        num_q, num_kv = self.num_qo_heads, self.num_kv_heads
        q, k, v = torch.split(projected, [num_q, num_kv, num_kv], 1)
        return backend.forward(q, k, v, self.page).flatten(1)

    def output(self, mixed: Tensor) -> Tensor:
        return self.o_proj(mixed)

    def leaves(self) -> Iterator[Leaf]:
        yield self.qkv_proj
        yield self.o_proj
        yield from self.head_norms
        yield from self.whole_norms
        if self.sinks is not None:
            yield self.sinks


class GatedAttention(Attention):
    """Attention whose heads' outputs are multiplied by gates, which a checkpoint has beside each head's queries."""

    def __init__(self, builder: Builder, name: str, page: int) -> None:
        super().__init__(builder, name, page, num_q=2 * builder.config.num_qo_heads * builder.config.head_dim)

    def project(self, x: Tensor, rope: Rope) -> Tensor:
        """Return queries, keys, values and gates, [num_tokens, heads of all four, head_dim]."""
        num_q, num_kv = self.num_qo_heads, self.num_kv_heads
        heads = self.qkv_proj(x).view(x.shape[0], 2 * num_q + 2 * num_kv, self.head_dim)
        asking, rest = torch.split(heads, [2 * num_q, 2 * num_kv], 1)
        turned = self._turned(torch.cat((asking[:, ::2], rest), 1), rope)
        return torch.cat((turned, asking[:, 1::2]), 1)

    def mix(self, projected: Tensor, backend: AttentionBackend) -> Tensor:
        """Return attention's output times the gates, [num_tokens, num_qo_heads * head_dim]."""
        sizes = [self.num_qo_heads + 2 * self.num_kv_heads, self.num_qo_heads]
        heads, gates = torch.split(projected, sizes, 1)
        return super().mix(heads, backend) * gates.flatten(1).sigmoid()


class NormedValueAttention(Attention):
    """Attention whose values are normed, too, without weights. They may be its keys, before these are.

    Or it makes neither, and reads those that another layer has written.
    """

    def project(self, x: Tensor, rope: Rope) -> Tensor:
        num_q, num_kv = self.num_qo_heads, self.num_kv_heads
        made = self.qkv_proj(x)
        heads = made.view(x.shape[0], made.shape[1] // self.head_dim, self.head_dim)
        if num_kv and heads.shape[1] == num_q + num_kv:
            heads = torch.cat((heads, heads[:, num_q:]), 1)
        values = heads[:, num_q + num_kv :]
        values.copy_(F.rms_norm(values.float(), values.shape[-1:], eps=self._eps))
        return self._turned(heads, rope)


class SideBySide:
    """Implements `Mixer`: attention and a mixer that keeps a state see the same tokens, and their results are added."""

    def __init__(self, builder: Builder, attention: Attention, stateful: StatefulMixer) -> None:
        self.attention, self.stateful = attention, stateful
        self._comm, self._multipliers = builder.comm, builder.config.multipliers
        self._heads = attention.num_qo_heads + 2 * attention.num_kv_heads, attention.head_dim

    def project(self, x: Tensor, rope: Rope) -> Tensor:
        """Return what both take, [num_tokens, numbers of attention's heads, then the other's]."""
        multipliers = self._multipliers
        heads = self.attention.project(_times(x, multipliers.attention_in), rope)
        return torch.cat((heads.flatten(1), self.stateful.project(_times(x, multipliers.state_in), rope)), 1)

    def mix(self, projected: Tensor, backend: AttentionBackend) -> Tensor:
        """Return what both yield, one beside the other."""
        size = math.prod(self._heads)
        heads = projected[:, :size].contiguous().view(-1, *self._heads)  # FlashInfer reads rows 16 bytes apart
        attended = self.attention.mix(heads, backend)
        return torch.cat((attended, self.stateful.mix(projected[:, size:], backend)), 1)

    def output(self, mixed: Tensor) -> Tensor:
        """Add both up, and over the ranks at once."""
        of_attention, of_state = self.attention.o_proj, self.stateful.out_proj
        attended, read = torch.split(mixed, [of_attention.weight.num_inputs, of_state.weight.num_inputs], 1)
        added = _times(of_attention.partial(attended), self._multipliers.attention_out)
        return self._comm.all_reduce(added + _times(of_state.partial(read), self._multipliers.state_out))

    def leaves(self) -> Iterator[Leaf]:
        yield from self.attention.leaves()
        yield from self.stateful.leaves()


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor
