"""Any thread asks how often each expert was chosen, and waits for no step, not even for one on a GPU."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..wire.workers import ExpertCounts, ExpertLoads
from .nn.decoder import Decoder
from .nn.experts import SparseMLP


class ExpertCounters:
    """`ExpertCounters` reads what a decoder's sparse layers have counted."""

    def __init__(self, decoder: Decoder) -> None:
        """Experts are grouped by now, and no graph is captured: counters on a GPU move into one tensor."""
        blocks = enumerate(layer.sparse for layer in decoder.layers)
        self.blocks = {layer: block for layer, block in blocks if block is not None}  # by layer
        counted = [block for block in self.blocks.values() if block.taken.is_cuda]
        self._device = _DeviceCounters(counted) if counted else None
        assert len(counted) in (0, len(self.blocks)), "experts are grouped in all layers or in none"

    def end_step(self) -> None:
        """Have the counts of a step that has ended come to the host. On the engine's thread."""
        if self._device is not None:
            self._device.send()

    def loads(self) -> ExpertLoads:
        """Return how often each sparse layer's experts were chosen, of a GPU until a step that ended lately."""
        # On a CPU a step may go on counting meanwhile.
        blocks = self.blocks.values()
        counts = [block.taken.clone() for block in blocks] if self._device is None else self._device.landed()
        return tuple(
            ExpertCounts(layer, tuple(own.tolist()), tuple(block.of_ranks(own)))
            for (layer, block), own in zip(self.blocks.items(), counts, strict=True)
        )


class _DeviceCounters:
    """Counters on a GPU: one copy takes all of them to one of two places in pinned memory; the other has landed."""

    def __init__(self, blocks: list[SparseMLP]) -> None:
        self._counts = torch.stack([block.taken for block in blocks])  # [layers, experts]
        for block, own in zip(blocks, self._counts.unbind(), strict=True):
            block.taken = own
        self._coming, self._landed = (
            torch.zeros(self._counts.shape, dtype=self._counts.dtype, pin_memory=True) for _ in range(2)
        )
        self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()  # held for as long as a copy within the host's memory takes

    def send(self) -> None:
        """Queue a copy, unless the one before is still on its way."""
        with self._lock:
            if self._has_come():
                self._coming, self._landed = self._landed, self._coming
                self._coming.copy_(self._counts, non_blocking=True)
                self._sent.record()

    def landed(self) -> tuple[Tensor, ...]:
        with self._lock:
            return (self._coming if self._has_come() else self._landed).clone().unbind()

    def _has_come(self) -> bool:
        has_come: bool = self._sent.query()  # type: ignore[no-untyped-call]
        return has_come
