"""The checkpoints that exactness is shown on, by family, with what their workers need to know of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..checkpoints import Family, Shape, write_checkpoint, write_tokenizer
from ..deepseek import EXPERTS, TOKEN_SIZE, Generation, write_deepseek
from ..transformers_checkpoints import (
    FALCON_H1,
    GEMMA_4,
    GEMMA_4_BORROWING,
    GEMMA_4_MOE,
    LLAMA_4,
    NEMOTRON_H,
    NEMOTRON_H_MOE,
    SMALL,
    STATES,
    write_model,
)

MAX_MODEL_LEN = 4096
_BLOCK_SIZE, _FLOAT32 = 16, 4
HEADS_BLOCK_BYTES = 2 * 2 * 2 * 16 * _BLOCK_SIZE * _FLOAT32  # layers, K and V, heads, head_dim, tokens
LATENTS_BLOCK_BYTES = 3 * TOKEN_SIZE * _BLOCK_SIZE * _FLOAT32  # layers, numbers of a token
# Numbers of a layer's state, of which there are three, in two shares: in a gated delta net, a convolution, a layer of
# Mamba's, of which each share has all that values are written and read by.
_STATE, _LFM2_STATE, _MAMBA_STATE = 2 + 3 * 128 + 4 * 16 * 16, 2 + 2 * 64, 2 + 3 * (128 + 2 * 32) + 4 * 16 * 32
_STATES_OF = {
    **dict.fromkeys(("lfm2", "lfm2_moe"), _LFM2_STATE),
    **dict.fromkeys(("granite4", "granite4_moe", "nemotron_h", "nemotron_h_moe", "falcon_h1"), _MAMBA_STATE),
}
_LATENT: dict[str, tuple[Generation, dict[str, Any]]] = {
    "deepseek_v2": ("v2", EXPERTS["v2"]),
    "deepseek_v3": ("v3", EXPERTS["v3"]),
    "youtu": ("youtu", {}),
    "mistral4": ("mistral4", EXPERTS["mistral4"]),
    "glm4_moe_lite": ("glm4 lite", {"routed_scaling_factor": 1.8}),
}
_SPARSE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 300}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32}),
    "glm4_moe": (
        "Glm4Moe",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "use_qk_norm": True,
            "routed_scaling_factor": 2.5,
        },
    ),
    "minimax_m2": (
        "MiniMaxM2",
        {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32, "partial_rotary_factor": 0.5},
    ),
    "granitemoe": (
        "GraniteMoe",
        {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32, "residual_multiplier": 0.22}
        | {"embedding_multiplier": 12.0, "attention_multiplier": 0.2, "logits_scaling": 0.5},
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {"num_experts": 8, "moe_topk": 3, "intermediate_size": 32}),
    "ernie4_5_moe": ("Ernie4_5_Moe", {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 32}),
    "exaone_moe": (
        "ExaoneMoe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "sliding_window": 300},
    ),
    "dots1": (
        "Dots1",
        {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 1},
    ),
    "solar_open": ("SolarOpen", {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}),
    "gpt_oss": ("GptOss", {"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 300}),
}

_GATED_SHARED: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_LFM2_LAYERS = ["conv", "full_attention", "conv", "conv"]
_MAMBA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "mamba_n_heads": 4,
    "mamba_d_state": 16,
    "shared_intermediate_size": 48,
    "attention_multiplier": 0.25,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
}
# What differs from `GEMMA_4`, and the pages of a block.
_GEMMA4: dict[str, tuple[dict[str, Any], int]] = {
    "gemma4": ({}, 5),
    "gemma4_moe": (GEMMA_4_MOE, 5),
    "gemma4_borrowing": (GEMMA_4_BORROWING | {"global_head_dim": 64, "head_dim": 32}, 2),
}
# Of others 1, with which two tokens of this one are nearer to each other (1.3e-4) than what roundings lead to.
_SEEDS = {"qwen3_5_moe_text": 2}
_STATES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5_text": ("Qwen3_5Text", {"head_dim": 64}),  # heads that C++ has, as it has float32 without experts
    "qwen3_5_moe_text": (
        "Qwen3_5MoeText",
        _GATED_SHARED,
    ),
    "qwen3_next": (
        "Qwen3Next",
        _GATED_SHARED,
    ),
    "lfm2": ("Lfm2", {"layer_types": _LFM2_LAYERS}),
    "lfm2_moe": (
        "Lfm2Moe",
        {
            "layer_types": _LFM2_LAYERS,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
        },
    ),
    "granite4": ("GraniteMoeHybrid", _MAMBA),
    "granite4_moe": ("GraniteMoeHybrid", _MAMBA | {"num_local_experts": 8, "num_experts_per_tok": 3}),
    "nemotron_h": ("NemotronH", NEMOTRON_H),
    "nemotron_h_moe": ("NemotronH", NEMOTRON_H_MOE),
    "falcon_h1": ("FalconH1", FALCON_H1),
}


@dataclass(frozen=True)
class ExactnessModel:
    """One family's checkpoint."""

    path: Path
    block_bytes: int  # of KV, in float32
    is_sparse: bool  # some layers are mixtures of experts


def _write_llama4(path: Path) -> ExactnessModel:
    import transformers

    fields = SMALL | LLAMA_4 | {"attention_chunk_size": 300, "max_position_embeddings": MAX_MODEL_LEN}
    write_model(path, transformers.Llama4TextConfig(**fields))
    write_tokenizer(path, SMALL["vocab_size"])
    return ExactnessModel(path, HEADS_BLOCK_BYTES * LLAMA_4["num_hidden_layers"] // 2, is_sparse=True)


def _write_gemma4(path: Path, fields: dict[str, Any], num_pages: int) -> ExactnessModel:
    """`num_pages`: of a block, each with 64 numbers of a token at either of two places."""
    import transformers

    longer = {"sliding_window": 300, "max_position_embeddings": MAX_MODEL_LEN}
    write_model(path, transformers.Gemma4TextConfig(**SMALL | GEMMA_4 | fields | longer), draws_norms=True)
    write_tokenizer(path, SMALL["vocab_size"])
    return ExactnessModel(path, num_pages * 2 * 2 * 64 * _BLOCK_SIZE * _FLOAT32, is_sparse="num_experts" in fields)


def write_exactness_model(path: Path, family: str) -> ExactnessModel:
    """Write the checkpoint of a family, of weights whose best token mostly leads."""
    longest: dict[str, Any] = {"max_position_embeddings": MAX_MODEL_LEN}
    if family in _LATENT:
        generation, fields = _LATENT[family]
        write_deepseek(path, generation, tokenizer=True, **fields, **longest)
        return ExactnessModel(path, LATENTS_BLOCK_BYTES, is_sparse=family != "youtu")
    if family in _GEMMA4:
        return _write_gemma4(path, *_GEMMA4[family])
    if family == "llama4":
        return _write_llama4(path)
    if family in _STATES:
        import transformers

        name, fields = _STATES[family]
        config = getattr(transformers, f"{name}Config")(**SMALL | STATES | fields | longest)
        write_model(path, config, seed=_SEEDS.get(family, 1))
        write_tokenizer(path, SMALL["vocab_size"])
        is_sparse = any(fields.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
        num_bytes = 3 * _STATES_OF.get(family, _STATE) * _FLOAT32
        num_with_keys = fields["num_hidden_layers"] if family == "falcon_h1" else 1
        block_bytes = _states_block_bytes(num_bytes, fields.get("head_dim", SMALL["head_dim"]), num_with_keys)
        return ExactnessModel(path, block_bytes, is_sparse=is_sparse)
    if family in _SPARSE:
        import transformers

        name, fields = _SPARSE[family]
        write_model(path, getattr(transformers, f"{name}Config")(**SMALL | fields | longest))
        write_tokenizer(path, SMALL["vocab_size"])
        return ExactnessModel(path, HEADS_BLOCK_BYTES, is_sparse=True)
    window = 300 if family == "mistral" else None
    shape = Shape(max_model_len=MAX_MODEL_LEN, sliding_window=window, biases=family == "llama")
    write_checkpoint(path, cast("Family", family), shape=shape)
    return ExactnessModel(path, HEADS_BLOCK_BYTES, is_sparse=family == "qwen3_vl_moe")


def _states_block_bytes(num_bytes: int, head_dim: int, num_with_keys: int) -> int:
    """Return the bytes of some layers' keys and values, and of as many more such pages as states fill."""
    page_bytes = 2 * 2 * head_dim * _BLOCK_SIZE * _FLOAT32  # K and V, heads
    return page_bytes * (num_with_keys + -(-num_bytes // page_bytes))
