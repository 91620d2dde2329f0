"""Bytes that one rank of a model takes: its weights, keys and values of a token, and room to compute in.

Pure: what a checkpoint holds comes from its config, and no file but a draft model's config is read.
"""

from __future__ import annotations

from ..common.config import NO_INT8_LATENTS, EngineConfig
from ..common.errors import ConfigError
from ..common.kv_spec import KVCacheSpec, row_items
from ..kvcache.draft_pages import draft_pages
from ..kvcache.frames import handed_frames
from ..models.adapter import expert_columns
from ..models.config import ModelConfig
from ..models.parts.page_windows import SLACK_TOKENS, page_windows
from ..models.parts.rank_counts import heads_of_rank
from ..models.parts.states import block_size_of
from ..models.quantization import chosen_quantization
from .weights import ITEM_BYTES, WeightBytes, WeightCounter, item_bytes
from .work import attending_layers, num_seen

# A rank's main memory besides weights and caches: interpreter, torch, buffers of a step. Seen: 250 to 400 MiB.
RANK_BYTES = 400 << 20
# A worker on a GPU takes this besides weights, cache and a step's arrays: the CUDA context (0.5 GiB), workspaces (0.3:
# attention's, products'), graphs, and what torch's allocator keeps between steps. Less leaves a smaller card without
# memory at its first long step, more is cache that is not there.
_GPU_BASE_BYTES = 3 << 29
_GPU_DRAFT_BYTES = 1 << 29  # a draft model's own workspace of attention (0.25 GiB), graphs and logits
_EXPERT_ROWS = 4096  # of a step that are sorted by their experts at once: `engine/cuda/experts.py`
_STATE_ROWS = 64  # of one token whose states are taken at once: `engine/nn/states.py`
# Tokens of a step: enough to keep a GPU's multipliers busy; where answers are written too, a step must not keep them
# waiting for long.
GPU_BATCHED_TOKENS = {"prefill": 8192, "decode": 2048}
# Weights in 4 or 8 bits are widened 128 MiB at a time (`engine/cuda/int4.py`), by graphs in memory of their own; whole
# numbers' sums are as much at a time (`engine/cuda/int8.py`).
_WIDENING_BYTES = 1 << 29
_LOGIT_ARRAYS = 4  # of float32 that sampling holds at once: logits, as they were, scaled, probabilities


def check_cache_dtype(engine: EngineConfig, *, is_cpu: bool) -> None:
    """Refuse a type of cached keys and values that the device's attention does not read. Raises ConfigError."""
    if is_cpu and engine.kv_cache_dtype == "fp8":
        raise ConfigError("kv_cache_dtype: fp8 needs a GPU: the CPU's attention reads no 8-bit floats; use int8")
    if not is_cpu and engine.kv_cache_dtype == "int8":
        raise ConfigError("kv_cache_dtype: int8 is read on CPUs alone; use fp8")


def check_latent_dtype(engine: EngineConfig, model: ModelConfig) -> None:
    """Refuse a type of the cache that latents are not kept in, on any device. Raises ConfigError."""
    if model.latent is not None and engine.kv_cache_dtype == "int8":
        raise ConfigError(NO_INT8_LATENTS)
    if model.latent is not None and engine.kv_cache_dtype == "fp8":
        raise ConfigError("kv_cache_dtype: fp8 has no kernels here for latents; use auto")


def cache_item_bytes(engine: EngineConfig, model: ModelConfig) -> int:
    """Return the bytes of a number in the KV cache, without the scale that whole ones share."""
    return item_bytes(engine, model) if engine.kv_cache_dtype == "auto" else ITEM_BYTES[engine.kv_cache_dtype]


def draft_models(engine: EngineConfig) -> list[ModelConfig]:
    """Return the shape of the draft model, if there is one. Raises ConfigError."""
    speculative = engine.speculative_config
    return [] if speculative is None or speculative.model is None else [ModelConfig.from_dir(speculative.model)]


def cache_token_bytes(engine: EngineConfig, model: ModelConfig) -> int:
    """KV of one token on one rank, a draft model's too. Raises ConfigError where that does not fit into the blocks."""
    return pages_spec(engine, model).num_layers * _page_token_bytes(engine, model)


def handoff_bytes(engine: EngineConfig, model: ModelConfig, num_tokens: int) -> int:
    """Return the bytes of a prompt's blocks on one rank as a handoff sends them: without what nobody reads any more."""
    spec = pages_spec(engine, model)
    num_pages = spec.num_pages(spec.num_blocks_for(num_tokens), spec.num_left_out(num_tokens))
    return num_pages * spec.block_size * _page_token_bytes(engine, model)


def last_handoff_bytes(engine: EngineConfig, model: ModelConfig, num_tokens: int) -> int:
    """Return those that are shipped when all is computed: the last layer's, or states of the last step's blocks,
    which follow all layers.
    """
    spec = pages_spec(engine, model)
    num_blocks, num_thin = spec.num_blocks_for(num_tokens), spec.num_left_out(num_tokens)
    if model.states is not None:
        last_step = (num_tokens - 1) % engine.max_num_batched_tokens + 1
        return min(spec.num_blocks_for(last_step), num_blocks - num_thin) * state_bytes(engine, model)
    num_last = num_blocks - num_thin * spec.is_windowed(model.num_kv_pages - 1)
    return num_last * spec.block_size * _page_token_bytes(engine, model)


def handed_blocks(engine: EngineConfig, model: ModelConfig, num_tokens: int) -> int:
    """Count the blocks whose memory a prompt takes on a decode worker to which it was handed over."""
    spec = pages_spec(engine, model)
    return handed_frames(spec, spec.num_blocks_for(num_tokens), num_tokens)


def pages_spec(engine: EngineConfig, model: ModelConfig) -> KVCacheSpec:
    """Return which pages blocks have, and which of them are shipped; sizes of heads are not told."""
    num_states = _num_state_pages(engine, model)
    behind = num_states
    if model.states is None:
        dtype, num_ranks = engine.kv_cache_dtype, engine.tensor_parallel_size
        behind = sum(draft_pages(model, draft, dtype, num_ranks).num_pages for draft in draft_models(engine))
    return KVCacheSpec(
        model="",
        num_layers=model.num_kv_pages + behind,
        num_kv_heads=1,
        head_dim=1,
        block_size=block_tokens(engine, model),
        dtype="int8",
        windows=page_windows(model, num_states),
        window_slack=SLACK_TOKENS,
    )


def _num_state_pages(engine: EngineConfig, model: ModelConfig) -> int:
    """Count the pages of a block that hold states."""
    if model.states is None:
        return 0
    return model.states.num_pages(block_tokens(engine, model) * _page_token_bytes(engine, model, num_ranks=1))


def block_tokens(engine: EngineConfig, model: ModelConfig) -> int:
    """Return the tokens of a block. Raises ConfigError."""
    token_bytes = model.num_kv_pages * _page_token_bytes(engine, model, num_ranks=1)
    return block_size_of(engine, model.states, token_bytes)


def kept_bytes_read(engine: EngineConfig, model: ModelConfig, context: int) -> float:
    """Return the bytes of a sequence's keys, values and states that one of its decode steps reads, on one rank."""
    page, size = _page_token_bytes(engine, model), model.page_heads.size
    keys = sum(
        model.heads_of(layer).size / size * num_seen(context, model.sliding_windows[layer])
        for layer in attending_layers(model)
    )
    return page * keys + 2 * state_bytes(engine, model)  # a state is written, too


def state_bytes(engine: EngineConfig, model: ModelConfig) -> int:
    """Return the bytes of all layers' states of one sequence on one rank; 0: no layer keeps one."""
    return 0 if model.states is None else model.states.of_rank(engine.tensor_parallel_size).num_bytes


def _page_token_bytes(engine: EngineConfig, model: ModelConfig, *, num_ranks: int | None = None) -> int:
    """Return the bytes of a token's keys and values in one page, on one of so many ranks."""
    num_heads, dim = model.page_heads
    heads = heads_of_rank(num_heads, 1 if model.latent is not None else num_ranks or engine.tensor_parallel_size)
    row_bytes = row_items(dim, engine.kv_cache_dtype) * cache_item_bytes(engine, model)
    return model.num_kv_parts * heads * row_bytes


def weight_bytes(engine: EngineConfig, model: ModelConfig) -> int:
    """Count what one rank's weights take, a draft model's too. A device that is still `auto` counts as a CPU.

    Raises ConfigError for a quantization that does not go with the checkpoint.
    """
    num_ranks = engine.tensor_parallel_size
    drafts = sum(WeightCounter(engine, draft, None, num_ranks).count().total for draft in draft_models(engine))
    return drafts + rank_weights(engine, model).total + adapter_bytes(engine, model)


def adapter_bytes(engine: EngineConfig, model: ModelConfig) -> int:
    """Count the bytes of one rank's slots for adapters; each has room for the largest rank in every linear.

    On a GPU they may have room for experts, too (`engine/cuda/expert_adapters.py`); else none has (`adapters.py`).
    """
    if not engine.enable_lora:
        return 0
    counter = WeightCounter(engine, model, None, engine.tensor_parallel_size)
    numbers = engine.max_loras * engine.max_lora_rank * counter.adapted_sizes()
    if engine.lora_experts and engine.device == "cuda":
        numbers += expert_columns(engine.max_loras, engine.max_lora_rank) * counter.adapted_expert_sizes()
    return numbers * item_bytes(engine, model)


def rank_weights(
    engine: EngineConfig, model: ModelConfig, *, has_float8: bool = False, groups_float8: bool = False
) -> WeightBytes:
    """Count one rank's weights of the model itself. `has_float8`: its GPU multiplies by 8-bit floats; `groups_float8`:
    by those of many experts at once.

    Raises ConfigError as `weight_bytes` does.
    """
    quantization, num_ranks = chosen_quantization(model.quantization, engine.quantization), engine.tensor_parallel_size
    counter = WeightCounter(engine, model, quantization, num_ranks, has_float8=has_float8, groups_float8=groups_float8)
    return counter.count()


def gpu_reserve_bytes(engine: EngineConfig, model: ModelConfig, num_tokens: int) -> int:
    """About what one rank takes of a GPU besides weights and cache, at a step of `num_tokens`."""
    heads = (model.num_qo_heads + 2 * model.num_kv_heads) * model.head_dim
    # A layer's widest moment: hidden states, residual stream and sum; gate, up and their product, or the heads.
    widest = 3 * model.hidden_size + max(3 * model.intermediate_size, 2 * heads) // engine.tensor_parallel_size
    activations = num_tokens * widest * item_bytes(engine, model)
    if (experts := model.experts) is not None:  # rows are there once for every expert that they take, twice when sorted
        inner = 3 * experts.intermediate_size // engine.tensor_parallel_size
        rows = min(num_tokens, _EXPERT_ROWS) * experts.num_chosen
        activations += rows * (3 * model.hidden_size + inner) * item_bytes(engine, model)
        if engine.exchanges_experts:  # at worst all rows come to one rank, and their sums go back
            activations += num_tokens * model.hidden_size * (item_bytes(engine, model) + ITEM_BYTES["float32"])
    if model.states is not None:
        activations += _state_bytes(engine, model, num_tokens)
    widening = _WIDENING_BYTES if _has_integers(engine, model) else 0
    rows, drafts = engine.max_num_seqs, engine.speculative_config
    if drafts is not None:
        rows = min(rows * (1 + drafts.num_speculative_tokens), max(rows, num_tokens))
    logits = _LOGIT_ARRAYS * rows * model.vocab_size * ITEM_BYTES["float32"]
    drafting = _GPU_DRAFT_BYTES if drafts is not None and drafts.model is not None else 0
    return _GPU_BASE_BYTES + activations + logits + widening + drafting


def _has_integers(engine: EngineConfig, model: ModelConfig) -> bool:
    """Tell whether a GPU multiplies by whole numbers."""
    if chosen_quantization(model.quantization, engine.quantization) is None:
        return False
    counted = rank_weights(engine.model_copy(update={"device": "cuda"}), model)
    return counted.nibbles > 0 or counted.rounded > 0


def _state_bytes(engine: EngineConfig, model: ModelConfig, num_tokens: int) -> int:
    """About what a layer with states takes of a GPU while it computes a step of `num_tokens`."""
    assert model.states is not None
    states, wide = model.states.of_rank(engine.tensor_parallel_size), ITEM_BYTES["float32"]
    # Of each token what is projected, twice while it is put in order; what heads yield, its norm, gates and their silu.
    step = 2 * (states.num_convolved + states.num_values) * item_bytes(engine, model) + 4 * states.num_values * wide
    # Of a block's tokens what the convolution takes and yields; what heads compute with, as it is, in chunks, and what
    # chunks make of it.
    stretch = 4 * (states.num_convolved + states.num_of_heads) * wide
    rows = min(engine.max_num_seqs, _STATE_ROWS)  # a state as it was read, as products take it, and as it is written
    return (
        num_tokens * step
        + min(num_tokens, block_tokens(engine, model)) * stretch
        + 4 * rows * states.num_shares * states.share_size * wide
    )
