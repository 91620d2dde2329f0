from __future__ import annotations

import torch
from torch import Tensor

from kvferry.tests.emulation.stream import launch

from .checks import check, rows, whole


def apply_rope_with_cos_sin_cache_inplace(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> None:
    """`query` and `key` [rows, heads * head_size] are turned in halves."""
    check(is_neox, "only halves of a head are turned here")
    check(cos_sin_cache.shape[1] == head_size, f"a table of {cos_sin_cache.shape[1]} for heads of {head_size}")
    places, table = whole("positions", positions, torch.int32), whole("table", cos_sin_cache, torch.float32)
    heads = [
        rows(name, tensor, torch.bfloat16).view(len(tensor), -1, head_size)
        for name, tensor in (("query", query), ("key", key))
    ]
    check(all(len(each) == len(places) for each in heads), "a position for each row")

    def kernel() -> None:
        cos, sin = table[places.long()].unsqueeze(1).chunk(2, -1)
        for each in heads:
            low, high = each.float().chunk(2, -1)
            each.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), -1))

    launch(kernel)
