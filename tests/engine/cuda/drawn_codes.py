"""Matrices in few bits, drawn at random."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvferry.engine.cuda.codes import Code, Codes


class Form(NamedTuple):
    code: Code
    num_inputs: int
    group_size: int
    has_minima: bool = False


FORMS = (
    Form(Code.PLAIN, 96, 96),
    Form(Code.FLOAT8, 96, 96),
    Form(Code.FLOAT8, 256, 64),
    Form(Code.INT8, 96, 32, has_minima=True),
    Form(Code.INT8, 96, 96),
    Form(Code.INT4, 128, 32),
    Form(Code.INT4, 256, 128, has_minima=True),
    Form(Code.E2M1, 96, 16),
    Form(Code.MXFP4, 96, 32),
)


def draw(form: Form, num_matrices: int, num_outputs: int) -> Codes:
    code, num_inputs, group_size, has_minima = form
    groups = num_matrices, num_outputs, num_inputs // group_size
    scales: Tensor | None = torch.rand(groups) * 0.1
    if code is Code.PLAIN:
        scales = None
    elif code is Code.MXFP4:
        scales = torch.randint(118, 128, groups).to(torch.uint8)
    return Codes(
        code, _numbers(code, num_matrices, num_outputs, num_inputs), scales, torch.randn(groups) if has_minima else None
    )


def _numbers(code: Code, *shape: int) -> Tensor:
    match code:
        case Code.PLAIN:
            return torch.randn(shape).bfloat16()
        case Code.FLOAT8:
            return torch.randn(shape).to(torch.float8_e4m3fn)
        case Code.INT8:
            return torch.randint(-128, 128, shape).to(torch.int8)
    return torch.randint(0, 256, (*shape[:-1], shape[-1] // 2)).to(torch.uint8)
