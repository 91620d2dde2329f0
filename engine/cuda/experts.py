"""Experts on CUDA: rows are sorted by their experts, and one product goes through all of these.

    choose -> sort the choices by expert -> x of each -> [gate, up] of all experts -> activation -> down -> back, summed

Where a group of rows ends is known on the device alone, and every shape follows from the number of rows: nothing is
read back, so a step can be captured. A row's sum is taken in float32, in the order of its experts, as `SparseMLP` does.

Which product of which weights a card has for that, without waiting for the host, `stacks.py` knows. What has none, and
rows that are exchanged between ranks, keep `SparseMLP`'s loop over experts, whose steps are not captured; `group` says
which.

Not run on a card: shown on an emulated device, which takes the arguments that CUDA's product takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
import torch
from torch import Tensor

from ..nn.decoder import Decoder
from ..nn.exchange import ExchangedMLP
from ..nn.experts import SparseMLP
from ..nn.feed_forward import GatedMLP
from ..nn.layers import Linear
from ..nn.stacked_experts import StackedExpert
from ..weights.weight import Weight
from . import stacks
from .adapters import RowSlots

log = structlog.get_logger(__name__)

# Rows that are sorted at once: more take more memory, for each is there once for every expert that it takes; fewer read
# the experts more often.
_ROWS = 4096


class RealRows:
    """`RealRows` tells padding from tokens, which alone are counted."""

    def __init__(self, device: torch.device) -> None:
        self.count = torch.zeros(1, dtype=torch.int64, device=device)  # of the step; 0 while graphs are captured
        self.weights = self.count  # [rows] int64: 1 or 0

    def begin(self, num_rows: int) -> None:
        places = torch.arange(num_rows, device=self.count.device)
        self.weights = (places < self.count).long()


@dataclass(frozen=True, slots=True)
class AdaptedRows:
    """Sorted rows of which some have adapters."""

    ends: Tensor  # [experts] int32, behind each expert's last row
    is_foreign: Tensor  # [rows, slots * max_rank]: no column of the row's own slot


class SortedAdapters(Protocol):
    """`SortedAdapters` are what adapters have beside one linear of each expert (`expert_adapters.py`)."""

    def add_sorted_(self, y: Tensor, x: Tensor, adapted: AdaptedRows, order: Tensor | None = None) -> None:
        """Add to [sorted rows, outputs] what they make of x. `order`: the row of x that each is; None: x is sorted."""
        ...


class GroupedExperts:
    """Computes in place of a `SparseMLP`, whose weights it has in one tensor each."""

    def __init__(self, block: SparseMLP, rows: RealRows) -> None:
        self._block = block
        self.rows = rows
        # Of [gate, up] and of down, and what tells whose rows are; None: no slot has room for experts.
        self.adapters: tuple[SortedAdapters, SortedAdapters] | None = None
        self.row_slots: RowSlots | None = None
        up, down = linears_of(block)
        num_experts, num_own, device = block.gate.experts.num_experts, len(block.experts), rows.count.device
        self._up, self._up_bias = stacks.stack(_weights(up), device), _biases(up)  # of 2 * inner outputs each
        self._down, self._down_bias = stacks.stack(_weights(down), device), _biases(down)
        block.taken = block.taken.to(device)
        self._own = torch.arange(num_own, device=device)
        # Of each expert among this rank's; behind them: another rank computes it.
        places = torch.full((num_experts + 1,), num_own)
        places[list(block.held)] = torch.arange(num_own)
        self._places = places.to(device)
        self._has_all = num_own == num_experts and block.replicas is None
        expert = block.experts[0]
        self.is_silu = isinstance(expert, GatedMLP) and expert.is_silu
        self.activate: Callable[[Tensor], Tensor] = expert.activated

    def __call__(self, x: Tensor) -> Tensor:
        block = self._block
        chosen, weights = block.gate.choose(x)
        chosen, order = chosen.sort(1)
        weights = weights.gather(1, order)
        counted = self.rows.weights.unsqueeze(1).expand_as(chosen)
        block.taken.scatter_add_(0, chosen.flatten(), counted.flatten())
        seen, weights = block.seen(x, weights)
        parts = [torch.split(each, _ROWS) for each in (seen, chosen, weights)]
        is_foreign = None if self.row_slots is None else self.row_slots.is_foreign
        foreign = [None] * len(parts[0]) if is_foreign is None else torch.split(is_foreign, _ROWS)
        totals = [self._part(*part) for part in zip(*parts, foreign, strict=True)]
        total = block.widened(totals[0] if len(totals) == 1 else torch.cat(totals))
        if block.shared is not None:
            total += block.of_shared(block.shared, x)
        return block.comm.all_reduce(total.to(x.dtype))

    @property
    def plain(self) -> SparseMLP:
        """Return the block in whose place it computes."""
        return self._block

    def _part(self, x: Tensor, chosen: Tensor, weights: Tensor, is_foreign: Tensor | None) -> Tensor:
        """[rows, hidden], and each row's experts and their weights -> this rank's part of the sum, in float32."""
        replicas = self._block.replicas
        places = self._places[chosen.flatten() if replicas is None else replicas.own(x, chosen)]
        by_expert = places.argsort(stable=True)
        experts = places[by_expert]
        ends = torch.searchsorted(experts, self._own, right=True, out_int32=True)
        order = by_expert // chosen.shape[1]
        adapted = None if is_foreign is None else AdaptedRows(ends, is_foreign[order])
        gate_up = self._up.product(x, ends, order)
        if self._up_bias is not None:
            gate_up += self._up_bias[experts]
        if self.adapters is not None and adapted is not None:
            self.adapters[0].add_sorted_(gate_up, x, adapted, order)
        activated = self.activate(gate_up)
        sorted_results = self._down.product(activated, ends)
        if self._down_bias is not None:
            sorted_results += self._down_bias[experts]
        if self.adapters is not None and adapted is not None:
            self.adapters[1].add_sorted_(sorted_results, activated, adapted)
        results = torch.empty_like(sorted_results).index_copy_(0, by_expert, sorted_results)
        if not self._has_all:  # what no expert here has computed is any number
            results.masked_fill_((places == len(self._own)).unsqueeze(1), 0.0)
        total = torch.zeros_like(x, dtype=torch.float32)
        for choice, result in enumerate(results.view(*chosen.shape, -1).unbind(1)):
            total.add_(result.float().mul_(weights[:, choice : choice + 1]))
        return total


def linears_of(block: SparseMLP) -> tuple[list[Linear], list[Linear]]:
    """Return what computes gate and up of each expert, and what computes its results."""
    return [expert.gate_up_proj for expert in block.experts], [expert.down_proj for expert in block.experts]


def _weights(linears: Sequence[Linear]) -> list[Weight]:
    return [linear.weight for linear in linears]


def _biases(linears: Sequence[Linear]) -> Tensor | None:
    """Return biases one below the other, with a row for what another rank computes; None: there are none."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return torch.stack([*biases, torch.zeros_like(biases[0])]) if biases else None


def group(decoder: Decoder, device: torch.device) -> None:
    """Have the decoder's experts computed together where this card does; say which it is."""
    blocks = [block for layer in decoder.layers if (block := layer.sparse) is not None]
    if not blocks:
        return
    reason = _obstacle(blocks, device)
    if reason:
        log.warning("experts", products="one by one", reason=reason)
        return
    rows = RealRows(device)
    for block in blocks:
        block.grouped = GroupedExperts(block, rows)
        torch.cuda.empty_cache()  # the matrices that were by themselves: the next stack needs room in one piece
    log.info("experts", products="grouped", layers=len(blocks))


def _obstacle(blocks: Sequence[SparseMLP], device: torch.device) -> str:
    if any(isinstance(block, ExchangedMLP) for block in blocks):
        return "rows are exchanged between ranks, and how many the host must know"
    if not all(block.experts for block in blocks):
        return "this rank holds none in some layer"
    apart = [each for block in blocks for each in block.experts if not isinstance(each, StackedExpert)]
    if any(linear.bias is not None for each in apart for linear in (each.gate_up_proj, each.down_proj)):
        return "they have biases"
    reasons = (stacks.obstacle(_weights(linears), device) for block in blocks for linears in linears_of(block))
    return next((reason for reason in reasons if reason), "")
