"""Attention on CUDA of layers whose heads are of two sizes: each size has FlashInfer's attention, over its layers.

Not run on a card: shown on an emulated device.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .flashinfer import FlashInferAttention
from .flashinfer_parts import FlashInferParts, Make, Place
from .uneven import by_shape


def uneven_attention(layers: Sequence[Tensor], windows: Sequence[int | None], make: Make) -> FlashInferParts:
    """Make attention of layers that keep pages of their own."""
    parts, places = list[FlashInferAttention](), dict[int, Place]()
    for own in by_shape(layers):
        places |= {layer: Place(len(parts), number) for number, layer in enumerate(own)}
        workspace = parts[0].workspace if parts else None
        parts.append(make([layers[layer] for layer in own], [windows[layer] for layer in own], workspace))
    return FlashInferParts(parts, [places[layer] for layer in range(len(layers))])
