"""Adapters beside the experts of a mixture: what is loaded takes memory, and nothing is set aside.

A model has thousands of experts' matrices, so room for the largest rank in every slot would be gigabytes, which
adapters of attention alone never use. Here an adapter takes what it has for this rank's experts, in one piece of host
memory, once: slots point to it, and it is given back when neither a slot nor the host's cache has the adapter. A linear
of an expert has no `ExpertMatrices` before the first adapter that has something for it. Whole experts that other ranks
have are theirs to read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...common.errors import ConfigError
from ..weights.slot_matrices import AdapterWeights, ExpertMatrices, Pair, Place, scaled
from .layers import Linear
from .step_groups import StepGroups, add_groups_

# An adapter may take so much of what is free: ranks of one machine load the same one at the same time, and steps need
# room besides. Less refuses what would fit, more lets the kernel end the worker.
_SHARE = 0.5


class SparseLayer(Protocol):
    """A layer whose linears are given some of a step's rows."""

    def adapted_linears(self) -> Iterator[Linear]:
        """Yield those of this rank."""
        ...

    def adapted_modules(self) -> Iterator[str]:
        """Yield the modules' names, those of other ranks too."""
        ...


class ExpertForm(Protocol):
    """The form of experts' matrices that products are made of."""

    dtype: torch.dtype

    def make(self, linear: Linear) -> ExpertMatrices: ...

    def begin(self, num_values: int) -> None:
        """Get memory for so many values, which calls of `hold` share out."""
        ...


class ExpertSlots:
    """Implements an `AdapterSlots`' share of experts. Filled by the thread that loads, while steps run."""

    def __init__(
        self,
        layers: Sequence[SparseLayer] = (),
        form: ExpertForm | None = None,
        free_bytes: Callable[[], int] | None = None,
        refusal: str = "",
    ) -> None:
        """`form` None: adapters of experts are refused, and why. `free_bytes`: of host memory; None: unknown."""
        self._layers, self._form, self._free_bytes, self._refusal = layers, form, free_bytes, refusal
        self._modules: set[str] | None = None
        self._linears: dict[str, Linear] = {}  # by module
        self._places: dict[str, Place] = {}
        self._matrices: dict[str, ExpertMatrices] = {}
        self._in_slots: dict[int, Sequence[ExpertMatrices]] = {}

    def __contains__(self, module: str) -> bool:
        """Tell whether it is an expert's, of whatever rank."""
        if self._modules is None:
            self._modules = {name for layer in self._layers for name in layer.adapted_modules()}
            linears = [linear for layer in self._layers for linear in layer.adapted_linears()]
            self._linears = {part.module: linear for linear in linears for part in linear.parts_of_rank()}
        return module in self._modules

    def find(self, module: str) -> Place | None:
        """Return the place of an expert's module; None: another rank has it. Raises ConfigError where none may be."""
        if self._form is None:
            raise ConfigError(f"it adapts {module}; {self._refusal}")
        if module not in self._places and module in self and (linear := self._linears.get(module)) is not None:
            matrices = self._form.make(linear)
            num_inputs = linear.weight.num_inputs
            self._places |= {part.module: Place(part, num_inputs, matrices) for part in matrices.parts}
            self._matrices |= dict.fromkeys((part.module for part in matrices.parts), matrices)
        return self._places.get(module)

    def hold(self, weights: AdapterWeights, ranks: Mapping[str, int]) -> None:
        """Take memory for the modules that have a rank. Raises ConfigError where it is not there."""
        matrices = list({id(one): one for name in ranks if (one := self._matrices.get(name)) is not None}.values())
        if not matrices or self._form is None:
            return
        count = sum(one.num_values(ranks) for one in matrices)
        self._check_memory(count * self._form.dtype.itemsize)
        self._form.begin(count)
        for one in matrices:
            one.hold(weights, ranks)
        self._form.begin(0)  # an empty rest of that memory would hold all of it once nobody has the adapter
        weights.experts = tuple(matrices)

    def _check_memory(self, num_bytes: int) -> None:
        if self._free_bytes is not None and num_bytes > (share := int(_SHARE * self._free_bytes())):
            raise ConfigError(
                f"its matrices for experts take {num_bytes >> 20} MiB, of free memory {share >> 20} MiB may be taken: "
                "use a lower --max-cpu-loras, or a smaller KV cache"
            )

    def put(self, slot: int, weights: AdapterWeights) -> None:
        self.clear(slot)
        self._in_slots[slot] = weights.experts
        for matrices in weights.experts:
            matrices.put(slot, weights)

    def clear(self, slot: int) -> None:
        for matrices in self._in_slots.pop(slot, ()):
            matrices.clear(slot)


class HostFactors:
    """The base of a form whose matrices are torch's: one piece of host memory for all that an adapter has."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._rest = torch.empty(0, dtype=dtype)

    def begin(self, num_values: int) -> None:
        self._rest = torch.zeros(num_values, dtype=self.dtype)

    def take(self, *shape: int) -> Tensor:
        """Return zeros."""
        count = math.prod(shape)
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken.view(shape)


class TorchFactors(HostFactors):
    """Implements `ExpertForm`: matrices as torch multiplies by them."""

    def __init__(self, step: StepGroups, num_slots: int, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.step, self.num_slots = step, num_slots

    def make(self, linear: Linear) -> ExpertMatrices:
        linear.adapters = matrices = LinearFactors(linear, self)
        return matrices


class LinearFactors:
    """Implements `ExpertMatrices` in torch."""

    def __init__(self, linear: Linear, form: TorchFactors) -> None:
        self.parts = tuple(linear.parts_of_rank())
        self._form = form
        self._num_inputs = linear.weight.num_inputs
        self._pairs: list[list[Pair | None]] = [[None] * form.num_slots for _ in self.parts]

    def num_values(self, ranks: Mapping[str, int]) -> int:
        sizes = {part.module: self._num_inputs + part.num_outputs for part in self.parts}
        return sum(ranks[module] * size for module, size in sizes.items() if module in ranks)

    def hold(self, weights: AdapterWeights, ranks: Mapping[str, int]) -> None:
        for part in self.parts:
            if (rank := ranks.get(part.module)) is not None:
                down = self._form.take(rank, self._num_inputs)
                weights[part.module] = Pair(down, self._form.take(part.num_outputs, rank))

    def write(self, target: Tensor, matrix: Tensor, scale: float) -> None:
        target.copy_(scaled(matrix, scale))

    def put(self, slot: int, weights: AdapterWeights) -> None:
        for pairs, part in zip(self._pairs, self.parts, strict=True):
            pairs[slot] = weights.get(part.module)

    def clear(self, slot: int) -> None:
        for pairs in self._pairs:
            pairs[slot] = None

    def factors(self, index: int, slot: int) -> tuple[Tensor, Tensor] | None:
        pair = self._pairs[index][slot]
        return None if pair is None else (pair.down, pair.up)

    def add_(self, y: Tensor, x: Tensor) -> Tensor:
        return add_groups_(y, x, self._form.step, self.parts, self.factors)
