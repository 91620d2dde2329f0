"""Torch's products of nibbles on CUDA (tinygemm): what they refuse, and where their layout has each number.

    bytes [n, k / 2], the first of two inputs high  ->  int32 [n / 8, k / (16 tiles), 32 lanes, tiles / 2]

A lane of a tensor core's operand holds of output `lane / 4` the inputs 2c, 2c + 1, 2c + 8, 2c + 9 of each tile of 16,
c = lane % 4. Of two tiles these are the eight nibbles of a word, as the kernel takes them out of it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_GROUPS = (32, 64, 128, 256)
# By nibble of a word, the lowest first: which tile of the two, and which input of it beside 2c.
_PLACES = ((0, 0), (0, 8), (1, 0), (1, 8), (0, 1), (0, 9), (1, 1), (1, 9))


def _check(is_so: bool, what: str) -> None:
    if not is_so:
        raise RuntimeError(f"int4: {what}")


def _check_card() -> None:
    _check(torch.cuda.get_device_capability() >= (8, 0), "not available for build")


@lru_cache
def _numbers(num_words: int) -> Tensor:
    """Return which number of a run of eight outputs each nibble is, [lanes * words * 8]."""
    numbers = [
        32 * num_words * (lane // 4) + 32 * word + 16 * tile + 2 * (lane % 4) + own
        for lane in range(32)
        for word in range(num_words)
        for tile, own in _PLACES
    ]
    return torch.tensor(numbers)


@lru_cache
def _nibbles(num_words: int) -> Tensor:
    """Return which nibble each number is: the other way round."""
    return _numbers(num_words).argsort()


def convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int) -> Tensor:
    _check_card()
    _check(weight.dim() == 2 and weight.dtype == torch.uint8 and weight.is_contiguous(), "rows of bytes are packed")
    _check(inner_k_tiles in (2, 4, 8), f"{inner_k_tiles} inner tiles")
    n, k = weight.shape[0], weight.shape[1] * 2
    _check(k % (16 * inner_k_tiles) == 0, f"{k} inputs are no multiple of {16 * inner_k_tiles}")
    _check(n % 8 == 0, f"{n} outputs: torch's meta function promises fewer tiles than CUDA's returns")
    nibbles = torch.stack((weight >> 4, weight & 15), 2).view(n // 8, 8, -1, 16 * inner_k_tiles)
    runs = nibbles.transpose(1, 2).flatten(2).index_select(2, _numbers(inner_k_tiles // 2))
    words = runs.view(*runs.shape[:2], 32, -1, 8).long()
    joined = (words << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(joined >= 2**31, joined - 2**32, joined).to(torch.int32)


def weight_int4pack_mm(x: Tensor, packed: Tensor, group_size: int, scale_and_zeros: Tensor) -> Tensor:
    _check_card()
    _check(x.dim() == 2 and x.dtype == torch.bfloat16 and x.is_contiguous(), "rows of bfloat16 side by side")
    _check(len(x) > 0, "a grid without rows is no launch")
    _check(packed.dim() == 4 and packed.dtype == torch.int32 and packed.is_contiguous(), "weights as they are packed")
    inner_k_tiles, n, k = packed.shape[3] * 2, len(packed) * 8, x.shape[1]
    _check(inner_k_tiles in (2, 4, 8) and packed.shape[2] == 32, f"a layout of {tuple(packed.shape)}")
    _check(packed.shape[1] == k // (inner_k_tiles * 16) and k % (inner_k_tiles * 16) == 0, f"{k} inputs")
    _check(group_size in _GROUPS and k % group_size == 0, f"groups of {group_size} of {k}")
    # CUDA's does not look at their type and strides: it would read other numbers.
    _check(scale_and_zeros.shape == (k // group_size, n, 2), f"scales of {tuple(scale_and_zeros.shape)}")
    _check(scale_and_zeros.dtype == torch.bfloat16 and scale_and_zeros.is_contiguous(), "scales in bfloat16, in order")
    nibbles = (packed.long().unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15  # [n / 8, runs, lanes, words, 8]
    numbers = nibbles.float().flatten(2).index_select(2, _nibbles(packed.shape[3])) - 8
    groups = numbers.view(*packed.shape[:2], 8, -1).transpose(1, 2).reshape(n, -1, group_size)
    factors = scale_and_zeros.transpose(0, 1).float()
    # Rounded once, as a fused product and sum is.
    matrix = (groups * factors[..., :1] + factors[..., 1:]).to(torch.bfloat16).reshape(n, k)
    product: Tensor = (x.float() @ matrix.float().T).to(torch.bfloat16)
    return product
