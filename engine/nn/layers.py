"""The pieces of the decoder, each holding one tensor-parallel rank's share and knowing how to load it.

No autograd and no torch modules: a layer is a few tensors and a call. Each yields its `WeightSlot`s, which say
which part of which checkpoint tensor goes where; `weights.py` fills them. `pack` afterwards trades a linear's
weight for the processor's own blocked form, which is what makes small batches fast there; `engine/cpu/decoder.py` reads
that form too.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.config import RopeConfig
from ..ranks.group import Communicator

_REFINED_LOGITS = 16  # best of a row, made once more in float32: more take time, fewer leave rounded ones that tie

# oneDNN reads this once, before its first product. With AMX it would block weights in a way that native code cannot
# read, and the same steps in torch take several times as long.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


@dataclass(slots=True, frozen=True)
class WeightSlot:
    """One rank's part of one checkpoint tensor: `target` = tensor.narrow(dim, start, target.shape[dim])."""

    name: str  # in the checkpoint
    shape: tuple[int, ...]  # in the checkpoint
    target: Tensor  # a view of this rank's parameter
    dim: int = 0
    start: int = 0


class Linear:
    """y = x W^T + b. `weight` [out, in] is this rank's; after `pack` only the packed form is left."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device):
        self.weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.num_inputs = in_features
        self.tiles: int | None = None  # where the packed form lies, if it is one that native code can read
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:  # [num_tokens, in] -> [num_tokens, out]
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y

    def pack(self) -> None:
        """Reorder the weight once, on a CPU, so that no call has to. Its plain form is given up."""
        if self._packed is None and self.weight.device.type == "cpu" and _can_pack(self.weight.dtype):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.tiles = _address_of_tiles(self._packed, self.weight)
            self.weight = torch.empty(0, dtype=self.weight.dtype)


def _can_pack(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN's linear exists in this build, and this processor has its bfloat16."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _address_of_tiles(packed: Tensor, weight: Tensor) -> int | None:
    """Return the address of `packed` if it is [out / 64, in / 2, 64, 2] in bfloat16, padded with zeros, as where
    processors multiply pairs of bfloat16. oneDNN chooses and does not tell: the first and the last tile are compared.
    """
    columns, inputs = weight.shape
    shape = (-(-columns // 64), -(-inputs // 32) * 16, 64, 2)
    num_bytes: int = torch.ops.mkldnn._nbytes(packed)
    if weight.dtype != torch.bfloat16 or num_bytes != math.prod(shape) * 2:
        return None
    address: int = torch.ops.mkldnn.data_ptr(packed)
    memory = (ctypes.c_char * num_bytes).from_address(address)
    tiles = torch.frombuffer(memory, dtype=torch.bfloat16).view(shape)
    for index in (0, shape[0] - 1):
        expected = torch.zeros(64, shape[1] * 2, dtype=torch.bfloat16)
        part = weight[64 * index : 64 * (index + 1)]
        expected[: len(part), :inputs] = part
        if not torch.equal(tiles[index], expected.view(64, shape[1], 2).transpose(0, 1)):
            return None
    return address


@dataclass(slots=True, frozen=True)
class Part:
    """One checkpoint tensor of a fused column-parallel linear; its output features are split over the ranks."""

    name: str
    features: int  # of the whole model


class ColumnParallelLinear(Linear):
    """Output features split over the ranks; several checkpoint tensors fused into one product (q+k+v, gate+up)."""

    def __init__(
        self,
        in_features: int,
        parts: Sequence[Part],
        comm: Communicator,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.parts = parts
        self.comm = comm
        super().__init__(
            in_features, sum(p.features for p in parts) // comm.size, bias=bias, dtype=dtype, device=device
        )

    def slots(self) -> Iterator[WeightSlot]:
        row = 0
        for part in self.parts:
            count = part.features // self.comm.size
            start = count * self.comm.rank
            shape = (part.features, self.weight.shape[1])
            yield WeightSlot(f"{part.name}.weight", shape, self.weight[row : row + count], 0, start)
            if self.bias is not None:
                yield WeightSlot(f"{part.name}.bias", shape[:1], self.bias[row : row + count], 0, start)
            row += count


class RowParallelLinear(Linear):
    """Input features split over the ranks; the partial products are summed over them."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        comm: Communicator,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.name = name
        self.comm = comm
        super().__init__(in_features // comm.size, out_features, bias=False, dtype=dtype, device=device)
        self.sum_bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        y = self.comm.all_reduce(super().__call__(x))
        return y if self.sum_bias is None else y.add_(self.sum_bias)

    def slots(self) -> Iterator[WeightSlot]:
        local = self.weight.shape[1]
        shape = (self.weight.shape[0], local * self.comm.size)
        yield WeightSlot(f"{self.name}.weight", shape, self.weight, 1, local * self.comm.rank)
        if self.sum_bias is not None:
            yield WeightSlot(f"{self.name}.bias", shape[:1], self.sum_bias)


class VocabParallel:
    """The base of embedding and head: rank r holds the vocabulary's rows [start, stop), the last rank fewer."""

    def __init__(
        self, vocab_size: int, hidden_size: int, comm: Communicator, *, dtype: torch.dtype, device: torch.device
    ):
        self.vocab_size = vocab_size
        self.comm = comm
        self.num_rows = -(-vocab_size // comm.size)
        self.start = min(vocab_size, self.num_rows * comm.rank)
        self.stop = min(vocab_size, self.start + self.num_rows)
        self.weight = torch.zeros(self.num_rows, hidden_size, dtype=dtype, device=device)

    def slots(self, name: str) -> Iterator[WeightSlot]:
        target = self.weight[: self.stop - self.start]
        yield WeightSlot(f"{name}.weight", (self.vocab_size, self.weight.shape[1]), target, 0, self.start)


class ParallelEmbedding(VocabParallel):
    """Token ids to rows: each rank looks up those that it holds, the sum over the ranks is the whole."""

    def __call__(self, input_ids: Tensor) -> Tensor:  # [num_tokens] -> [num_tokens, hidden_size]
        if self.comm.size == 1:
            return self.weight[input_ids]
        local = input_ids - self.start
        foreign = (local < 0) | (local >= self.stop - self.start)
        rows = self.weight[local.masked_fill_(foreign, 0)]
        return self.comm.all_reduce(rows.masked_fill_(foreign.unsqueeze(1), 0))


class ParallelHead:
    """Hidden states to logits over the whole vocabulary. A tied head shares the embedding's weight."""

    def __init__(self, rows: VocabParallel) -> None:
        self.rows = rows
        self.linear = Linear(0, 0, bias=False, dtype=rows.weight.dtype, device=rows.weight.device)
        self.linear.weight, self.linear.num_inputs = rows.weight, rows.weight.shape[1]

    def pack(self, *, tied: bool) -> None:
        """Pack the head. A tied one keeps the plain weight for lookups: packing makes a second copy of this tensor."""
        self.linear.pack()
        if not tied:
            self.rows.weight = self.linear.weight

    def __call__(self, hidden: Tensor) -> Tensor:  # [rows, hidden_size] -> [rows, vocab_size] float32
        logits = self.linear(hidden.to(self.rows.weight.dtype)).float()
        if hidden.dtype != self.rows.weight.dtype and self.rows.weight.numel():
            self._refine(logits, hidden)
        return self.rows.comm.all_gather(logits)[:, : self.rows.vocab_size]

    def _refine(self, logits: Tensor, hidden: Tensor) -> None:
        """Make the best logits once more in float32: a product rounded to bfloat16 moves in steps of 1/8 near 25, so
        that the first two tie more often than not. Where the plain weight is kept.
        """
        best = logits.topk(min(_REFINED_LOGITS, logits.shape[1])).indices  # [rows, k]
        exact = torch.bmm(self.rows.weight[best].float(), hidden.unsqueeze(2))  # [rows, k, 1]
        logits.scatter_(1, best, exact.squeeze(2))


class RMSNorm:
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, name: str, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        self.name = name
        self.eps = eps
        self.weight = torch.empty(size, dtype=dtype, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of `x`, whatever its type, in the weight's type."""
        return self.in_type_of(x).to(self.weight.dtype)

    def in_type_of(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, eps=self.eps).mul_(self.weight)

    def slots(self) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{self.name}.weight", tuple(self.weight.shape), self.weight)


class RotaryEmbedding:
    """Cosines and sines of a step's positions, made once for all of its layers."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device) -> None:
        self.attention_factor = rope.attention_factor
        self.inv_freq = _inverse_frequencies(rope, head_dim).to(device)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[num_tokens] -> cos and signed sin, each [num_tokens, 1, head_dim], for `rotate_`.

        Rounded to `dtype` as in the reference implementation, but float32 to calculate with.
        """
        angles = positions.to(torch.float32).unsqueeze(1) * self.inv_freq  # [num_tokens, head_dim / 2]
        cos = angles.cos().mul_(self.attention_factor).to(dtype).float()
        sin = angles.sin().mul_(self.attention_factor).to(dtype).float()
        return torch.cat((cos, cos), 1).unsqueeze(1), torch.cat((-sin, sin), 1).unsqueeze(1)


def rotate_(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn [num_tokens, heads, head_dim] in place: the pair (x_i, x_{i + d/2}) by its position's angle.

    In float32, rounded once at the end.
    """
    turned = heads.roll(heads.shape[-1] // 2, -1) * signed_sin
    return heads.copy_(turned.addcmul_(heads, cos))


def _inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:  # [head_dim / 2] float32
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind == "llama3":
        return _llama3_frequencies(rope, inv_freq)
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, inv_freq, head_dim)
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
