"""A model that the C++ for CPUs (engine/cpu/native) has no code for is computed by torch, by plain numbers."""

from __future__ import annotations

from collections.abc import Collection

from ..common.errors import ConfigError
from .config import ModelConfig
from .parts.chunks import has_chunks
from .parts.delta_nets import DeltaNetsConfig
from .parts.latent import LatentConfig
from .parts.mamba import MambaConfig
from .parts.short_convolutions import ShortConvolutionsConfig
from .parts.uneven_heads import LayerInputs
from .quantization import Quantization

_MOST_CONVOLVED = 16  # tokens: engine/cpu/native/layers/convolution.hpp


def not_in_native(
    config: ModelConfig,
    quantization: Quantization | None,
    *,
    is_float32: bool,
    is_exchanged: bool = False,
    num_ranks: int = 1,
) -> list[str]:
    """Name each part of a model, in float32 or bfloat16, that C++ has not; nothing: it computes the model.

    `quantization`: what is served (`chosen_quantization`). `is_exchanged`: rows of experts are, between the `num_ranks`
    that share the model.
    """
    family, turned = config.family, int(config.head_dim * config.rope.fraction)
    is_sparse = config.experts is not None and any(config.sparse_layers)
    has = {
        "layers that keep such states": config.states is not None and not _has_known_states(config, num_ranks),
        "experts in such a residual stream": is_sparse and family.norms == "shared",
        "feed-forwards without a mixer before each": not _are_behind_mixers(config),
        "inputs of layers of such a size": not _has_known_inputs(config.layer_inputs, num_ranks),
        # In float32 tokens are those of `transformers`: there torch says which of equal experts come first.
        "experts in float32": is_float32 and is_sparse,
        "experts whose tokens are exchanged": is_exchanged and is_sparse,
        "quantized weights in float32": is_float32 and quantization is not None and not quantization.is_float8,
        "latents of such sizes": config.latent is not None and not _has_known_sizes(config.latent),
        "heads of such a size": config.latent is None and not _has_known_heads(config),
        "so small a turned part of heads": config.rope.fraction != 1.0 and turned % 16 != 0,
    }
    return [name for name, is_there in has.items() if is_there]


def _are_behind_mixers(config: ModelConfig) -> bool:
    """Tell whether each feed-forward has a mixer before it that no other has: C++ takes both as one layer."""
    layers = range(config.num_layers)
    return all(config.has_mixer(i) or (i > 0 and not config.has_feed_forward(i - 1)) for i in layers)


def check_exact(config: ModelConfig, lacking: Collection[str]) -> None:
    """Refuse exact steps of a model that keeps states or attends in chunks, where C++ lacks these parts of it.

    Torch takes states and chunks of many tokens otherwise than of one, and rounds otherwise. Raises ConfigError.
    """
    of_states = "layers that keep a state have" if config.states is not None else None
    of_chunks = "attention in chunks has" if has_chunks(config.sliding_windows) else None
    if lacking and (kind := of_states or of_chunks):
        raise ConfigError(
            f"deterministic: {kind} exact steps, and so speculation, in C++ on CPUs alone; this is for torch: "
            f"{', '.join(lacking)}"
        )


def _has_known_states(config: ModelConfig, num_ranks: int) -> bool:
    """Tell whether states are of a known kind, whose heads fill vectors, and what mixers yield on a rank whole pairs of
    them; a convolution sees a few tokens.
    """
    states, heads = config.states, tuple[int, ...]()
    if isinstance(states, DeltaNetsConfig):
        heads = states.key_dim, states.value_dim
    elif isinstance(states, MambaConfig):
        heads = states.state_dim, states.head_dim
    elif not isinstance(states, ShortConvolutionsConfig):
        return False
    mixed = states.num_values, config.num_qo_heads * config.head_dim
    is_short = states.kernel_size <= _MOST_CONVOLVED
    return is_short and all(size % 16 == 0 for size in heads) and all(size // num_ranks % 32 == 0 for size in mixed)


def _has_known_inputs(inputs: LayerInputs | None, num_ranks: int) -> bool:
    """Tell whether a rank's numbers of a layer's own input fill pairs of vectors."""
    return inputs is None or (inputs.size % num_ranks == 0 and inputs.size // num_ranks % 32 == 0)


def _has_known_heads(config: ModelConfig) -> bool:
    """Tell whether heads fill vectors, in all layers."""
    return all(config.heads_of(layer).dim % 16 == 0 for layer in range(config.num_layers))


def _has_known_sizes(latent: LatentConfig) -> bool:
    """Tell whether latents fill pairs of vectors, and heads' parts and values whole ones."""
    parts = latent.rope_dim, latent.nope_dim, latent.value_dim
    return latent.kv_rank % 32 == 0 and all(size % 16 == 0 for size in parts)
