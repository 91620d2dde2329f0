"""A kernel of Triton's that multiplies rows by matrices in few bits, which it widens in registers.

    y[r, o] = sum over groups g of scales[m, o, g] * (sum over i in g of x[r, i] * numbers[m, o, i])     (and minima)

Rows are bfloat16, or 8-bit floats with a scale for each group: these are multiplied by such as they are.

Rows are sorted by their matrices, and where each one's rows end is known on the device alone: a program finds out for
itself which tile of rows it has. There are as many programs as there could be tiles; those that have none return at
once. Numbers become bfloat16 exactly, and the sum of a group is taken and scaled in float32: only results are rounded.
8-bit floats are widened by their bits: cards before 8.9 have none.

It is compiled at first use, for each kind of numbers and size of tile (`coded.TILES`), and for any number of rows: a
rank has all of that behind it when it has warmed up. Sizes of tiles were not measured on a card.
"""

# mypy: disable-error-code="no-untyped-def, no-any-unimported, untyped-decorator"
# What Triton compiles is no Python: its functions are looked at by their source, and have no types of ours.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import Code, Codes

_OUTPUTS = 64  # of a tile
_INPUTS = 128  # at most, that are multiplied at once: all of one group

_PLAIN = tl.constexpr(Code.PLAIN.value)
_FLOAT8 = tl.constexpr(Code.FLOAT8.value)
_BYTES = tl.constexpr(Code.INT8.value)  # the last kind of numbers that have a byte or more
_E2M1 = tl.constexpr(Code.E2M1.value)  # the first kind of floats of 4 bits
_MXFP4 = tl.constexpr(Code.MXFP4.value)
_TWICE = tl.constexpr(0xC8643210)  # the sizes that three bits of such a float stand for, from the right, doubled


@triton.jit
def _tile_of_rows(ends, num_matrices, tile, MATRICES: tl.constexpr, ROWS: tl.constexpr):
    """Return a tile's matrix, or their number where there is no such tile, its first row and behind its last one."""
    each = tl.arange(0, MATRICES)
    is_one = each < num_matrices
    end = tl.load(ends + each, is_one, 0)
    start = tl.load(ends + each - 1, is_one & (each > 0), 0)
    num_tiles = (end - start + ROWS - 1) // ROWS
    tiles_end = tl.cumsum(num_tiles, 0)
    matrix = tl.sum(((tiles_end <= tile) & is_one).to(tl.int32), 0)
    is_this = each == matrix
    first = tl.sum(tl.where(is_this, start + (tile - tiles_end + num_tiles) * ROWS, 0), 0)
    return matrix, first, tl.sum(tl.where(is_this, end, 0), 0)


@triton.jit
def _widened_float8(bits):
    """Return what bytes mean as 8-bit floats (e4m3, no NaN), in float32: its exponent stands 120 higher."""
    wide = bits.to(tl.int32)
    return ((wide & 128) << 24 | (wide & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit(do_not_specialize=["num_rows"])  # else a number that is 1, or a multiple of 16, is compiled for, too
def _multiply(
    x,
    row_scales,
    order,
    ends,
    numbers,
    scales,
    minima,
    y,
    num_rows,
    num_matrices,
    num_outputs,
    num_inputs,
    group_size,
    CODE: tl.constexpr,
    HAS_ROW_SCALES: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    TYPE: tl.constexpr,
    MATRICES: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Compute a tile of results. All tensors are contiguous. `TYPE`: what is multiplied; 8-bit floats come as bytes
    where it is another.
    """
    tile = tl.program_id(0)
    if HAS_ENDS:
        matrix, first, end = _tile_of_rows(ends, num_matrices, tile, MATRICES, ROWS)
        if matrix >= num_matrices:
            return
    else:
        matrix, first, end = tile * 0, tile * ROWS, num_rows
    rows = first + tl.arange(0, ROWS)
    are_rows = rows < end
    places = tl.load(order + rows, are_rows, 0) if HAS_ORDER else rows.to(tl.int64)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    are_outputs = outputs < num_outputs
    below = matrix.to(tl.int64) * num_outputs + outputs  # each output's place among those of all matrices
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for begin in range(0, num_inputs, INPUTS):
        at = places[:, None] * num_inputs + (begin + tl.arange(0, INPUTS))[None, :]
        own = tl.load(x + at, are_rows[:, None], 0.0)
        if HAS_ROW_SCALES and tl.float8e4nv != TYPE:
            own = _widened_float8(own)
        own = own.to(TYPE)
        if CODE <= _BYTES:
            at = below[None, :] * num_inputs + (begin + tl.arange(0, INPUTS))[:, None]
            wide = tl.load(numbers + at, are_outputs[None, :], 0.0)
            if CODE == _FLOAT8 and tl.float8e4nv != TYPE:
                wide = _widened_float8(wide)
            wide = wide.to(TYPE)
        else:
            at = below[:, None] * (num_inputs // 2) + (begin // 2 + tl.arange(0, INPUTS // 2))[None, :]
            pairs = tl.load(numbers + at, are_outputs[:, None], 0).to(tl.int32)
            meant = tl.interleave(pairs & 15, pairs >> 4)
            if CODE >= _E2M1:
                twice = ((tl.full((1, 1), _TWICE, tl.uint32) >> ((meant & 7) * 4).to(tl.uint32)) & 15).to(tl.int32)
                meant = tl.where(meant < 8, twice, -twice)
            elif not HAS_MINIMA:
                meant = meant - 8
            wide = tl.trans(meant.to(tl.float32).to(TYPE))
        part = tl.dot(own, wide)
        if CODE != _PLAIN:
            at = below * (num_inputs // group_size) + begin // group_size
            scale = tl.load(scales + at, are_outputs, 0)
            if CODE == _MXFP4:  # the bits of an exponent of float32: 0 is nothing, where 2^-127 is meant
                scale = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
            if CODE >= _E2M1:
                scale = scale * 0.5
            part = part * scale[None, :]
            if HAS_ROW_SCALES:
                at_group = places * (num_inputs // group_size) + begin // group_size
                part = part * tl.load(row_scales + at_group, are_rows, 0.0)[:, None]
            if HAS_MINIMA:
                least = tl.load(minima + at, are_outputs, 0.0)
                part += tl.sum(own.to(tl.float32), 1)[:, None] * least[None, :]
        total += part
    at = rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    tl.store(y + at, total.to(tl.bfloat16), are_rows[:, None] & are_outputs[None, :])


def multiply(
    x: Tensor, row_scales: Tensor | None, codes: Codes, ends: Tensor | None, order: Tensor | None, rows: int
) -> Tensor:
    """Do as `coded.product`, in tiles of so many rows, on a device that Triton compiles for."""
    num_rows = len(x if order is None else order)
    y = torch.empty(num_rows, codes.num_outputs, dtype=torch.bfloat16, device=x.device)
    if not num_rows:
        return y
    num_tiles = -(-num_rows // rows) if ends is None else num_rows // rows + min(num_rows, codes.num_matrices)
    inputs = min(_INPUTS, codes.group_size & -codes.group_size)
    kind, numbers = _multiplied(x), codes.numbers
    if kind != tl.float8e4nv:
        x, numbers = (each.view(torch.uint8) if each.dtype == torch.float8_e4m3fn else each for each in (x, numbers))
    grid = (num_tiles, -(-codes.num_outputs // _OUTPUTS))
    _multiply[grid](
        x,
        row_scales,
        order,
        ends,
        numbers,
        codes.scales,
        codes.minima,
        y,
        num_rows,
        codes.num_matrices,
        codes.num_outputs,
        codes.num_inputs,
        codes.group_size,
        CODE=codes.code.value,
        HAS_ROW_SCALES=row_scales is not None,
        HAS_ORDER=order is not None,
        HAS_ENDS=ends is not None,
        HAS_MINIMA=codes.minima is not None,
        TYPE=kind,
        MATRICES=triton.next_power_of_2(codes.num_matrices),
        ROWS=rows,
        OUTPUTS=_OUTPUTS,
        INPUTS=inputs,
        num_warps=4 if rows < 128 else 8,
        num_stages=3,
    )
    return y


def _multiplied(x: Tensor) -> tl.dtype:
    """Return what a tensor's rows are multiplied as."""
    if not x.is_cuda:  # Triton's interpreter multiplies nothing narrower; float32 holds each of these numbers
        return tl.float32
    return tl.float8e4nv if x.dtype == torch.float8_e4m3fn else tl.bfloat16
