"""The pieces that blocks are made of, each holding one tensor-parallel rank's share and knowing how to load it.

No autograd and no torch modules: a layer is a few tensors and a call. Each yields its `WeightSlot`s, which say
which part of which checkpoint tensor goes where; `loading.py` fills them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.parts.states import RowPart
from ..ranks.communicator import Communicator
from ..weights.slot_matrices import LinearPart, SlotMatrices
from ..weights.weight import DenseWeight, Weight, WeightSlot
from .builder import Builder

_REFINED_LOGITS = 16  # best of a row, made once more in float32: more take time, fewer leave rounded ones that tie


class Linear:
    """y = x W^T + b, this rank's part of it."""

    in_turns = False  # outputs are gate's and up's in turns, not those of one before those of the other

    def __init__(self, name: str, weight: Weight, bias: Tensor | None = None) -> None:
        self.name = name
        self.weight = weight
        self.bias = bias
        self.adapters: SlotMatrices | None = None  # None: its modules cannot be adapted
        self.takes_some_rows = False  # of a step: which adapter each has is not known here

    def __call__(self, x: Tensor) -> Tensor:  # [num_tokens, in] -> [num_tokens, out]
        y = self.weight.product(x, self.bias)
        return y if self.adapters is None else self.adapters.add_(y, x)

    def parts_of_rank(self) -> Iterator[LinearPart]:
        """Yield this rank's share of each module; none of what is no module of a layer."""
        yield from ()


@dataclass(slots=True, frozen=True)
class Part:
    """A checkpoint tensor of a fused column-parallel linear, or a part of one; its outputs are split over the ranks."""

    name: str
    features: int  # of the whole model
    start: int = 0  # where they begin in the checkpoint's tensor
    stored: int = 0  # outputs that the checkpoint's tensor has; 0: these features
    is_common: bool = False  # each rank has all of them
    num_heads: int = 0  # that stay whole: of more ranks each head is had by as many; 0: there are none


@dataclass(slots=True, frozen=True)
class Share:
    """A `Share` is what this rank has of a part."""

    part: Part
    rows: slice  # here
    start: int  # in the checkpoint's tensor

    @property
    def outputs(self) -> slice:
        return slice(self.start, self.start + self.rows.stop - self.rows.start)

    @property
    def stored(self) -> int:
        """Return the length of the checkpoint's tensor."""
        return self.part.stored or self.part.features


def shares_of(parts: Sequence[Part], comm: Communicator) -> list[Share]:
    """Return this rank's share of each of several parts, one behind another."""
    found, row = list[Share](), 0
    for part in parts:
        num_shares = 1 if part.is_common else min(comm.size, part.num_heads or comm.size)
        count = part.features // num_shares
        start = part.start + count * (comm.rank * num_shares // comm.size)
        found.append(Share(part, slice(row, row + count), start))
        row += count
    return found


def column_parts(names: Sequence[str], sizes: Sequence[int], *, fused: str | None) -> list[Part]:
    """Return the parts of a linear: tensors of their own, or one after another in the tensor `fused`."""
    if fused is None:
        return [Part(name, size) for name, size in zip(names, sizes, strict=True)]
    return parts_of(fused, [RowPart(size) for size in sizes])


def parts_of(name: str, parts: Sequence[RowPart]) -> list[Part]:
    """Return what stands one after another in one tensor."""
    sizes = [part.size for part in parts]
    return [Part(name, part.size, sum(sizes[:index]), sum(sizes), part.is_common) for index, part in enumerate(parts)]


class ColumnParallelLinear(Linear):
    """Output features split over the ranks; several checkpoint tensors fused into one product (q+k+v, gate+up)."""

    def __init__(self, builder: Builder, name: str, num_inputs: int, parts: Sequence[Part], *, bias: bool) -> None:
        self.shares = shares_of(parts, builder.comm)
        size = self.shares[-1].rows.stop
        weight = builder.weight([part.name for part in parts], size, num_inputs)
        super().__init__(name, weight, builder.empty(size) if bias else None)

    def parts_of_rank(self) -> Iterator[LinearPart]:
        num_inputs = self.weight.num_inputs
        for name, group in groupby(self.shares, lambda share: share.part.name):  # of each module
            shares = list(group)
            rows = slice(shares[0].rows.start, shares[-1].rows.stop)
            yield LinearPart(name, (shares[0].stored, num_inputs), rows, tuple(share.outputs for share in shares))

    def slots(self) -> Iterator[WeightSlot]:
        for share in self.shares:
            name, shape = share.part.name, (share.stored, self.weight.num_inputs)
            yield from self.weight.slots(name, shape, rows=share.rows, start=share.start)
            if self.bias is not None:
                yield WeightSlot(f"{name}.bias", (share.stored,), self.bias[share.rows], 0, share.start)


class RowParallelLinear(Linear):
    """Input features split over the ranks; the partial products are summed over them."""

    def __init__(self, builder: Builder, name: str, num_inputs: int, num_outputs: int, *, bias: bool) -> None:
        self.comm = builder.comm
        local = num_inputs // self.comm.size
        super().__init__(name, builder.weight([name], num_outputs, local, num_ranks=self.comm.size))
        self.sum_bias = builder.empty(num_outputs) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        y = self.comm.all_reduce(super().__call__(x))
        return y if self.sum_bias is None else y.add_(self.sum_bias)

    def partial(self, x: Tensor) -> Tensor:
        """Return this rank's part of the sum; the first rank's has the bias."""
        y = super().__call__(x)
        return y if self.sum_bias is None or self.comm.rank else y.add_(self.sum_bias)

    def parts_of_rank(self) -> Iterator[LinearPart]:
        size, local = self.weight.num_outputs, self.weight.num_inputs
        rows = slice(0, size)
        yield LinearPart(self.name, (size, local * self.comm.size), rows, (rows,), local * self.comm.rank)

    def slots(self) -> Iterator[WeightSlot]:
        size, local = self.weight.num_outputs, self.weight.num_inputs
        yield from self.weight.slots(self.name, (size, local * self.comm.size), dim=1, start=local * self.comm.rank)
        if self.sum_bias is not None:
            yield WeightSlot(f"{self.name}.bias", (size,), self.sum_bias)


class VocabParallel:
    """The base of embedding and head: rank r holds the vocabulary's rows [start, stop), the last rank fewer."""

    weight: Weight

    def __init__(self, builder: Builder, name: str, vocab_size: int | None = None) -> None:
        self.name = name
        self.vocab_size = vocab_size or builder.config.vocab_size
        self.comm = builder.comm
        self.num_rows = -(-self.vocab_size // self.comm.size)
        self.start = min(self.vocab_size, self.num_rows * self.comm.rank)
        self.stop = min(self.vocab_size, self.start + self.num_rows)

    def slots(self) -> Iterator[WeightSlot]:
        shape, rows = (self.vocab_size, self.weight.num_inputs), slice(self.stop - self.start)
        yield from self.weight.slots(self.name, shape, rows=rows, start=self.start)


class ParallelEmbedding(VocabParallel):
    """Token ids to rows: each rank looks up those that it holds, the sum over the ranks is the whole."""

    weight: DenseWeight

    def __init__(self, builder: Builder, name: str, shape: tuple[int, int] | None = None) -> None:
        vocab_size, size = shape or (builder.config.vocab_size, builder.config.hidden_size)
        super().__init__(builder, name, vocab_size)
        self.weight = DenseWeight(builder.empty(self.num_rows, size).zero_())

    def __call__(self, input_ids: Tensor) -> Tensor:  # [num_tokens] -> [num_tokens, size]
        table = self.weight.plain
        if self.comm.size == 1:
            return table[input_ids]
        local = input_ids - self.start
        foreign = (local < 0) | (local >= self.stop - self.start)
        rows = table[local.masked_fill_(foreign, 0)]
        return self.comm.all_reduce(rows.masked_fill_(foreign.unsqueeze(1), 0))


class HeadRows(VocabParallel):
    """A head's own rows: of a tensor of its own, or quantized ones of the embedding's, beside its plain ones."""

    def __init__(self, builder: Builder, name: str) -> None:
        super().__init__(builder, name)
        hidden_size = builder.config.hidden_size
        if builder.head_form(name) is None:
            self.weight = DenseWeight(builder.empty(self.num_rows, hidden_size).zero_())
        else:
            self.weight = builder.weight([name], self.num_rows, hidden_size)


class ParallelHead:
    """Hidden states to logits over the whole vocabulary. A tied head shares the embedding's rows, if it is plain."""

    def __init__(self, builder: Builder, embedding: ParallelEmbedding) -> None:
        tied = builder.config.tie_embeddings
        name = embedding.name if tied else "lm_head"
        shares = tied and (builder.head_form(name) is None or not builder.config.has_head)
        self.rows: VocabParallel = embedding if shares else HeadRows(builder, name)
        # A tied head is packed beside the rows that tokens are looked up in: a second copy of this one tensor.
        self.linear = Linear("lm_head", DenseWeight(embedding.weight.plain) if shares else self.rows.weight)

    def __call__(self, hidden: Tensor) -> Tensor:  # [rows, hidden_size] -> [rows, vocab_size] float32
        weight = self.rows.weight
        logits = self.linear(hidden.to(weight.dtype)).float()
        if hidden.dtype != weight.dtype and isinstance(weight, DenseWeight) and weight.plain.numel():
            _refine(logits, hidden, weight.plain)
        return self.rows.comm.all_gather(logits)[:, : self.rows.vocab_size]


def _refine(logits: Tensor, hidden: Tensor, rows: Tensor) -> None:
    """Make the best logits once more in float32: a product rounded to bfloat16 moves in steps of 1/8 near 25, so
    that the first two tie more often than not. Where the plain weight is kept.
    """
    best = logits.topk(min(_REFINED_LOGITS, logits.shape[1])).indices  # [rows, k]
    exact = torch.bmm(rows[best].float(), hidden.unsqueeze(2))  # [rows, k, 1]
    logits.scatter_(1, best, exact.squeeze(2))


class RMSNorm:
    """x / rms(x) * weight over the last dimension, computed in float32. Some families' weights mean one more, and some
    take the mean off x first.
    """

    def __init__(self, builder: Builder, name: str, size: int) -> None:
        self.name = name
        self.eps = builder.config.rms_norm_eps
        self.offset = builder.config.family.norm_offset
        self.takes_mean_off = builder.config.family.has_layer_norms
        self.weight = builder.empty(size)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of `x`, whatever its type, in the weight's type."""
        return self.in_type_of(x).to(self.weight.dtype)

    def in_type_of(self, x: Tensor) -> Tensor:
        if self.takes_mean_off:
            return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), eps=self.eps).to(x.dtype)
        if self.offset:
            return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).mul_(self._factors()).to(x.dtype)
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, eps=self.eps).mul_(self.weight)

    def _factors(self) -> Tensor:
        return self.weight.float() + self.offset

    def slots(self) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{self.name}.weight", tuple(self.weight.shape), self.weight)


def normed_over_ranks(x: Tensor, comm: Communicator, eps: float) -> Tensor:
    """Return x / rms(x) of rows of which each rank has an even part, in float32."""
    squares = comm.all_reduce(x.square().sum(-1, keepdim=True))
    return x * torch.rsqrt(squares / (x.shape[-1] * comm.size) + eps)


class ParallelRMSNorm(RMSNorm):
    """The norm of a projection whose outputs are split over the ranks: each has a part of it and of the weight."""

    def __init__(self, builder: Builder, name: str, size: int) -> None:
        self.comm = builder.comm
        self.size = size
        super().__init__(builder, name, size // self.comm.size)

    def in_type_of(self, x: Tensor) -> Tensor:
        if self.comm.size == 1:
            return super().in_type_of(x)
        return normed_over_ranks(x.float(), self.comm, self.eps).mul_(self._factors()).to(x.dtype)

    def slots(self) -> Iterator[WeightSlot]:
        start = len(self.weight) * self.comm.rank
        yield WeightSlot(f"{self.name}.weight", (self.size,), self.weight, 0, start)


class Sinks:
    """A score of each of this rank's heads that no value goes with."""

    def __init__(self, builder: Builder, name: str) -> None:
        self.name = name
        self.comm = builder.comm
        self.weight = builder.empty(builder.config.num_qo_heads // self.comm.size)

    def slots(self) -> Iterator[WeightSlot]:
        local = len(self.weight)
        yield WeightSlot(self.name, (local * self.comm.size,), self.weight, 0, local * self.comm.rank)
