"""Products that torch has for CUDA alone, as a Hopper card computes them: what CUDA's refuse is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from kvferry.engine.cuda.coded import TILES
from kvferry.engine.cuda.codes import Code, Codes
from kvferry.engine.weights.grouped import GroupedWeight

# Of the kernel of Triton's, by what it is multiplied by, and tiles: it compiles anew for each.
COMPILED: set[tuple[tuple[object, ...], int]] = set()


def mm_in_dtype(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.to(dtype) @ b.to(dtype)


def scaled_mm(
    a: Tensor,  # [m, k] float8_e4m3fn, rows side by side
    b: Tensor,  # [k, n] float8_e4m3fn, columns side by side
    scale_a: Tensor,  # [m, 1] float32
    scale_b: Tensor,  # [1, n] float32
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """Do as torch._scaled_mm with a scale for each row and each column, and refuse what CUDA's refuses."""
    (m, k), n = a.shape, b.shape[1]
    if a.dtype != torch.float8_e4m3fn or b.dtype != torch.float8_e4m3fn:
        raise RuntimeError(f"_scaled_mm of {a.dtype} and {b.dtype}")
    if a.stride() != (k, 1) or b.stride() != (1, k):
        raise RuntimeError(f"_scaled_mm: strides {a.stride()} and {b.stride()} are not row-major and column-major")
    if k % 16 or n % 16:
        raise RuntimeError(f"_scaled_mm: {k} inputs and {n} outputs are not multiples of 16")
    for scale, shape in ((scale_a, (m, 1)), (scale_b, (1, n))):
        if tuple(scale.shape) != shape or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise RuntimeError(f"_scaled_mm: a scale of {tuple(scale.shape)} {scale.dtype} is not {shape} float32")
    if out_dtype != torch.bfloat16:
        raise RuntimeError("_scaled_mm with a scale for each row: its output is bfloat16 alone")
    product = (a.float() @ b.float()) * scale_a * scale_b
    return (product if bias is None else product + bias.float()).to(out_dtype)


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Do as torch._int_mm: [m, k] times [k, n], both int8, sums in int32; refuse what CUDA's refuses."""
    (m, k), n = a.shape, b.shape[1]
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise RuntimeError(f"_int_mm of {a.dtype} and {b.dtype}")
    if m <= 16 or k % 8 or n % 8:
        raise RuntimeError(f"_int_mm: {m} rows are not more than 16, or {k} inputs and {n} outputs no multiples of 8")
    if a.stride() != (k, 1) or b.stride() != (1, k):
        raise RuntimeError(f"_int_mm: strides {a.stride()} and {b.stride()} are not row-major and column-major")
    return a.int() @ b.int()


def grouped_mm(
    a: Tensor,  # [rows, k] bfloat16
    b: Tensor,  # [groups, k, n] bfloat16
    offs: Tensor | None = None,  # [groups] int32: where the rows of each end
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Do as torch._grouped_mm on a Hopper card, and refuse what CUDA's refuses; rows of no group are any numbers."""
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16 or out_dtype not in (None, torch.bfloat16):
        raise RuntimeError(f"_grouped_mm of {a.dtype} and {b.dtype}")
    for each in (a, b):
        far, near = max(each.stride()[-2:]), min(each.stride()[-2:])
        if near != 1 or far % 8 or each.data_ptr() % 16:
            raise RuntimeError(f"_grouped_mm: strides {each.stride()} are no multiples of 16 bytes")
    return _by_groups(a, b, offs, bias)


def scaled_grouped_mm(
    a: Tensor,  # [rows, k] float8_e4m3fn, rows side by side
    b: Tensor,  # [groups, k, n] float8_e4m3fn, columns side by side
    scale_a: Tensor,  # [rows] float32
    scale_b: Tensor,  # [groups, n] float32
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """Do as torch._scaled_grouped_mm with scales of rows and columns, a kernel that Hopper cards alone have."""
    if torch.cuda.get_device_capability()[0] != 9:
        raise RuntimeError("_scaled_grouped_mm: no kernel for this card")
    if a.dtype != torch.float8_e4m3fn or b.dtype != torch.float8_e4m3fn:
        raise RuntimeError(f"_scaled_grouped_mm of {a.dtype} and {b.dtype}")
    if a.stride(1) != 1 or b.stride()[1] != 1 or a.stride(0) < a.shape[1] or b.stride(2) < b.shape[1]:
        raise RuntimeError(f"_scaled_grouped_mm: strides {a.stride()} and {b.stride()}: not row-major and column-major")
    if any(size % 16 for size in (a.shape[1], *b.shape[1:], a.stride(0), b.stride(2), a.data_ptr(), b.data_ptr())):
        raise RuntimeError(f"_scaled_grouped_mm: sizes {b.shape}, strides or places are no multiples of 16")
    for scale, shape in ((scale_a, (len(a),)), (scale_b, (len(b), b.shape[2]))):
        if tuple(scale.shape) != shape or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise RuntimeError(f"_scaled_grouped_mm: a scale {tuple(scale.shape)} {scale.dtype} is not {shape} float32")
    if out_dtype not in (None, torch.bfloat16) or scale_result is not None:
        raise RuntimeError("_scaled_grouped_mm: its output is bfloat16 alone, and has no scale")
    product = _by_groups(a.float() * scale_a.unsqueeze(1), b.float() * scale_b.unsqueeze(1), offs, bias)
    return product.bfloat16()


def coded_product(
    x: Tensor,  # [rows, k] bfloat16, or float8_e4m3fn
    row_scales: Tensor | None,  # of these: [rows, groups] float32
    code: int,
    numbers: Tensor,
    scales: Tensor | None,
    minima: Tensor | None,
    ends: Tensor | None,
    order: Tensor | None,
    tile: int,
) -> Tensor:
    """Do as the kernel of Triton's, by what the numbers stand for, and refuse what it would read beyond."""
    codes = Codes(Code(code), numbers, scales, minima)
    if tile not in TILES:
        raise RuntimeError(f"coded_product: tiles of {tile} rows")
    parts = (row_scales, minima, ends, order)
    COMPILED.add(((code, tuple(numbers.shape), codes.group_size, *(part is not None for part in parts)), tile))
    given = [each for each in (x, row_scales, numbers, scales, minima, ends, order) if each is not None]
    wanted = torch.bfloat16 if row_scales is None else torch.float8_e4m3fn
    if x.dtype != wanted or not all(each.is_contiguous() for each in given):
        raise RuntimeError(f"coded_product of {x.dtype}: its tensors have to be contiguous, and rows {wanted}")
    if row_scales is not None:
        if torch.cuda.get_device_capability() < (8, 9) or codes.code is not Code.FLOAT8 or codes.group_size % 32:
            raise RuntimeError("coded_product: no products of 8-bit floats")
        if tuple(row_scales.shape) != (len(x), codes.num_inputs // codes.group_size):
            raise RuntimeError(f"coded_product: {tuple(row_scales.shape)} scales of {tuple(x.shape)} rows")
        x = x.float() * row_scales.repeat_interleave(codes.group_size, 1)
    if codes.group_size % 16 or x.shape[1] != codes.num_inputs or (order is not None and order.dtype != torch.int64):
        raise RuntimeError(f"coded_product of {tuple(x.shape)} and {tuple(numbers.shape)} in {codes.group_size}")
    rows, matrices = (x if order is None else x[order]).float(), meant_by(codes).transpose(1, 2)
    if ends is None:
        return (rows @ matrices[0]).bfloat16()
    return _by_groups(rows, matrices, ends, None).bfloat16()


def meant_by(codes: Codes) -> Tensor:
    """Return what numbers stand for, [matrices, out, in] float32."""
    if codes.scales is None:
        return codes.numbers.float()
    is_e2m1, matrices = codes.code >= Code.E2M1, []
    for place, (numbers, scales) in enumerate(zip(codes.numbers, codes.scales, strict=True)):
        minima = None if codes.minima is None else codes.minima[place]
        weight = GroupedWeight(numbers, scales, minima, dtype=torch.bfloat16, is_e2m1=is_e2m1)
        matrices.append(weight.dequantized())
    return torch.stack(matrices)


def _by_groups(a: Tensor, b: Tensor, offs: Tensor | None, bias: Tensor | None) -> Tensor:
    """Multiply the rows of each group by its matrix; the others are any numbers."""
    if a.dim() != 2 or b.dim() != 3 or a.shape[1] != b.shape[1] or bias is not None:
        raise RuntimeError(f"_grouped_mm of {tuple(a.shape)} and {tuple(b.shape)}")
    if offs is None or offs.dtype != torch.int32 or offs.shape != (len(b),):
        raise RuntimeError("_grouped_mm: an end for each group, in int32")
    result = a.new_full((len(a), b.shape[2]), float("nan"))
    begin = 0
    for end, matrix in zip(offs.tolist(), b, strict=True):
        if end < begin or end > len(a):
            raise RuntimeError(f"_grouped_mm: rows end at {offs.tolist()} of {len(a)}")
        if end > begin:
            result[begin:end] = a[begin:end] @ matrix
        begin = end
    return result
