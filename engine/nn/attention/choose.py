"""The choice of the attention backend that runs on a device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ....common.errors import ConfigError
from ....models.parts.chunks import has_chunks
from .base import PLAIN_SCORES, AttentionBackend, LayerPages, Scores
from .uneven import UnevenAttention


def make_attention(
    name: str,
    pages: LayerPages,
    num_qo_heads: int,
    sliding_windows: Sequence[int | None],
    *,
    query_dtype: torch.dtype | None = None,
    kv_scales: Sequence[tuple[float, float]] | None = None,
    deterministic: bool = False,
    is_wide: bool = False,
    scores: Scores = PLAIN_SCORES,
) -> AttentionBackend:
    """Make the backend `name` ("auto" picks by device) over `pages`. Raises ConfigError where it cannot run.

    Pages in 8 bits need the queries' type, and on CUDA each layer's k_scale and v_scale where they are not 1.
    On a CPU alone: `deterministic`, results do not depend on what is computed together; else `is_wide`, all is computed
    in float32, whatever queries and pages are.
    """
    device = pages[0].device.type
    if name == "auto":
        name = "flashinfer" if device == "cuda" else "cpu"
    if name in ("flashinfer", "flashinfer_fp8"):
        if device != "cuda":
            raise ConfigError(f"attention_backend = {name} needs a CUDA device; use cpu on this one")
        assert isinstance(pages, Tensor), "layers apart are for attention in tiles"
        if scores.value_dim is not None:
            from .latent_flashinfer import FlashInferLatentAttention

            return FlashInferLatentAttention(pages, num_qo_heads, scores)
        from .flashinfer import FlashInferAttention

        make_windowed = partial(
            FlashInferAttention,
            pages,
            num_qo_heads,
            query_dtype=query_dtype,
            kv_scales=kv_scales,
            narrow_queries=name == "flashinfer_fp8",
            scores=scores,
        )
        if has_chunks(sliding_windows):
            from .chunked_flashinfer import FlashInferChunkedAttention

            return FlashInferChunkedAttention(sliding_windows, pages.shape[4], make_windowed)
        return make_windowed(sliding_windows)
    if device != "cpu":
        raise ConfigError(f"attention_backend = {name} does not run on {device}; use flashinfer")
    from .paged_torch import CPUAttention
    from .tiled import TiledAttention

    def make(pages: LayerPages, windows: Sequence[int | None]) -> AttentionBackend:
        if deterministic:
            return TiledAttention(pages, num_qo_heads, windows, scores, dtype=query_dtype)
        return CPUAttention(pages, num_qo_heads, windows, scores, dtype=torch.float32 if is_wide else query_dtype)

    if len({layer.shape for layer in pages}) == 1:
        return make(pages, sliding_windows)
    assert not isinstance(pages, Tensor) and scores.sinks is None
    return UnevenAttention(pages, sliding_windows, make)
