"""A `Builder` makes the tensors of a rank's model; it is handed to every block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.config import ModelConfig
from ..ranks.group import Communicator
from .weight import DenseWeight, Weight


@dataclass(slots=True, frozen=True)
class Builder:
    """A `Builder` holds what all blocks of one tensor-parallel rank have in common."""

    config: ModelConfig
    comm: Communicator
    dtype: torch.dtype
    device: torch.device

    def weight(self, num_outputs: int, num_inputs: int) -> Weight:
        """Make an empty matrix of a linear, in the scheme in which the checkpoint stores those."""
        return DenseWeight(self.empty(num_outputs, num_inputs))

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)
