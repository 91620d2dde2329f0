"""Adapters of experts on CUDA: each slot has room for all of a rank's experts, and all slots are multiplied by.

    h = x A^T          A [experts, slots * max_rank, inputs], of an expert every slot's one below the other
    h = h where the row's slot is, else 0
    y += h B^T         B [experts, outputs, slots * max_rank]

Rows are sorted by expert already, and go through these as they go through the experts' own matrices (`stacks.py`). As
in `adapters.py`, what is launched depends on the number of rows alone. Of each expert that is read, all slots' matrices
are: slots * max_rank * (inputs + outputs) numbers beside inputs * outputs.

A part of an adapter is in host memory as a slot has it, so that one copy fills a layer's: there are thousands of
experts.

Not run on a card: shown on an emulated device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.errors import ConfigError
from ...models.adapter import expert_columns
from ..nn.expert_adapters import HostFactors
from ..nn.layers import Linear
from ..weights.slot_matrices import AdapterWeights, ExpertMatrices, Pair
from . import stacks
from .adapters import RowSlots, write_finite
from .experts import AdaptedRows, GroupedExperts, linears_of


class PartFactors:
    """One module's matrices, such as gate's, of all of a rank's experts in all slots."""

    def __init__(self, rows: slice, num_experts: int, num_inputs: int, slots: RowSlots, device: torch.device) -> None:
        """`rows`: of what the experts' linear yields, outputs of this module."""
        self.rows, self.num_outputs = rows, rows.stop - rows.start
        self._max_rank = slots.max_rank
        width = expert_columns(slots.num_slots, slots.max_rank)  # those behind the slots' stay zero
        down = torch.zeros(num_experts, width, num_inputs, dtype=torch.bfloat16, device=device)
        up = torch.zeros(num_experts, self.num_outputs, width, dtype=torch.bfloat16, device=device)
        self._downs, self._ups = down, up
        self._down, self._up = stacks.plain(down), stacks.plain(up)

    def _of_slot(self, slot: int) -> tuple[Tensor, Tensor]:
        """Return A [experts, max_rank, inputs] and B [experts, outputs, max_rank]."""
        first = slot * self._max_rank
        return self._downs[:, first : first + self._max_rank], self._ups[:, :, first : first + self._max_rank]

    def put(self, slot: int, pair: Pair) -> None:
        """Take the experts' matrices. `pair`: A [experts, rank, inputs], B [experts, outputs, rank]."""
        down, up = self._of_slot(slot)
        rank = pair.down.shape[1]
        down[:, :rank].copy_(pair.down)
        up[:, :, :rank].copy_(pair.up)

    def clear(self, slot: int) -> None:
        for each in self._of_slot(slot):
            each.zero_()

    def add_(self, y: Tensor, x: Tensor, adapted: AdaptedRows, order: Tensor | None) -> None:
        h = self._down.product(x, adapted.ends, order)
        h[:, : adapted.is_foreign.shape[1]].masked_fill_(adapted.is_foreign, 0.0)
        y[:, self.rows] += self._up.product(h, adapted.ends)


@dataclass(frozen=True, slots=True)
class _Place:
    """A `_Place` says where a module of one expert is in its stack."""

    part: int
    expert: int


class StackFactors:
    """Implements `ExpertMatrices` for the same linear of all of a rank's experts."""

    def __init__(self, linears: Sequence[Linear], slots: RowSlots, form: DeviceFactors) -> None:
        of_experts = [list(linear.parts_of_rank()) for linear in linears]
        self.parts = tuple(part for parts in of_experts for part in parts)
        self._form, self._num_inputs = form, linears[0].weight.num_inputs
        self._places = {
            each.module: _Place(part, expert)
            for expert, parts in enumerate(of_experts)
            for part, each in enumerate(parts)
        }
        self._of_parts = [
            PartFactors(part.rows, len(linears), self._num_inputs, slots, form.device) for part in of_experts[0]
        ]
        self._num_experts = len(linears)

    def _ranks(self, ranks: Mapping[str, int]) -> dict[int, int]:
        """Return the largest rank of each part that is adapted, whichever its expert is."""
        found: dict[int, int] = {}
        for module, place in self._places.items():
            if module in ranks:
                found[place.part] = max(ranks[module], found.get(place.part, 0))
        return found

    def num_values(self, ranks: Mapping[str, int]) -> int:
        sizes = [self._num_inputs + part.num_outputs for part in self._of_parts]
        return sum(self._num_experts * rank * sizes[part] for part, rank in self._ranks(ranks).items())

    def hold(self, weights: AdapterWeights, ranks: Mapping[str, int]) -> None:
        wholes = {}
        for index, rank in self._ranks(ranks).items():
            down = self._form.take(self._num_experts, rank, self._num_inputs)
            wholes[index] = Pair(down, self._form.take(self._num_experts, self._of_parts[index].num_outputs, rank))
        for module, place in self._places.items():
            if (own := ranks.get(module)) is not None:
                whole = wholes[place.part]
                weights[module] = Pair(whole.down[place.expert, :own], whole.up[place.expert, :, :own])
        weights.stacked[self.parts[0].module] = wholes

    def write(self, target: Tensor, matrix: Tensor, scale: float) -> None:
        """Raises ConfigError where numbers are not finite."""
        write_finite(target, matrix, scale)

    def put(self, slot: int, weights: AdapterWeights) -> None:
        """Fill what is clear."""
        for index, pair in weights.stacked[self.parts[0].module].items():
            self._of_parts[index].put(slot, pair)

    def clear(self, slot: int) -> None:
        for part in self._of_parts:
            part.clear(slot)

    def add_(self, y: Tensor, x: Tensor) -> Tensor:
        raise AssertionError("experts are computed together")

    def add_sorted_(self, y: Tensor, x: Tensor, adapted: AdaptedRows, order: Tensor | None = None) -> None:
        for part in self._of_parts:
            part.add_(y, x, adapted, order)


class DeviceFactors(HostFactors):
    """Implements `ExpertForm`: slots in a GPU's memory, for the experts that it computes together."""

    def __init__(self, blocks: Iterable[GroupedExperts], slots: RowSlots, device: torch.device) -> None:
        """Raises ConfigError where memory is too small."""
        super().__init__(torch.bfloat16)
        self.device = device
        self._of_linears: dict[int, StackFactors] = {}
        try:
            for block in blocks:
                gate_up, down = (self._stack(linears, slots) for linears in linears_of(block.plain))
                block.adapters = gate_up, down
                block.row_slots = slots
        except RuntimeError as error:
            raise ConfigError(f"adapters of experts do not fit beside the model: {error}") from error

    def _stack(self, linears: Sequence[Linear], slots: RowSlots) -> StackFactors:
        factors = StackFactors(linears, slots, self)
        self._of_linears |= dict.fromkeys(map(id, linears), factors)
        return factors

    def make(self, linear: Linear) -> ExpertMatrices:
        return self._of_linears[id(linear)]
