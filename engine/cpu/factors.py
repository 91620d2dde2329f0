"""Scales and minima of quantized weights in the fewest bytes that say exactly the same: they are read with every token.

    float32     any
    half        what GPTQ, AWQ, Q4_0 and Q8_0 store
    a byte      times a base that several groups share: what the formats with blocks of 256 inputs store (Q4_K, Q6_K)
                or the exponent of a power of 2: MXFP4's
                or a float of 8 bits (e4m3), times a base that all groups of an output share: NVFP4's

A kernel gets the same numbers back from each.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

_SPANS = (8, 16)  # groups that share a base: 256 inputs of Q4_K, Q5_K and IQ4_XS, of Q2_K, Q3_K and Q6_K
_EXPONENT = 0x7F800000  # of a float32's bits
_SAMPLE = 64  # rows that are tried first: a matrix that is of another kind shows it there
# What the largest factor of a span may be in bases: these formats scale it to 63 or to -128, whatever its sign. Others
# are tried after them, in case a file was written otherwise.
_STEPS = (63, -128, 127, *range(62, 0, -1))


class Factors(NamedTuple):
    """Each group's scale, and maybe its minimum."""

    # [outputs, groups] each, all of one type: float32, float16, int8, or uint8, which is an exponent or, times a base,
    # an e4m3.
    values: list[Tensor]
    bases: list[Tensor]  # float32 [outputs, groups / span] each, if there are any
    span: int  # groups that share a base; 0: values are the factors themselves


def smallest(factors: list[Tensor]) -> Factors:
    """Choose among the forms of float32 [outputs, groups]."""
    if (short := _as_halves(factors)) is not None:
        return short
    num_groups = factors[0].shape[1]
    for span in _SPANS:
        if num_groups % span == 0 and all(_in_steps(values[:_SAMPLE], span) for values in factors):
            found = [_in_steps(values, span) for values in factors]
            if all(found):
                return Factors([one.steps for one in found if one], [one.bases for one in found if one], span)
    return Factors([values.contiguous() for values in factors], [], 0)


def halves(scales: Tensor) -> Factors:
    """Return half of each, for numbers that are multiplied as twice what they mean.

    Powers of 2 become exponents; half of 2^-126 then is zero.
    """
    bits = scales.contiguous().view(torch.int32)
    if not bool((bits & ~_EXPONENT).any()):
        return Factors([((bits >> 23) - 1).clamp_(min=0).to(torch.uint8)], [], 0)
    half = (scales / 2).contiguous()
    if _as_floats(half[:_SAMPLE]) is not None and (found := _as_floats(half)) is not None:
        return found
    return _as_halves([half]) or Factors([half], [], 0)


def _as_halves(factors: list[Tensor]) -> Factors | None:
    short = [values.half().contiguous() for values in factors]
    are_same = all(torch.equal(half.float(), values) for half, values in zip(short, factors, strict=True))
    return Factors(short, [], 0) if are_same else None


def _as_floats(scales: Tensor) -> Factors | None:
    """Find for each output a base of whose products with floats of 8 bits, rounded, all of its scales are.

    The largest is a product with 240 to 448, as powers of 2 do not matter; a quotient that was rounded may be next to
    the base.
    """
    if bool((scales < 0).any()):
        return None
    most = scales.amax(1, keepdim=True)
    floats, bases = torch.zeros(scales.shape, dtype=torch.float8_e4m3fn), torch.zeros_like(most)
    left = torch.arange(len(scales))
    for largest, end in itertools.product((*range(448, 224, -32), 240), (None, 0.0, torch.inf)):
        base = most[left] / largest
        if end is not None:
            base = base.nextafter(torch.tensor(end))
        tried = (scales[left] / base).nan_to_num_().clamp_(max=448).to(torch.float8_e4m3fn)
        fits = (tried.float() * base == scales[left]).all(1)
        floats[left[fits]], bases[left[fits]] = tried[fits], base[fits]
        left = left[~fits]
    return None if len(left) else Factors([floats.view(torch.uint8)], [bases], scales.shape[1])


class _Stepped(NamedTuple):
    steps: Tensor  # int8 [outputs, groups]
    bases: Tensor  # float32 [outputs, groups / span]


def _in_steps(factors: Tensor, span: int) -> _Stepped | None:
    """Find for each span of groups a base whose exact whole multiples its factors are; None where one has none."""
    spans = factors.reshape(-1, span)
    most = spans.gather(1, spans.abs().argmax(1, keepdim=True))  # with its sign
    steps, bases = torch.zeros_like(spans, dtype=torch.int8), torch.zeros_like(most)
    left = most.squeeze(1).nonzero().squeeze(1)  # the others are zeros
    for step in _STEPS:
        base = most[left] / step
        whole = (spans[left] / base).round_().clamp_(-128, 127)
        fits = (whole * base == spans[left]).all(1)
        steps[left[fits]], bases[left[fits]] = whole[fits].to(torch.int8), base[fits]
        left = left[~fits]
        if not len(left):
            return _Stepped(steps.view(factors.shape), bases.view(len(factors), -1))
    return None
