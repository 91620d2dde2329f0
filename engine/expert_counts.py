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
        counters = [block.taken for block in self.blocks.values()] if self._device is None else self._device.landed()
        counts = [own.clone() for own in counters]  # a step may go on counting meanwhile
        return tuple(
            ExpertCounts(layer, tuple(own.tolist()), tuple(block.of_ranks(own)))
            for (layer, block), own in zip(self.blocks.items(), counts, strict=True)
        )


class _DeviceCounters:
    """Counters on a GPU, all of which go to pinned memory in one copy, and from there once that has landed."""

    def __init__(self, blocks: list[SparseMLP]) -> None:
        self._counts = torch.stack([block.taken for block in blocks])  # [layers, experts]
        for block, own in zip(blocks, self._counts.unbind(), strict=True):
            block.taken = own
        self._pinned = torch.zeros(self._counts.shape, dtype=self._counts.dtype, pin_memory=True)
        self._landed = torch.zeros_like(self._pinned)
        self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()  # held for as long as a few copies within the host's memory take

    def send(self) -> None:
        """Queue a copy, unless the one before is still on its way."""
        with self._lock:
            if self._take():
                self._pinned.copy_(self._counts, non_blocking=True)
                self._sent.record()

    def landed(self) -> tuple[Tensor, ...]:
        with self._lock:
            self._take()
            return self._landed.clone().unbind()

    def _take(self) -> bool:
        """Tell whether nothing is on its way, and take what has landed."""
        has_landed: bool = self._sent.query()  # type: ignore[no-untyped-call]
        if has_landed:
            self._landed.copy_(self._pinned)
        return has_landed
