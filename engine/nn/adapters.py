"""Adapters beside a rank's linears: memory for a number of them, and what each adds to its rows of a step.

    y[rows] += (x[rows] A^T) B^T      A [rank, inputs], B [outputs, rank] with the adapter's scale in it

Slots are allocated once, at the largest rank, so that a load finds memory. A linear that is fused of several modules
has a pair of matrices for each of them. Of a module that ranks share, A is cut like the inputs and B like the outputs:
what a rank adds belongs into the sum over the ranks that there is anyway. Rows without an adapter are not touched.
Nothing is set aside for experts (`expert_adapters.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...common.errors import ConfigError
from ...models.adapter import AdaptedModule, StoredTensor, check_pair, read_adapter
from ..weights.slot_matrices import AdapterWeights, Pair, Place, SlotMatrices, scaled
from .expert_adapters import ExpertSlots
from .layers import Linear
from .step_groups import StepGroups, add_groups_

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_RANK_STEP = 16  # ranks are computed in whole ones of it, with zeros behind: products of few different shapes


class LinearAdapters:
    """Implements `SlotMatrices` in torch."""

    def __init__(self, linear: Linear, step: StepGroups, *, num_slots: int, max_rank: int, device: torch.device):
        self.parts = tuple(linear.parts_of_rank())
        self._step = step
        dtype, num_inputs = linear.weight.dtype, linear.weight.num_inputs
        sizes = [part.num_outputs for part in self.parts]
        self.down = [torch.zeros(num_slots, max_rank, num_inputs, dtype=dtype, device=device) for _ in sizes]
        self.up = [torch.zeros(num_slots, size, max_rank, dtype=dtype, device=device) for size in sizes]
        self.ranks = [[0] * num_slots for _ in sizes]  # 0: this part is not adapted

    def hold(self, weights: AdapterWeights, ranks: Mapping[str, int]) -> None:
        for part, downs, ups in zip(self.parts, self.down, self.up, strict=True):
            if (rank := ranks.get(part.module)) is not None:
                weights[part.module] = Pair(
                    torch.empty(rank, downs.shape[2], dtype=downs.dtype),
                    torch.empty(ups.shape[1], rank, dtype=ups.dtype),
                )

    def write(self, target: Tensor, matrix: Tensor, scale: float) -> None:
        target.copy_(scaled(matrix, scale))

    def clear(self, slot: int) -> None:
        """Keep the memory: what is in it is copied over."""

    def put(self, slot: int, weights: AdapterWeights) -> None:
        for index, part in enumerate(self.parts):
            pair = weights.get(part.module)
            if pair is None:
                self.ranks[index][slot] = 0
                continue
            rank = len(pair.down)
            padded = min(-(-rank // _RANK_STEP) * _RANK_STEP, self.down[index].shape[1])
            down, up = self.down[index][slot], self.up[index][slot]
            down[:rank].copy_(pair.down)
            down[rank:padded] = 0
            up[:, :rank].copy_(pair.up)
            up[:, rank:padded] = 0
            self.ranks[index][slot] = padded

    def factors(self, index: int, slot: int) -> tuple[Tensor, Tensor] | None:
        rank = self.ranks[index][slot]
        return None if rank == 0 else (self.down[index][slot, :rank], self.up[index][slot, :, :rank])

    def add_(self, y: Tensor, x: Tensor) -> Tensor:
        return add_groups_(y, x, self._step, self.parts, self.factors)


class AdaptedModel(Protocol):
    """A model that has linears."""

    def linears(self) -> Iterator[Linear]: ...


class AdapterSlots:
    """All slots of a rank. Who fills one sees to it that no step uses it meanwhile."""

    def __init__(
        self,
        model: AdaptedModel,
        *,
        num_slots: int,
        max_rank: int,
        device: torch.device,
        make: Callable[..., SlotMatrices] | None = None,
    ) -> None:
        """`make`: another form of a linear's matrices than torch's. Raises ConfigError where memory is too small."""
        self.num_slots, self.max_rank = num_slots, max_rank
        self.step = StepGroups()
        self.linears: list[SlotMatrices] = []
        self._make = make or partial(LinearAdapters, step=self.step)
        self._parts: dict[str, Place] = {}  # by module
        self.experts = ExpertSlots()  # whoever has some puts others here
        try:
            for linear in model.linears():
                if not linear.takes_some_rows and any(True for _ in linear.parts_of_rank()):
                    self._adapt(linear, device)
        except (RuntimeError, MemoryError) as error:
            raise ConfigError(f"{num_slots} adapters of rank {max_rank} do not fit: {error}") from error

    def _adapt(self, linear: Linear, device: torch.device) -> None:
        linear.adapters = self._make(linear, num_slots=self.num_slots, max_rank=self.max_rank, device=device)
        self.linears.append(linear.adapters)
        num_inputs = linear.weight.num_inputs
        self._parts |= {part.module: Place(part, num_inputs, linear.adapters) for part in linear.adapters.parts}

    def read(self, path: Path) -> tuple[str, AdapterWeights]:
        """Read this rank's share of an adapter from its files, and the digest of all of both. Raises ConfigError."""
        weights = AdapterWeights()
        adapter = read_adapter(path, partial(self._hold, weights), partial(self._take, weights))
        return adapter.digest, weights

    def _hold(self, weights: AdapterWeights, modules: Sequence[AdaptedModule]) -> None:
        of_experts = {}
        for module in modules:
            if (place := self._parts.get(module.name)) is None:
                if module.name not in self.experts:
                    raise ConfigError(f"it adapts {module.name}, to which no adapter is applied")
                place = self.experts.find(module.name)
                of_experts[module.name] = module.rank
            if place is not None:
                check_pair(module, place.part.shape)
            if module.rank > self.max_rank:
                raise ConfigError(f"its rank is {module.rank}; --max-lora-rank is {self.max_rank}")
        ranks = {module.name: module.rank for module in modules}
        for linear in self.linears:
            linear.hold(weights, ranks)
        self.experts.hold(weights, of_experts)

    def _take(self, weights: AdapterWeights, module: AdaptedModule, stored: StoredTensor, data: memoryview) -> None:
        if (place := self._parts.get(module.name) or self.experts.find(module.name)) is None:
            return  # another rank has this expert
        part, num_inputs, matrices = place
        matrix = torch.frombuffer(data, dtype=_DTYPES[stored.dtype]).view(stored.shape)
        pair = weights[module.name]
        if stored is module.down:
            matrices.write(pair.down, matrix[:, part.first_input : part.first_input + num_inputs], 1.0)
            return
        outputs = [matrix[some] for some in part.outputs]
        matrix = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        matrices.write(pair.up, matrix, module.scale)

    def clear(self, slot: int) -> None:
        """Empty a slot that no step uses."""
        for linear in self.linears:
            linear.clear(slot)
        self.experts.clear(slot)

    def put(self, slot: int, weights: AdapterWeights) -> None:
        """Fill a slot that no step uses."""
        for linear in self.linears:
            linear.put(slot, weights)
        self.experts.put(slot, weights)
