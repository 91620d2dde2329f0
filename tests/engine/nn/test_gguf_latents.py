"""GGUF files of DeepSeek, newer and older ones: config and log-probabilities of the checkpoint they came of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from kvferry.common.errors import ConfigError
from kvferry.models.checkpoint import check_checkpoint
from kvferry.models.config import ModelConfig
from kvferry.models.default import gguf_model_dir
from kvferry.models.gguf.latent import latent_tensors
from kvferry.models.gguf.tensors import Part

from ...deepseek import write_deepseek
from ...gguf_files import plain_tokens, write_as_gguf
from ..weights.test_formats import BFLOAT16, FLOAT32, assert_as_transformers
from .test_gguf_families import YARN, assert_same_model, write_drawn

DEEPSEEK = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "head_dim": 8,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
DEEPSEEK_V2 = DEEPSEEK | {
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "rope_parameters": YARN | {"rope_theta": 10_000.0, "mscale": 0.707, "mscale_all_dim": 0.707},
}
DEEPSEEK_V3 = DEEPSEEK | {"q_lora_rank": 64, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
GLM_LITE = {"norm_topk_prob": True, "n_group": 1, "topk_group": 1}
MISTRAL_4 = {key: value for key, value in DEEPSEEK.items() if key != "head_dim"} | {
    "first_k_dense_replace": 0,
    "n_shared_experts": 1,
    "q_lora_rank": 64,
    "rope_parameters": YARN
    | {"rope_theta": 10_000.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
    | {"original_max_position_embeddings": 16},  # within the lengths of tests
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2 lite": ("DeepseekV2", DEEPSEEK_V2),
    "v2": ("DeepseekV2", DEEPSEEK_V3 | {"topk_method": "group_limited_greedy"}),
    "v3": ("DeepseekV3", DEEPSEEK_V3 | {"norm_topk_prob": True}),
    "mistral4": ("Mistral4", MISTRAL_4),
}


def _checkpoint(path: Path, model: str) -> Path:
    kind, fields = MODELS[model]
    return write_deepseek(path, "mistral4", **fields) if kind == "Mistral4" else write_drawn(path, kind, fields)


@pytest.mark.slow
@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_config_and_log_probabilities_are_the_checkpoints(tmp_path: Path, model: str, is_old: bool) -> None:
    checkpoint = write_as_gguf(_checkpoint(tmp_path / "plain", model), tmp_path / "m.gguf", is_old=is_old)
    assert_same_model(tmp_path / "m.gguf", checkpoint, tmp_path / "cache")


@pytest.mark.slow
def test_a_file_of_glm_4_7_flash_is_one_of_deepseek_v3s_kind(tmp_path: Path) -> None:
    checkpoint = write_drawn(tmp_path / "plain", "Glm4MoeLite", DEEPSEEK_V3 | GLM_LITE)
    write_as_gguf(checkpoint, tmp_path / "m.gguf")
    path = gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")
    check_checkpoint(path, ModelConfig.from_dir(path))
    assert_as_transformers(path, checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize(("is_old", "within"), [(False, BFLOAT16), (True, FLOAT32)])
def test_blocks_mean_the_same_numbers(tmp_path: Path, is_old: bool, within: float) -> None:
    """What makes keys and values of latents, where these are apart, is widened to bfloat16."""
    kinds = {"": "Q8_0", "gate": "F32"}
    checkpoint = write_as_gguf(_checkpoint(tmp_path / "plain", "v3"), tmp_path / "m.gguf", kinds, is_old=is_old)
    path = gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")
    check_checkpoint(path, ModelConfig.from_dir(path))
    assert_as_transformers(path, checkpoint, within=within)


def test_what_makes_keys_needs_what_makes_values(tmp_path: Path) -> None:
    part = Part("blk.0.attn_k_b.weight", np.zeros((2, 32, 16), np.float32), "F32", (2, 32, 16))
    with pytest.raises(ValueError, match=r"blk\.0 has attn_k_b and needs attn_k_b and attn_v_b"):
        list(latent_tensors({"0": {"attn_k_b": part}}, ()))


@pytest.mark.parametrize(
    ("model", "key", "value", "named"),
    [
        ("v2", "expert_weights_norm", True, "expert_weights_norm = True is not supported with scores of softmax"),
        ("v2", "expert_gating_func", 4, "expert_gating_func = 4 is not supported"),
        ("mistral4", "expert_gating_func", 2, "expert_gating_func = 2 is not supported"),
        ("mistral4", "attention.temperature_length", 8, "attention.temperature_length = 8: queries grow from the orig"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    tmp_path: Path, model: str, key: str, value: int, named: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(f".{named}")):
        _with_field(tmp_path, model, key, value)


@pytest.mark.parametrize("growth", [0.25, 0.0])
def test_queries_grow_as_a_file_tells_where_it_does(tmp_path: Path, growth: float) -> None:
    rope = ModelConfig.from_dir(_with_field(tmp_path, "mistral4", "attention.temperature_scale", growth)).rope
    assert (rope.query_beta, rope.kind) == (growth, "yarn")


def _with_field(path: Path, model: str, key: str, value: float) -> Path:
    """Return the directory that a file with one field more becomes."""

    def add(writer: gguf.GGUFWriter) -> None:
        plain_tokens(512)(writer)
        add_value: Any = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add_value(f"{writer.arch}.{key}", value)

    write_as_gguf(_checkpoint(path / "plain", model), path / "m.gguf", fields=add)
    return gguf_model_dir(path / "m.gguf", cache=path / "cache")
