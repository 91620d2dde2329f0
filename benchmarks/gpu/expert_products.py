"""Products of rows that are sorted by their experts, at the shape of a Qwen3-30B-A3B, against float32 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kvferry.benchmarks.gpu.agreement import agreement, random_rows
from kvferry.common.adapter import NO_ADAPTER
from kvferry.engine.cuda.adapters import RowSlots
from kvferry.engine.cuda.expert_adapters import PartFactors
from kvferry.engine.cuda.experts import AdaptedRows
from kvferry.engine.weights.float8 import to_float8
from kvferry.engine.weights.slot_matrices import Pair

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


def check_adapted_experts(device: torch.device) -> str:
    """Rows of several adapters, and of none, among those of each expert: only their own slot's matrices count."""
    num_slots, rank, num_rows = 3, 16, sum(_GROUPS)
    slots = RowSlots(num_slots, rank, device)
    factors = PartFactors(slice(0, _EXPERT), len(_GROUPS), _HIDDEN, slots, device)
    pairs = []
    for slot in range(num_slots):
        down = random_rows(len(_GROUPS), rank, _HIDDEN, device=device, seed=30 + slot).div_(_HIDDEN**0.5)
        up = random_rows(len(_GROUPS), _EXPERT, rank, device=device, seed=40 + slot).div_(rank**0.5)
        pairs.append(Pair(down, up))
        factors.put(slot, pairs[-1])
    chosen = torch.arange(num_rows, device=device).remainder(num_slots + 1).int().add_(NO_ADAPTER)
    slots.begin(chosen)
    assert slots.is_foreign is not None
    x, ends = random_rows(num_rows, _HIDDEN, device=device, seed=18), torch.tensor(_GROUPS).cumsum(0).int().to(device)
    y = torch.zeros(num_rows, _EXPERT, dtype=torch.bfloat16, device=device)
    factors.add_(y, x, AdaptedRows(ends, slots.is_foreign), None)
    wanted = torch.zeros(num_rows, _EXPERT)
    for slot, pair in enumerate(pairs):
        own = (chosen == slot).cpu()
        made = _by_groups(x, torch.bmm(pair.up.float(), pair.down.float()))
        wanted[own] = made[own]
    return agreement(y.cpu(), wanted)


def _by_groups(x: Tensor, weights: Tensor) -> Tensor:
    """Multiply each group's rows by its matrix, in float32 on the CPU."""
    rows, matrices = torch.split(x.float().cpu(), _GROUPS), weights.float().cpu()
    return torch.cat([part @ matrix.t() for part, matrix in zip(rows, matrices, strict=True)])
