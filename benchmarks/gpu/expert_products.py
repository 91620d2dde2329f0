"""Products of rows that are sorted by their experts, at the shape of a Qwen3-30B-A3B, against float32 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kvferry.benchmarks.gpu.agreement import agreement, random_rows
from kvferry.engine.weights.float8 import to_float8

_HIDDEN, _EXPERT = 2048, 768
_GROUPS = [0, 5, 1, 300, 0, 64, 2]  # rows of each expert


def check_experts(device: torch.device) -> str:
    """Groups of any size, also none, through one product; what lies behind the last group is not looked at."""
    num_rows, ends = sum(_GROUPS), torch.tensor(_GROUPS).cumsum(0).int().to(device)
    x = random_rows(num_rows + 7, _HIDDEN, device=device, seed=14)
    weights = random_rows(len(_GROUPS), _EXPERT, _HIDDEN, device=device, seed=15).div_(_HIDDEN**0.5)
    y = torch._grouped_mm(x, weights.transpose(1, 2), offs=ends)[:num_rows]
    return agreement(y.cpu(), _by_groups(x[:num_rows], weights))


def check_float8_experts(device: torch.device) -> str:
    """The same in 8-bit floats, with a scale for each row and each output of an expert."""
    num_rows, ends = sum(_GROUPS), torch.tensor(_GROUPS).cumsum(0).int().to(device)
    x, row_scales = to_float8(random_rows(num_rows + 7, _HIDDEN, device=device, seed=16))
    plain = random_rows(len(_GROUPS), _EXPERT, _HIDDEN, device=device, seed=17).div_(_HIDDEN**0.5)
    numbers, scales = to_float8(plain.flatten(0, 1))
    weights, scales = numbers.view(plain.shape), scales.view(len(_GROUPS), _EXPERT)
    y = torch._scaled_grouped_mm(x, weights.transpose(1, 2), row_scales.flatten(), scales, offs=ends)[:num_rows]
    return agreement(y.cpu(), _by_groups((x.float() * row_scales)[:num_rows], weights.float() * scales.unsqueeze(2)))


def _by_groups(x: Tensor, weights: Tensor) -> Tensor:
    """Multiply each group's rows by its matrix, in float32 on the CPU."""
    rows, matrices = torch.split(x.float().cpu(), _GROUPS), weights.float().cpu()
    return torch.cat([part @ matrix.t() for part, matrix in zip(rows, matrices, strict=True)])
