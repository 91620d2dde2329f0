"""The choice of the attention backend that runs on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....common.errors import ConfigError
from .base import PLAIN_SCORES, AttentionBackend, LayerPages, Scores
from .uneven import UnevenAttention, by_shape


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
        return _flashinfer(
            pages,
            num_qo_heads,
            sliding_windows,
            query_dtype=query_dtype,
            kv_scales=kv_scales,
            narrow_queries=name == "flashinfer_fp8",
            scores=scores,
        )
    if device != "cpu":
        raise ConfigError(f"attention_backend = {name} does not run on {device}; use flashinfer")
    from .paged_torch import CPUAttention
    from .tiled import TiledAttention

    def make(pages: LayerPages, windows: Sequence[int | None]) -> AttentionBackend:
        if deterministic:
            return TiledAttention(pages, num_qo_heads, windows, scores, dtype=query_dtype)
        return CPUAttention(pages, num_qo_heads, windows, scores, dtype=torch.float32 if is_wide else query_dtype)

    if len({layer.shape[1:] for layer in pages}) == 1:
        return make(pages, sliding_windows)
    assert not isinstance(pages, Tensor) and scores.sinks is None
    return UnevenAttention(pages, sliding_windows, make)


def _flashinfer(
    pages: LayerPages,
    num_qo_heads: int,
    sliding_windows: Sequence[int | None],
    *,
    query_dtype: torch.dtype | None,
    kv_scales: Sequence[tuple[float, float]] | None,
    narrow_queries: bool,
    scores: Scores,
) -> AttentionBackend:
    """Make FlashInfer's attention, in parts where layers are of several kinds. Raises ConfigError."""
    if scores.value_dim is not None:
        assert isinstance(pages, Tensor), "latents are of one size"
        from .latent_flashinfer import FlashInferLatentAttention

        return FlashInferLatentAttention(pages, num_qo_heads, scores)
    from .flashinfer import FlashInferAttention

    def make(
        own: LayerPages, layers: Sequence[int], window: int | None, workspace: Tensor | None = None
    ) -> FlashInferAttention:
        return FlashInferAttention(
            own,
            num_qo_heads,
            window,
            query_dtype=query_dtype,
            kv_scales=None if kv_scales is None else [kv_scales[layer] for layer in layers],
            narrow_queries=narrow_queries,
            scores=scores,
            workspace=workspace,
        )

    if not any(sliding_windows) and len(by_shape([*pages])) == 1:
        return make(pages, range(len(pages)), None)
    from .flashinfer_parts import attention_in_parts

    return attention_in_parts(pages, sliding_windows, make)
