"""A model's figures: what a token costs to compute, to keep and to read; as published, or by its config.json.

Sources: the checkpoints' config.json files for Llama 3.1 8B and 70B; "OPT: Open Pre-trained Transformer Language
Models" (2022), table 1, for 175B, which has GPT-3's shape; "DeepSeek-V3 Technical Report" (2024), section 4.2, for the
mixture of experts: 671 B parameters of which a token uses 37 B, FP8 weights, multi-head latent attention with 512 + 64
values kept for each token and layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..common.config import EngineConfig
from ..common.errors import ConfigError
from ..models.config import ModelConfig
from ..models.quantization import chosen_quantization
from .hardware import Gpu
from .memory import RANK_BYTES, cache_token_bytes, gpu_reserve_bytes, kept_bytes_read, pages_spec, rank_weights
from .weights import ITEM_BYTES, item_bytes, lacks_native
from .work import (
    count_params,
    exchanged_bytes,
    flops_per_pair,
    num_prompt_pairs,
    num_spared_pairs,
    num_sums,
    num_values,
    num_visible_keys,
    num_whole_layers,
)

_RESERVE_BYTES = 4e9
# On CPUs a byte of int8's keys and values takes so much longer than one of bfloat16's: half the bytes took 0.79 of the
# time, beyond the weights', of four answers over 8,000 tokens (Zen 4, `benchmarks.engine --decode 4@8000`).
_INT8_BYTE_WORK = 1.5


@dataclass(slots=True, frozen=True)
class ModelShape:
    """Figures of the whole model; a worker's GPUs share them evenly."""

    name: str
    num_params: float
    num_layers: int
    kv_bytes_per_token: int  # all layers
    prefill_flops_per_pair: float  # attention: one query token and one key token, all layers and heads
    decode_flops_per_pair: float
    weight_bytes: float = 2.0  # of one parameter
    num_active_params: float | None = None  # that a token uses; None: all
    num_experts: int = 0  # routed ones of a layer; 0: dense
    experts_per_token: int = 0
    expert_share: float = 0.0  # of the parameters, in routed experts
    kernels_s: float = 0.0  # of a step, whatever it computes: launches, collectives, sampling
    mfu: float | None = None  # share of a GPU's peak that its prompts reach; None: the GPU's usual one
    is_float8: bool = False  # its products with weights
    nibble_bytes: float = 0.0  # of weights in 4 or 8 bits, of a GPU: what few rows are multiplied by
    widened_bytes: float = 0.0  # moved to widen these, in a step of more rows
    int8_params: float = 0.0  # of num_params, that a GPU multiplies many rows by in whole numbers
    head_params: float = 0.0  # of num_params, that only rows which sample are multiplied by
    resident_bytes: float | None = None  # of weights; None: those that a step reads
    reserve_bytes: float = _RESERVE_BYTES  # of each GPU: activations of a full budget, CUDA graphs, the runtime
    read_share: float = 1.0  # of kept tokens that a row's attention reads: less with sliding windows
    cache_byte_work: float = 1.0  # of a cached byte on a CPU, in that of one of bfloat16's
    row_scores_per_pair: float = 0.0  # of a decode row and a latent, as a CPU multiplies them: heads of all layers
    exchanged_bytes: float = 0.0  # that each GPU sends for one token, where several share the model
    num_sums: int = 0  # over the GPUs, in a step
    row_exchange_s: float = 0.0  # of a decode row among one GPU's: to its experts' GPUs and back, in all layers
    head_dim: int = 0
    scores_per_pair: float = 0.0  # of a prompt's query token and key token: heads of all layers but those spared
    values_per_token: float = 0.0  # of activations, read or written beside products
    # What rows that sample alone go through where C++ computes, behind the last keys and values; experts there.
    last_params: float = 0.0
    last_experts: float = 0.0
    windows: tuple[int, ...] = ()  # of a block's pages, as `KVCacheSpec` has them
    window_slack: int = 0
    num_pages: int | None = None  # of a block; None: one of each layer

    @property
    def active_params(self) -> float:
        return self.num_params if self.num_active_params is None else self.num_active_params

    @property
    def total_bytes(self) -> float:
        """Return the bytes of all weights that a step may read."""
        return self.num_params * self.weight_bytes

    @property
    def kept_bytes(self) -> float:
        """Return the bytes of weights in the memory of all GPUs."""
        return self.total_bytes if self.resident_bytes is None else self.resident_bytes

    def bytes_read(self, num_tokens: int) -> float:
        """Weights that a step of so many tokens reads: of a layer's experts, those that some token chose."""
        if not self.num_experts:
            return self.total_bytes
        missed = (1 - self.experts_per_token / self.num_experts) ** num_tokens
        return self.total_bytes * (1 - self.expert_share * missed)


def _dense(
    name: str, num_params: float, num_layers: int, num_heads: int, num_kv_heads: int, head_dim: int, kernels_s: float
) -> ModelShape:
    """BF16 weights and cache. A pair costs a product for its score and one for its value: two operations each."""
    pair = 4.0 * num_layers * num_heads * head_dim
    kv_bytes = 2 * 2 * num_layers * num_kv_heads * head_dim
    return ModelShape(name, num_params, num_layers, kv_bytes, pair, pair, kernels_s=kernels_s)


def shape_of(engine: EngineConfig, model: ModelConfig, gpu: Gpu, context: int) -> ModelShape:
    """Return the figures of one worker's model, of all its ranks together, near so many tokens of context.

    Raises ConfigError for a quantization that does not go with the checkpoint, or with the GPU.
    """
    num_ranks = engine.tensor_parallel_size
    params = count_params(model)
    has_float8 = gpu.fp8_tflops is not None
    weights = rank_weights(engine, model, has_float8=has_float8, groups_float8=gpu.groups_float8)
    num_params = params.layers + params.experts + params.head
    quantization, experts = chosen_quantization(model.quantization, engine.quantization), model.experts
    if quantization is not None:
        is_float32 = item_bytes(engine, model) == ITEM_BYTES["float32"]
        quantization.check_float8(has_products=has_float8, is_float32=is_float32)
    chosen = 0.0 if experts is None else experts.num_chosen / experts.num_experts
    keys, pairs = num_visible_keys(context, model), num_prompt_pairs(context, model)
    # Torch, on GPUs too, takes all tokens through the last layer.
    spares_last = gpu.is_cpu and not lacks_native(engine, model)
    scored = pairs - (num_spared_pairs(context, model) if spares_last else 0)
    pair, token_bytes = flops_per_pair(model), cache_token_bytes(engine, model)
    pages = pages_spec(engine, model)
    return ModelShape(
        name=model.architecture,
        num_params=num_params,
        num_layers=num_whole_layers(model),
        kv_bytes_per_token=num_ranks * token_bytes,
        prefill_flops_per_pair=2 * pair * pairs / (context * (context + 1)),
        decode_flops_per_pair=pair * keys / context,
        weight_bytes=num_ranks * weights.read / num_params,
        num_active_params=num_params - params.experts + params.experts * chosen,
        num_experts=0 if experts is None else experts.num_experts,
        experts_per_token=0 if experts is None else experts.num_chosen,
        expert_share=weights.experts / weights.read,
        is_float8=quantization is not None and quantization.is_float8,
        nibble_bytes=num_ranks * weights.nibbles,
        widened_bytes=num_ranks * weights.widened,
        int8_params=num_ranks * weights.rounded,
        kernels_s=num_whole_layers(model) * gpu.layer_s,
        head_params=params.head,
        resident_bytes=num_ranks * weights.total,
        reserve_bytes=RANK_BYTES if gpu.is_cpu else gpu_reserve_bytes(engine, model, engine.max_num_batched_tokens),
        read_share=kept_bytes_read(engine, model, context) / (context * token_bytes),
        cache_byte_work=_INT8_BYTE_WORK if engine.kv_cache_dtype == "int8" else 1.0,
        exchanged_bytes=exchanged_bytes(1, num_ranks, item_bytes(engine, model), model, engine.expert_exchange),
        num_sums=num_sums(model, engine.expert_exchange) if num_ranks > 1 else 0,
        head_dim=pair // (4 * model.num_qo_heads),  # of latents, the mean of a key's numbers and a value's
        row_scores_per_pair=0.0 if model.latent is None else model.num_qo_heads * keys / context,
        scores_per_pair=2 * model.num_qo_heads * scored / (context * (context + 1)),
        values_per_token=num_values(model),
        last_params=params.last if spares_last else 0.0,
        last_experts=params.last_experts if spares_last else 0.0,
        windows=pages.windows,
        window_slack=pages.window_slack,
        num_pages=pages.num_layers,
    )


# Kernels of a step beside its products and reads are assumed: 30 us a layer on one GPU, 50 us with two all-reduces.
_DEEPSEEK_LAYERS, _DEEPSEEK_HEADS = 61, 128
MODELS = {
    model.name: model
    for model in (
        _dense("llama-3.1-8b", 8.03e9, 32, 32, 8, 128, kernels_s=1e-3),
        _dense("llama-3.1-70b", 70.6e9, 80, 64, 8, 128, kernels_s=4e-3),
        _dense("opt-175b", 175e9, 96, 96, 96, 128, kernels_s=5e-3),
        ModelShape(
            "deepseek-v3",
            num_params=671e9,
            num_layers=_DEEPSEEK_LAYERS,
            kv_bytes_per_token=2 * _DEEPSEEK_LAYERS * (512 + 64),
            # Prompts expand the latent: 192 values score, 128 are weighed. Decode steps work on the latent itself.
            prefill_flops_per_pair=2.0 * _DEEPSEEK_LAYERS * _DEEPSEEK_HEADS * (192 + 128),
            decode_flops_per_pair=2.0 * _DEEPSEEK_LAYERS * _DEEPSEEK_HEADS * (576 + 512),
            weight_bytes=1.0,
            num_active_params=37e9,
            is_float8=True,
            num_experts=256,
            experts_per_token=8,
            expert_share=0.97,  # 58 layers x 256 experts x 3 x 7168 x 2048 parameters = 654 B
            kernels_s=3e-3,
            # DeepEP's README, low-latency kernels on H800 with 400 Gb/s InfiniBand: 128 tokens of a GPU take 173 us to
            # the experts of 64 GPUs and 314 us back. 58 layers have experts. Prompts' exchange is in their `mfu`.
            row_exchange_s=58 * (173e-6 + 314e-6) / 128,
            # 52,300 prompt tokens per second on eight H100 (LMSYS, "Deploying DeepSeek with PD Disaggregation and
            # Large-Scale Expert Parallelism on 96 H100 GPUs", 2025) are a quarter of their FP8 peak.
            mfu=0.25,
        ),
    )
}


_SHORT = {"8b": "llama-3.1-8b", "70b": "llama-3.1-70b", "175b": "opt-175b", "moe": "deepseek-v3"}


def _full(name: str) -> str:
    return _SHORT.get(name.lower(), name.lower())


def is_published(name: str) -> bool:
    """Return whether a model's figures are known without its config.json."""
    return _full(name) in MODELS


def model_named(name: str) -> ModelShape:
    try:
        return MODELS[_full(name)]
    except KeyError:
        raise ConfigError(f"model {name}: known are {', '.join((*MODELS, *_SHORT))}") from None
