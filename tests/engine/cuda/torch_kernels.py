"""The kernels of CUDA's steps in plain torch, on any device: what the fused ones are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class TorchKernels:
    """Implements `Kernels`: one operation after another, in float32 inside."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def norm_heads_(self, heads: Tensor, weight: Tensor, eps: float) -> None:
        heads.copy_(F.rms_norm(heads, weight.shape, weight, eps))

    def add_norm_(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        whole = residual.float() + x.float()
        residual.copy_(whole)
        x.copy_(F.rms_norm(whole, weight.shape, weight.float(), eps))

    def rotate_(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, -1)  # [rows, 1, head_dim / 2]
        for heads in (q, k):
            first, second = heads.float().chunk(2, -1)
            heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return (F.silu(gate.float()) * up).to(gate.dtype)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden.float() @ weight.float().t()

    def keep_top_k(self, logits: Tensor, counts: Tensor) -> Tensor:
        best = logits.topk(int(counts.max()), -1).values
        threshold = best.gather(1, counts.long().unsqueeze(1) - 1)
        return logits.masked_fill(logits < threshold, float("-inf"))

    def keep_top_p(self, probs: Tensor, limits: Tensor) -> Tensor:
        best = probs.sort(descending=True).values
        before = best.cumsum(-1) - best  # probability of all better tokens
        last = (before < limits.unsqueeze(1)).sum(-1, keepdim=True).clamp_(min=1) - 1
        kept = probs.masked_fill(probs < best.gather(1, last), 0.0)
        return kept / kept.sum(-1, keepdim=True)
