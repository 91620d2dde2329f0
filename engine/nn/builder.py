"""A `Builder` makes the tensors of a rank's model; it is handed to every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.config import ModelConfig
from ...models.parts.expert_plan import ExpertPlan
from ...models.storage import Form
from ..ranks.communicator import Communicator
from ..weights.float8 import RoundedWeight, has_products, takes
from ..weights.grouped import GroupedWeight, has_coded_products
from ..weights.weight import DenseWeight, Weight
from .states import LayerStates


@dataclass(slots=True, frozen=True)
class Builder:
    """A `Builder` holds what all blocks of one tensor-parallel rank have in common."""

    config: ModelConfig
    comm: Communicator
    dtype: torch.dtype
    device: torch.device
    expert_plan: ExpertPlan | None = None  # a rank's experts are whole ones, these; None: parts of all
    states: LayerStates | None = None  # of layers that keep one; None: no layer does

    def weight(self, modules: Sequence[str], num_outputs: int, num_inputs: int, *, num_ranks: int = 1) -> Weight:
        """Make an empty matrix of the checkpoint's `modules`, in the form that these have.

        `num_ranks`: how many share each output's inputs. Raises ConfigError where one cannot have whole groups.
        """
        is_taken = has_products(self.device) and takes(num_outputs, num_inputs, self.dtype)
        form = self._kept_float8(modules, num_inputs, is_taken=is_taken)
        if form is None and self._is_rounded(modules, is_taken=is_taken):
            return RoundedWeight.of(num_outputs, num_inputs, dtype=self.dtype, device=self.device)
        form = form or self._form(modules, num_inputs * num_ranks)
        if form is None:
            return DenseWeight(self.empty(num_outputs, num_inputs))
        form = form.of_rank(modules[0], num_inputs, num_ranks)
        return GroupedWeight.empty(num_outputs, num_inputs, form, dtype=self.dtype, device=self.device)

    def head_form(self, name: str) -> Form | None:
        """Return the form of the head's matrix, which the checkpoint has as `name`; None: plain, as on every GPU."""
        return self._form([name], self.config.hidden_size) if self.device.type == "cpu" else None

    def _kept_float8(self, modules: Sequence[str], num_inputs: int, *, is_taken: bool) -> Form | None:
        """Return the form of 8-bit floats that stay as the checkpoint has them; None: they do not, or it has none.

        `is_taken`: the device's own product of 8-bit floats takes the matrix.
        """
        quantization = self.config.quantization
        if quantization is None or self.dtype != torch.bfloat16 or not has_coded_products(self.device):
            return None
        return quantization.kept_float8(modules, num_inputs, has_products=is_taken)

    def _is_rounded(self, modules: Sequence[str], *, is_taken: bool) -> bool:
        """Tell whether a matrix is put into rows of 8-bit floats while it is loaded: one that is stored in them where
        they are multiplied by, so that it never takes the room of a plain one.
        """
        quantization = self.config.quantization
        if quantization is None:
            return False
        return quantization.rounds_to_float8(modules) or (is_taken and quantization.has_float8(modules))

    def _form(self, modules: Sequence[str], num_inputs: int) -> Form | None:
        quantization = self.config.quantization
        return None if quantization is None else quantization.form(modules, num_inputs)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)
