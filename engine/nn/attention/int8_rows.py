"""Keys and values as whole numbers of 8 bits: those of a token and head share a scale, beside them in the page.

    a head of a block   [block_size][head_dim] int8, then [block_size] float32    block_size * (head_dim + 4) bytes

A number means itself times its scale, which is the largest of them by size over 127: symmetric, to the nearest, as
LLM.int8() does it by vectors (Dettmers et al. 2022). `engine/cpu/native/attention/pages.hpp` does the same to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....common.kv_spec import row_items

_MOST = 127
_LEAST_SCALE = torch.finfo(torch.float32).tiny  # what would be less is zero


def stored_head_dim(pages: Tensor) -> int:
    """Return how many numbers a head has in pages [..., block_size, items of a row], of any type."""
    return pages.shape[-1] - row_items(0, "int8" if pages.dtype == torch.int8 else "")


def write_rows(layer: Tensor, part: int, blocks: Tensor, offsets: Tensor, rows: Tensor) -> None:
    """Put keys (part 0) or values (1), [tokens, heads, head_dim], into a layer's pages, to blocks and offsets."""
    if layer.dtype != torch.int8:
        layer[blocks, part, :, offsets] = rows
        return
    numbers, scales = _split(layer)
    numbers[blocks, part, :, offsets], scales[blocks, part, :, offsets] = quantized(rows)


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return [..., head_dim] as int8, and the scales [...] float32. What is not finite makes its whole row NaN."""
    rows = rows.float()
    scales = rows.abs().amax(-1) / _MOST + (rows * 0.0).sum(-1)
    scales = scales.masked_fill(scales < _LEAST_SCALE, 0.0)
    inverse = torch.where(scales > 0.0, 1.0 / scales, 0.0)
    return (rows * inverse.unsqueeze(-1)).nan_to_num_(0.0, 0.0, 0.0).round_().to(torch.int8), scales


def widened(heads: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Return heads of blocks [n, block_size * items of a row], gathered, as elements [n, block_size * head_dim]."""
    if heads.dtype != torch.int8:
        return heads.to(dtype)
    numbers, scales = _split(heads.view(len(heads), block_size, -1))
    return (numbers.float() * scales.unsqueeze(-1)).to(dtype).flatten(1)


def _split(heads: Tensor) -> tuple[Tensor, Tensor]:
    """View heads [..., block_size, items of a row]: [..., block_size, head_dim] int8, [..., block_size] float32."""
    block_size, size = heads.shape[-2], heads.shape[-2] * stored_head_dim(heads)
    flat = heads.flatten(-2)
    return flat[..., :size].view(*flat.shape[:-1], block_size, -1), flat[..., size:].view(torch.float32)
