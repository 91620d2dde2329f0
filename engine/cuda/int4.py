"""Products of whole numbers of 4 and 8 bits with bfloat16: weights are read in the bits that they have.

    up to 128 rows   torch's product of nibbles (tinygemm), which widens a tile in registers
    more             the matrix is widened, some outputs at a time, and multiplied by as a plain one

A nibble stands for (nibble - 8) * scale + zero, both bfloat16, of each group of inputs. A number of 8 bits is two
nibbles, 16 high + low, as if there were twice the inputs, each fed twice: one product adds both up. Of whole rows
without minima the product is of the numbers themselves, which bfloat16 holds exactly, and the scale is the result's.

torch's own product for 8 bits (`_weight_int8pack_mm`) is not taken: on CUDA it reads all weights anew for each row.

Not run on a card: shown on an emulated device, which takes the arguments that CUDA's product takes.
"""

from __future__ import annotations

import math
from collections import Counter

import structlog
import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.quantization import CARD_ROWS
from ...models.storage import CARD_OUTPUTS
from ..nn.decoder import Decoder
from ..weights.grouped import GroupedWeight, join_nibbles
from ..weights.weight import LoadedWeight
from . import coded, int8
from .experts import linears_of

log = structlog.get_logger(__name__)

_TILE_INPUTS = 16
_MOST_TILES = 8  # of inputs, that a lane loads at once
_MIN_CAPABILITY = (8, 0)  # the product's instructions are these cards'
_WIDENED = 1 << 26  # numbers that are widened at once: 128 MiB, whatever the matrix; fewer are smaller products
_SIGNS = -0x78  # both nibbles' highest bits: flipped, a nibble that stands 8 too high is a signed one

_TAKEN = "multiplied as they are: whole numbers in groups of 32 inputs or multiples, outputs multiples of 8"


class Int4Weight(LoadedWeight):
    """Implements `Weight`, of a rank whose weights are loaded."""

    def __init__(self, grouped: GroupedWeight) -> None:
        """`grouped`: one that `takes` takes; it is given up here."""
        weight = grouped.take()
        self.num_outputs, self.num_inputs, self.dtype = weight.num_outputs, weight.num_inputs, weight.dtype
        self.bits = weight.bits
        self._order = None if weight.order is None else weight.order.to(weight.numbers.device)
        # Of the result, [out] float32; None: scales are the groups' own.
        self._scales = weight.scales[:, 0].clone() if _is_of_whole_rows(weight) else None
        self._group_size = weight.form.card_group
        self._factors = torch.cat(_factors(weight, self._group_size), 1).transpose(0, 1).contiguous()
        bytes_ = torch.cat(_halves(weight.numbers), 1) if weight.bits == 8 else weight.numbers
        num_tiles = math.gcd(_MOST_TILES, bytes_.shape[1] * 2 // _TILE_INPUTS)
        # torch's kernel takes the first of two inputs in the high half.
        turned = (bytes_ << 4) | (bytes_ >> 4)
        self._packed = torch.ops.aten._convert_weight_to_int4pack(turned, num_tiles)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not len(x):
            return x.new_empty(0, self.num_outputs)
        x = x.contiguous() if self._order is None else x.index_select(1, self._order)
        if len(x) > CARD_ROWS:
            y = self._widened_product(x)
        else:
            x = x if self.bits == 4 else torch.cat((x, x), 1)
            y = torch.ops.aten._weight_int4pack_mm(x, self._packed, self._group_size, self._factors)
        if self._scales is not None:
            y.mul_(self._scales)
        return y if bias is None else y.add_(bias)

    def _widened_product(self, x: Tensor) -> Tensor:
        tiles = max(1, _WIDENED // (self._factors.shape[0] * self._group_size * CARD_OUTPUTS))
        starts = range(0, len(self._packed), tiles)
        parts = [F.linear(x, self._widened(start, min(start + tiles, len(self._packed)))) for start in starts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _widened(self, start: int, stop: int) -> Tensor:
        """Return the numbers of some tiles of outputs, [out, in], that the product of few rows makes in registers."""
        packed = self._packed[start:stop]
        num_tiles, num_runs, _, words = packed.shape
        # In memory: tiles of 8 outputs, runs of inputs; in these output, pair of neighbours, the two tiles of 16 inputs
        # of a word; in a word the second of a pair, the second tile, and in a byte the inputs 8 further on.
        flipped = (packed.view(torch.int8) ^ _SIGNS).view(num_tiles, num_runs, CARD_OUTPUTS, 4, words, 2, 2)
        wide = torch.empty(num_tiles, CARD_OUTPUTS, num_runs, words, 2, 2, 4, 2, dtype=self.dtype, device=packed.device)
        places = wide.permute(5, 0, 2, 1, 6, 3, 7, 4)
        places[0].copy_((flipped << 4) >> 4)
        places[1].copy_(flipped >> 4)
        rows = slice(start * CARD_OUTPUTS, stop * CARD_OUTPUTS)
        factors = self._factors[:, rows].transpose(0, 1)  # [out, groups, 2]
        groups = wide.view(num_tiles * CARD_OUTPUTS, -1, self._group_size)
        matrix = torch.addcmul(factors[..., 1:], groups, factors[..., :1], out=groups).flatten(1)
        return matrix if self.bits == 4 else matrix[:, : self.num_inputs].add_(matrix[:, self.num_inputs :])


def takes(weight: GroupedWeight) -> bool:
    """Tell whether torch's product multiplies by it: of whole tiles, in groups of 32 inputs or multiples of them."""
    is_whole = weight.num_outputs % CARD_OUTPUTS == 0 and weight.form.card_group > 0
    return is_whole and weight.dtype == torch.bfloat16


def _is_of_whole_rows(weight: GroupedWeight) -> bool:
    return weight.minima is None and weight.group_size == weight.num_inputs


def _halves(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers of 8 bits [out, in] -> high nibbles, 8 added, and low ones, each [out, in / 2] bytes."""
    raised = numbers.view(torch.uint8) ^ 128
    return join_nibbles(raised >> 4), join_nibbles(raised & 15)


def _factors(weight: GroupedWeight, group_size: int) -> list[Tensor]:
    """Return scale and zero of each group, [out, groups, 2] bfloat16; of 8 bits the high nibbles', then the low ones'.

    Of 8 bits w = 16 high + low, and low is taken 8 less than it is. What is missing is shared out so that bfloat16
    holds both nibbles' numbers exactly where the scale is 1.
    """
    scales = torch.ones_like(weight.scales) if _is_of_whole_rows(weight) else weight.scales
    minima = torch.zeros_like(scales) if weight.minima is None else weight.minima
    if weight.bits == 4:
        pairs = [(scales, minima if weight.minima is None else minima + 8 * scales)]
    else:
        pairs = [(16 * scales, minima + 7.5 * scales), (scales, 0.5 * scales)]
    repeats = weight.group_size // group_size
    return [torch.stack(pair, 2).repeat_interleave(repeats, 1).to(weight.dtype) for pair in pairs]


def pack(decoder: Decoder, device: torch.device) -> None:
    """Trade loaded whole numbers for such, one by one, and say how many matrices are multiplied by in which way.

    Experts that are computed together have theirs already. Of 8 bits with a scale for each output: `int8.py`. Those
    that torch's product does not take are widened in registers (`coded.py`), or else in every product.
    """
    is_there = torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY
    counts = Counter[str]()
    blocks = [block for layer in decoder.layers if (block := layer.sparse) is not None and block.grouped is not None]
    together = {id(linear) for block in blocks for linears in linears_of(block) for linear in linears}
    for linear in decoder.linears():
        weight = linear.weight
        if not isinstance(weight, GroupedWeight) or id(linear) in together:
            continue
        if is_there and int8.takes(weight) and not coded.obstacle([weight], device):
            counts["int8"] += 1
            linear.weight = int8.Int8Weight(weight)
        elif is_there and takes(weight):
            counts[f"int{weight.bits}"] += 1
            linear.weight = Int4Weight(weight)
        elif not coded.obstacle([weight], device):
            linear.weight = coded_weight = coded.CodedWeight(weight)
            counts["fp8" if coded_weight.codes.rounds_rows else "in_registers"] += 1
        else:
            counts["widened"] += 1
    if counts:
        reason = _TAKEN if is_there else "an older card"
        tell = log.warning if counts["widened"] else log.info
        tell("quantized_weights", **counts, **({"reason": reason} if counts["widened"] else {}))
