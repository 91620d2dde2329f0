"""The contents of an engine's blocks: pages of layers, then a draft model's, or those of states."""

from __future__ import annotations

import msgspec
import torch

from ..common.config import EngineConfig
from ..common.kv_spec import KVCacheSpec
from ..models.config import ModelConfig
from ..models.parts.page_windows import SLACK_TOKENS, page_windows
from ..models.parts.states import block_size_of
from .draft import DraftModel


def with_block_size(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> EngineConfig:
    """Return settings that name the tokens of a block; `dtype`: of keys and values. Raises ConfigError."""
    token_bytes = _layers_spec(model, 1, dtype).block_bytes()
    return config.model_copy(update={"block_size": block_size_of(config, model.states, token_bytes)})


def block_spec(model: ModelConfig, block_size: int, dtype: torch.dtype, draft: DraftModel | None) -> KVCacheSpec:
    """Return the contents of a block, but for what is known at the end of a start."""
    spec = _layers_spec(model, block_size, dtype)
    num_states = 0 if model.states is None else model.states.num_pages(spec.page_bytes())
    behind = num_states if model.states is not None or draft is None else draft.pages.num_pages
    return msgspec.structs.replace(
        spec,
        num_layers=spec.num_layers + behind,
        windows=page_windows(model, num_states),
        window_slack=SLACK_TOKENS,
    )


def _layers_spec(model: ModelConfig, block_size: int, dtype: torch.dtype) -> KVCacheSpec:
    num_heads, head_dim = model.page_heads
    return KVCacheSpec(
        model="",  # known at the end of the start, as is how results are rounded
        num_layers=model.num_kv_pages,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=str(dtype).removeprefix("torch."),
        layout="HND" if model.latent is None else "latent",
    )
