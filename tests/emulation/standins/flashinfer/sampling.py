from __future__ import annotations

import torch
from torch import Tensor

from kvferry.tests.emulation.stream import launch

from .checks import check, whole


def top_k_mask_logits(logits: Tensor, top_k: Tensor | int) -> Tensor:
    assert isinstance(top_k, Tensor), "one number for all rows is not used"
    out = torch.empty_like(logits)
    source, target = whole("logits", logits, torch.float32), whole("out", out)
    counts = whole("top_k", top_k, torch.int32)
    check(len(counts) == len(source), "a count for each row")

    def kernel() -> None:
        best = source.topk(int(counts.max()), -1).values
        target.copy_(source.masked_fill(source < best.gather(1, counts.long().unsqueeze(1) - 1), float("-inf")))

    launch(kernel)
    return out


def top_p_renorm_probs(probs: Tensor, top_p: Tensor | float, is_deterministic: bool = False) -> Tensor:
    assert isinstance(top_p, Tensor), "one number for all rows is not used"
    out = torch.empty_like(probs)
    source, target = whole("probs", probs, torch.float32), whole("out", out)
    limits = whole("top_p", top_p, torch.float32)
    check(len(limits) == len(source), "a limit for each row")

    def kernel() -> None:
        check(((limits > 0) & (limits < 1)).all(), f"limits outside of (0, 1): {limits}")
        best = source.sort(descending=True).values
        before = best.cumsum(-1) - best
        count = (before < limits.unsqueeze(1)).sum(-1, keepdim=True).clamp(min=1)
        kept = source.masked_fill(source < best.gather(1, count - 1), 0.0)
        target.copy_(kept / kept.sum(-1, keepdim=True))

    launch(kernel)
    return out
