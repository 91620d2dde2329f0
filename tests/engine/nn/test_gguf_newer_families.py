"""GGUF files of families that llama.cpp reads beside Llama's: dense ones, mixtures, and layers that keep a state.

What `test_gguf_families.py` shows of others: a file becomes the config and the tensors of the checkpoint it came of.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvferry.common.errors import ConfigError
from kvferry.models.checkpoint import check_checkpoint
from kvferry.models.config import ModelConfig
from kvferry.models.default import gguf_model_dir
from kvferry.models.families.module_names import full_name
from kvferry.models.parts.side_by_side import Multipliers

from ...gguf_files import plain_tokens, write_as_gguf
from ...transformers_checkpoints import (
    FALCON_H1,
    GEMMA_4,
    GEMMA_4_BORROWING,
    GEMMA_4_MOE,
    LLAMA_4,
    NEMOTRON_H,
    NEMOTRON_H_MOE,
    STATES,
)
from ..weights.test_formats import assert_as_transformers
from .test_gguf_families import GRANITE, write_drawn

PARTS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}}
MINISTRAL = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1_000_000.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
ONE = np.ones((1, 32), np.float32)
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 48}
MAMBA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "num_hidden_layers": 4,
    "mamba_n_heads": 4,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "shared_intermediate_size": 48,
}
LFM2 = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "conv"]}
WITHOUT_MLP = NEMOTRON_H_MOE | {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "intermediate_size": 32,
}
LLAMA_4_ROPE = {  # a step among the frequencies
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
SCOUT = LLAMA_4 | {"attention_chunk_size": 8192, "floor_scale": 8192}  # as llama.cpp's code has them
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "mistral3": ("Ministral3", {"rope_parameters": MINISTRAL, "sliding_window": None}),
    "arcee": ("Arcee", {}),
    "seed_oss": ("SeedOss", {}),
    "ernie4_5": ("Ernie4_5", {"tie_word_embeddings": True}),
    "hunyuan-dense": ("HunYuanDenseV1", {}),
    "gemma4": ("Gemma4Text", GEMMA_4),
    "gemma4 that borrows": ("Gemma4Text", GEMMA_4_BORROWING),
    "gemma4 with experts": ("Gemma4Text", GEMMA_4_MOE),
    "llama4": ("Llama4Text", SCOUT | {"rope_parameters": LLAMA_4_ROPE}),
    "llama4 without norms of heads": ("Llama4Text", SCOUT | {"num_local_experts": 128, "use_qk_norm": False}),
    "glm4": ("Glm4", PARTS),
    "exaone4": ("Exaone4", {"num_hidden_layers": 4, "sliding_window": 20}),
    "exaone4 without windows": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "cohere2": ("Cohere2", {"num_hidden_layers": 4, "sliding_window": 20, "tie_word_embeddings": True}),
    "qwen2moe": ("Qwen2Moe", SHARED),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32}),
    "glm4moe": (
        "Glm4Moe",
        ROUTED | PARTS | {"use_qk_norm": True, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0},
    ),
    "minimax-m2": (
        "MiniMaxM2",
        {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32} | PARTS,
    ),
    "dots1": ("Dots1", ROUTED | {"n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5}),
    "ernie4_5-moe": ("Ernie4_5_Moe", {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 32}),
    "exaone-moe": ("ExaoneMoe", EXPERTS | {"num_hidden_layers": 4, "sliding_window": 20}),
    "hunyuan-moe": ("HunYuanMoEV1", {"num_experts": 8, "moe_topk": 3, "intermediate_size": 32}),
    "granitemoe": (
        "GraniteMoe",
        GRANITE | {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32},
    ),
    "lfm2": ("Lfm2", LFM2),
    "lfm2moe": ("Lfm2Moe", LFM2 | EXPERTS | {"num_dense_layers": 1, "tie_word_embeddings": True}),
    "granitehybrid": ("GraniteMoeHybrid", GRANITE | MAMBA | {"num_local_experts": 0, "num_experts_per_tok": 0}),
    "granitehybrid with experts": (
        "GraniteMoeHybrid",
        GRANITE | MAMBA | {"num_local_experts": 8, "num_experts_per_tok": 3},
    ),
    "nemotron_h": ("NemotronH", NEMOTRON_H | {"head_dim": 32}),
    "nemotron_h_moe": ("NemotronH", WITHOUT_MLP),
    "nemotron_h_moe with narrower rows": ("NemotronH", WITHOUT_MLP | {"moe_latent_size": 40}),
    "falcon-h1": ("FalconH1", FALCON_H1 | {"mamba_n_groups": 1}),
    "qwen35": ("Qwen3_5Text", STATES),
    "qwen35moe": ("Qwen3_5MoeText", STATES | SHARED),
    "qwen3next": ("Qwen3Next", STATES | SHARED),
}

# Of a mixture stored in one tensor a file's directory has each expert's; what transformers computes of it is compared.
STACKED = ("gemma4 with experts", "llama4", "llama4 without norms of heads", "granitemoe", "granitehybrid with experts")
# Kinds of blocks, and what such a model has beside `MODELS`.
WIDE = {"linear_value_head_dim": 32, "linear_key_head_dim": 32}
QUANTIZED: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "granitehybrid Q8_0": ("granitehybrid", {"shared_intermediate_size": 64}, {"": "Q8_0", "norm": "F32"}),
    "nemotron_h Q8_0": ("nemotron_h", {}, {"": "Q8_0"}),
    "gemma4 Q8_0": ("gemma4 that borrows", {"hidden_size_per_layer_input": 32}, {"": "Q8_0"}),
    "llama4 Q8_0": ("llama4", {"intermediate_size": 64}, {"": "Q8_0", "router": "F32"}),
    "lfm2 Q4_0": ("lfm2", {}, {"": "Q4_0", "embed_tokens": "Q8_0"}),
    "qwen35 Q8_0": ("qwen35", WIDE, {"": "Q8_0"}),
    "qwen35 Q8_0, blocks of two heads": ("qwen35", {}, {"": "Q8_0"}),
    "qwen3next Q8_0": ("qwen3next", WIDE | {"shared_expert_intermediate_size": 32}, {"": "Q8_0", "gate": "F32"}),
}


def _written(path: Path, model: str, fields: dict[str, Any], kinds: dict[str, str]) -> tuple[Path, Path]:
    """Write a checkpoint and a file of it; return the directory that the file becomes, and the checkpoint."""
    kind, own = MODELS[model]
    checkpoint = write_as_gguf(write_drawn(path / "plain", kind, own | fields), path / "m.gguf", kinds)
    return gguf_model_dir(path / "m.gguf", cache=path / "cache"), checkpoint


def _numbers(path: Path) -> dict[str, Tensor]:
    """Return a directory's tensors, blocks as what they mean, by the names of a model that is no part of another."""
    kinds = json.loads((path / "config.json").read_text()).get("quantization_config", {}).get("modules", {})
    found = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if (kind := kinds.get(name.removesuffix(".weight"))) is not None:
            tensor = torch.from_numpy(gguf.quants.dequantize(tensor.numpy(), gguf.GGMLQuantizationType[kind]))
        found[full_name(name)] = tensor.float()
    return found


def _assert_same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor], *, within: float = 1e-6) -> None:
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.reshape(wanted[name].shape), wanted[name], rtol=within, atol=within, msg=name)


def _assert_same_config(path: Path, checkpoint: Path, **besides: Any) -> None:
    found, wanted = ModelConfig.from_dir(path), ModelConfig.from_dir(checkpoint)
    check_checkpoint(path, found)
    assert replace(found, dtype=wanted.dtype) == replace(wanted, **besides)


@pytest.mark.slow
@pytest.mark.parametrize("model", [model for model in MODELS if model != "falcon-h1"])
def test_config_and_tensors_are_the_checkpoints(tmp_path: Path, model: str) -> None:
    path, checkpoint = _written(tmp_path, model, {}, {})
    _assert_same_config(path, checkpoint)
    if model in STACKED:
        assert_as_transformers(path, checkpoint)
    else:
        _assert_same_tensors(_numbers(path), _numbers(checkpoint))


def test_factors_that_are_in_the_weights_are_not_told(tmp_path: Path) -> None:
    """A file of Falcon-H1 has its factors in its weights: the answers are the checkpoint's all the same."""
    path, checkpoint = _written(tmp_path, "falcon-h1", {}, {})
    plain = {"embedding_multiplier": 1.0, "logits_divisor": 1.0, "multipliers": Multipliers(), "score_scale": 0.25}
    _assert_same_config(path, checkpoint, **plain)
    assert_as_transformers(path, checkpoint)


@pytest.mark.parametrize("variant", [name for name, (model, *_) in QUANTIZED.items() if model not in STACKED])
def test_blocks_mean_the_same_numbers(tmp_path: Path, variant: str) -> None:
    path, checkpoint = _written(tmp_path, *QUANTIZED[variant])
    check_checkpoint(path, ModelConfig.from_dir(path))
    is_widened = "two heads" in variant  # a product whose inputs stand in another order becomes bfloat16
    found, wanted = _numbers(path), _numbers(checkpoint)
    outputs = {name for name in found if name.endswith("linear_attn.out_proj.weight")}
    if is_widened:
        widened = ({name: tensors.pop(name) for name in outputs} for tensors in (found, wanted))
        _assert_same_tensors(*widened, within=2**-8)
    _assert_same_tensors(found, wanted)


@pytest.mark.parametrize("variant", ["gemma4 Q8_0", "granitehybrid Q8_0", "llama4 Q8_0", "qwen35 Q8_0"])
def test_blocks_are_multiplied_by(tmp_path: Path, variant: str) -> None:
    path, checkpoint = _written(tmp_path, *QUANTIZED[variant])
    assert_as_transformers(path, checkpoint, within=1e-3)  # of states errors grow from token to token


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    kind, fields = MODELS["glm4moe"]
    checkpoint = write_drawn(tmp_path / "plain", kind, fields | {"num_hidden_layers": 3})
    write_as_gguf(checkpoint, tmp_path / "m.gguf", fields=_with_next_tokens)
    path = gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")
    found = ModelConfig.from_dir(path)
    check_checkpoint(path, found)
    assert found.num_layers == 2
    assert not any(name.startswith("model.layers.2.") for name in _numbers(path))


def _with_next_tokens(writer: gguf.GGUFWriter) -> None:
    plain_tokens(512)(writer)
    writer.add_nextn_predict_layers(1)
    writer.add_tensor("blk.2.nextn.eh_proj.weight", ONE)


@pytest.mark.parametrize(
    ("model", "change", "named"),
    [
        ("glm4moe", lambda writer: writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX), "by sigmoid"),
        ("glm4", lambda writer: writer.add_rope_dimension_sections([2, 1, 1, 0]), "in the order of images"),
        ("lfm2", lambda writer: writer.add_shortconv_l_cache(0), "lfm2.shortconv.l_cache = 0 is less than 1"),
        ("nemotron_h", lambda writer: writer.add_tensor("blk.0.ffn_up.weight", ONE), "blk.0 is of mlp and linear_att"),
        ("qwen35", lambda writer: writer.add_tensor("blk.0.ssm_x.weight", ONE), "unknown tensor blk.0.ssm_x.weight"),
        ("llama4", lambda writer: writer.add_sliding_window(0), "none of whose layers attend in chunks"),
        ("llama4", lambda writer: writer.add_sliding_window_pattern([True] * 4), "all but each 4th layer attend in"),
        ("lfm2", lambda writer: writer.add_head_count_kv([2, 0]), "not a whole number for each of 4 layers"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    tmp_path: Path, model: str, change: Callable[[gguf.GGUFWriter], None], named: str
) -> None:
    kind, fields = MODELS[model]

    def write(writer: gguf.GGUFWriter) -> None:
        plain_tokens(512)(writer)
        change(writer)

    write_as_gguf(write_drawn(tmp_path / "plain", kind, fields), tmp_path / "m.gguf", fields=write)
    with pytest.raises(ConfigError, match=named):
        gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")
