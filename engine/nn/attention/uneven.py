"""Attention of layers whose heads are of two sizes: each size has a backend of its own, over its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ....models.parts.uneven_heads import UnevenHeads
from .base import AttentionBackend, AttentionMetadata, LayerPages

# Makes the backend of some layers' pages, and of their windows.
Make = Callable[[Sequence[Tensor], Sequence[int | None]], AttentionBackend]


def layers_of_pages(pages: LayerPages, heads: UnevenHeads) -> list[Tensor]:
    """View each layer's keys and values in pages [pages, num_blocks, 2, places of this rank, block_size, items of one].

    Returns [num_blocks, 2, heads, block_size, head_dim] of each layer that keeps some.
    """
    found = []
    for layer in range(heads.num_kept):
        own, spot = heads.of(layer), heads.spot(layer)
        num_own = own.num_kv // heads.page.num_kv  # in a place
        num_blocks, num_parts, num_places, block_size, width = pages[spot.page].shape
        each = pages[spot.page].view(num_blocks, num_parts, num_places, -1, num_own, block_size, own.dim)
        assert each.shape[3] * num_own * own.dim == width
        found.append(each[:, :, :, spot.slot].view(num_blocks, num_parts, -1, block_size, own.dim))
    return found


def by_shape(layers: Sequence[Tensor]) -> list[list[int]]:
    """Group layers whose pages have one shape, however many these are."""
    shapes = dict.fromkeys(layer.shape[1:] for layer in layers)
    return [[index for index, layer in enumerate(layers) if layer.shape[1:] == shape] for shape in shapes]


class UnevenAttention:
    """Implements `AttentionBackend`."""

    def __init__(self, layers: Sequence[Tensor], windows: Sequence[int | None], make: Make) -> None:
        self._backends: list[AttentionBackend] = []
        self._of_layer: dict[int, tuple[AttentionBackend, int]] = {}
        for own in by_shape(layers):
            backend = make([layers[index] for index in own], [windows[index] for index in own])
            self._backends.append(backend)
            self._of_layer |= {index: (backend, number) for number, index in enumerate(own)}

    def plan(self, metadata: AttentionMetadata) -> None:
        for backend in self._backends:
            backend.plan(metadata)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        backend, number = self._of_layer[layer_id]
        return backend.forward(q, k, v, number)

    def warm_up(self) -> None:
        for backend in self._backends:
            backend.warm_up()
