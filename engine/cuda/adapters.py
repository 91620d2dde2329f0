"""Adapters on CUDA: all slots' matrices are multiplied by at once, and of each row its own slot's part is kept.

    h = x A^T          A [slots * max_rank, inputs], of every slot one below the other
    h = h where the row's slot is, else 0
    y += h B           B [slots * max_rank, outputs]

So a step launches the same kernels on tensors of the same shapes whoever is in it, which a CUDA graph needs, and no row
is moved. It reads the matrices of slots that nobody asks for, too: slots * max_rank / hidden_size of what the model's
own take. A step in which no row has an adapter leaves all of this out; it has graphs of its own.

A zero times a number that is not finite is none: an adapter with such numbers is refused, as it would reach all rows.

Not run on a card: shown on an emulated device.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ...common.errors import ConfigError
from ..nn.adapters import AdaptedModel, AdapterSlots
from ..nn.layers import Linear
from ..weights.slot_matrices import AdapterWeights, Pair, scaled


class RowSlots:
    """The slots of the rows that are being computed."""

    def __init__(self, num_slots: int, max_rank: int, device: torch.device) -> None:
        self.num_slots, self.max_rank = num_slots, max_rank
        self._columns = torch.arange(num_slots, dtype=torch.int32, device=device).repeat_interleave(max_rank)
        self.is_foreign: Tensor | None = None  # [rows, slots * max_rank]; None: no row has an adapter

    def begin(self, slots: Tensor | None) -> None:
        """Take a step's slots, [rows] int32 on the device; None: no row has an adapter."""
        self.is_foreign = None if slots is None else slots.unsqueeze(1) != self._columns


def write_finite(target: Tensor, matrix: Tensor, scale: float) -> None:
    """Write `scale` times a matrix. Raises ConfigError where numbers are not finite."""
    target.copy_(scaled(matrix, scale))
    if not bool(target.isfinite().all()):
        raise ConfigError("it has numbers that are not finite, which would reach others' answers on a GPU")


class StackedMatrices:
    """Implements `SlotMatrices`."""

    def __init__(self, linear: Linear, rows: RowSlots, *, num_slots: int, max_rank: int, device: torch.device) -> None:
        self.parts = tuple(linear.parts_of_rank())
        self._rows = rows
        dtype, num_inputs = linear.weight.dtype, linear.weight.num_inputs
        self._down = torch.zeros(len(self.parts), num_slots, max_rank, num_inputs, dtype=dtype, device=device)
        self._up = [
            torch.zeros(num_slots, max_rank, part.num_outputs, dtype=dtype, device=device) for part in self.parts
        ]

    def hold(self, weights: AdapterWeights, ranks: Mapping[str, int]) -> None:
        for part, up in zip(self.parts, self._up, strict=True):
            if (rank := ranks.get(part.module)) is not None:
                down = torch.empty(rank, self._down.shape[-1], dtype=up.dtype)
                weights[part.module] = Pair(down, torch.empty(rank, up.shape[-1], dtype=up.dtype).t())

    def write(self, target: Tensor, matrix: Tensor, scale: float) -> None:
        """Raises ConfigError where numbers are not finite."""
        write_finite(target, matrix, scale)

    def put(self, slot: int, weights: AdapterWeights) -> None:
        for part, downs, ups in zip(self.parts, self._down, self._up, strict=True):
            pair, down, up = weights.get(part.module), downs[slot], ups[slot]
            rank = 0 if pair is None else len(pair.down)
            if pair is not None:
                down[:rank].copy_(pair.down)
                up[:rank].copy_(pair.up.t())
            down[rank:].zero_()
            up[rank:].zero_()

    def clear(self, slot: int) -> None:
        """Keep the memory: what is in it is copied over."""

    def add_(self, y: Tensor, x: Tensor) -> Tensor:
        is_foreign = self._rows.is_foreign
        if is_foreign is None:
            return y
        wide = x @ self._down.flatten(0, 2).t()  # [rows, parts * slots * max_rank]
        by_part = wide.view(len(x), len(self.parts), -1).masked_fill_(is_foreign.unsqueeze(1), 0.0)
        for index, (part, up) in enumerate(zip(self.parts, self._up, strict=True)):
            y[:, part.rows].addmm_(by_part[:, index], up.flatten(0, 1))
        return y


class DeviceSlots(AdapterSlots):
    """The slots of a rank's GPU. They are filled on a stream of their own, so a load waits for no step."""

    def __init__(self, model: AdaptedModel, *, num_slots: int, max_rank: int, device: torch.device) -> None:
        """Raises ConfigError where memory is too small."""
        self.rows = RowSlots(num_slots, max_rank, device)
        make = partial(StackedMatrices, rows=self.rows)
        super().__init__(model, num_slots=num_slots, max_rank=max_rank, device=device, make=make)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def put(self, slot: int, weights: AdapterWeights) -> None:
        """Return when the slot is filled."""
        with torch.cuda.stream(self._stream):
            super().put(slot, weights)
        self._stream.synchronize()

    def clear(self, slot: int) -> None:
        with torch.cuda.stream(self._stream):
            super().clear(slot)
