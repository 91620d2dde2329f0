"""GGUF's blocks of numbers, as `GroupedWeight` holds them: the same numbers, a scale for each 16 or 32 of them.

A row is a line of blocks, each with its own half-precision scale `d` (and minimum `m`, or scale of minima `dmin`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...models.storage import GGUF_KINDS
from .grouped import GroupedWeight, join_nibbles, power_of_2

# Numbers [blocks, size], scales [blocks, groups] and minima of blocks [blocks, bytes].
_Parts = tuple[Tensor, Tensor, Tensor | None]


def unpack_blocks(kind: str, rows: Tensor, dtype: torch.dtype) -> GroupedWeight:
    """Rows of blocks as the file has them, uint8 [out, bytes] -> the same weights."""
    _, num_bytes, form = GGUF_KINDS[kind]
    numbers, scales, minima = _READERS[kind](rows.reshape(-1, num_bytes))
    numbers = numbers.reshape(len(rows), -1)
    return GroupedWeight(
        join_nibbles(numbers) if form.bits == 4 else numbers,
        scales.reshape(len(rows), -1),
        None if minima is None else minima.reshape(len(rows), -1),
        dtype=dtype,
        is_e2m1=form.is_e2m1,
    )


def _halves(blocks: Tensor) -> Tensor:
    """[blocks, 2 n] bytes -> [blocks, n] float32, stored in half precision."""
    return blocks.contiguous().view(torch.float16).float()


def _low_then_high(packed: Tensor) -> Tensor:
    """[..., n] bytes -> [..., 2 n]: all low halves, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _q8_0(blocks: Tensor) -> _Parts:
    return blocks[:, 2:].contiguous().view(torch.int8), _halves(blocks[:, :2]), None


def _q4_0(blocks: Tensor) -> _Parts:
    return _low_then_high(blocks[:, 2:]), _halves(blocks[:, :2]), None


def _q4_1(blocks: Tensor) -> _Parts:
    return _low_then_high(blocks[:, 4:]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q5_0(blocks: Tensor) -> _Parts:
    numbers = _low_then_high(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4
    return numbers.to(torch.int8) - 16, _halves(blocks[:, :2]), None


def _q5_1(blocks: Tensor) -> _Parts:
    numbers = _low_then_high(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4
    return numbers.to(torch.int8), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _bits(packed: Tensor) -> Tensor:
    """[blocks, n] bytes -> [blocks, 8 n], the lowest bit of a byte first."""
    return (packed.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)


def _q4_k(blocks: Tensor) -> _Parts:
    scales, minima = _six_bit_scales(blocks)
    numbers = _low_then_high(blocks[:, 16:].reshape(-1, 4, 32))
    return numbers.flatten(1), scales, minima


def _q5_k(blocks: Tensor) -> _Parts:
    scales, minima = _six_bit_scales(blocks)
    numbers = _low_then_high(blocks[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32)
    high = _planes(blocks[:, 16:48], 1)
    return (numbers | high << 4).to(torch.int8).flatten(1), scales, minima


def _six_bit_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and minima of the 8 groups of a block: 6 bits each, in 12 bytes, times those of the block."""
    first, second, third = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), 1)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), 1)
    return scales * _halves(blocks[:, :2]), minima * -_halves(blocks[:, 2:4])


def _q6_k(blocks: Tensor) -> _Parts:
    low = _low_then_high(blocks[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
    high = _planes(blocks[:, 128:192].reshape(-1, 2, 32), 2)
    scales = blocks[:, 192:208].contiguous().view(torch.int8) * _halves(blocks[:, 208:])
    return ((low | high << 4).to(torch.int8) - 32).flatten(1), scales, None


def _q2_k(blocks: Tensor) -> _Parts:
    numbers = _planes(blocks[:, 16:80].reshape(-1, 2, 32), 2)
    scales = (blocks[:, :16] & 15) * _halves(blocks[:, 80:82])
    return numbers.flatten(1), scales, (blocks[:, :16] >> 4) * -_halves(blocks[:, 82:])


def _q3_k(blocks: Tensor) -> _Parts:
    """A bit that is not set takes 4 from a number."""
    low = _planes(blocks[:, 32:96].reshape(-1, 2, 32), 2).flatten(1)
    numbers = low + 4 * _planes(blocks[:, :32], 1).flatten(1) + 4  # 8 more than is meant
    first, second, third = blocks[:, 96:108].reshape(-1, 3, 4).unbind(1)
    both, high = torch.cat((first, second), 1), _planes(third, 2).flatten(1)
    steps = (torch.cat((both & 15, both >> 4), 1) | high << 4).to(torch.int8) - 32
    return numbers, steps * _halves(blocks[:, 108:]), None


def _planes(packed: Tensor, bits: int) -> Tensor:
    """[..., n] bytes -> [..., 8 / bits, n]: the lowest bits of all, then the next ones, and so on."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).unsqueeze(1)
    return packed.unsqueeze(-2) >> shifts & (1 << bits) - 1


def _iq4_nl(blocks: Tensor) -> _Parts:
    return _CURVE[_low_then_high(blocks[:, 2:]).int()], _halves(blocks[:, :2]), None


def _iq4_xs(blocks: Tensor) -> _Parts:
    numbers = _CURVE[_low_then_high(blocks[:, 8:].reshape(-1, 8, 16)).int()]
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), 2).flatten(1)
    high = (blocks[:, 2:4].unsqueeze(2) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8) & 3).flatten(1)
    return numbers.flatten(1), ((low | high << 4).to(torch.int8) - 32) * _halves(blocks[:, :2]), None


def _mxfp4(blocks: Tensor) -> _Parts:
    return _low_then_high(blocks[:, 1:]), power_of_2(blocks[:, :1]), None


# What 4 bits stand for in IQ4: llama.cpp's `kvalues_iq4nl`.
_CURVE = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.int8)
_READERS: dict[str, Callable[[Tensor], _Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
