"""What config.json leaves out, or says in words that its family has not, is as in transformers' classes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers

from kvferry.common.errors import ConfigError
from kvferry.models.config import ModelConfig
from kvferry.models.families.nested import NESTED
from kvferry.models.families.table import FAMILIES

# What a class demands that its own defaults have not.
_DEMANDED: dict[str, dict[str, object]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16, "num_experts_per_tok": 4},
}
# The weights' shapes tell of another number of these; shorter sequences, and no drafts, are no other answers.
_TOLD_BY_WEIGHTS = {"mamba_d_ssm", "moe_intermediate_size", "num_key_value_heads"}
_NO_ANSWERS = {"eos_token_id", "max_position_embeddings", "num_nextn_predict_layers"}
# Some classes' default is a whole scaling, five factors of 1, or what the whole model decides.
_OTHERS = {
    **{name: {"rope_parameters"} for name in ("cwm", "gpt_oss", "ministral3", "mistral4")},
    "dots1": {"n_shared_experts"},
    "falcon_h1": {"ssm_multipliers"},
    "qwen3_vl_moe_text": {"tie_word_embeddings"},
}
_SIZES = {  # nothing stands in for these, which all public checkpoints tell
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    *("num_experts_per_tok", "moe_k", "moe_topk"),
    *("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"),
    *("layer_types", "layers_block_type", "mamba_d_state", "mamba_head_dim", "mamba_n_heads", "mamba_num_heads"),
}
_STRAY: dict[str, object] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "n_group": 4,
    "routed_scaling_factor": 3.5,
    "topk_group": 1,
}
_UNSCALED = [
    *("ernie4_5_moe", "granitemoe", "hunyuan_v1_moe", "llama", "llama4_text", "minimax_m2", "mixtral", "olmoe"),
    *("qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next"),
]


def _configs() -> Iterator[tuple[str, str, bool]]:
    """Yield each architecture and its language model's name, and whether this is a part of it."""
    yield from ((architecture, family.name, False) for architecture, family in FAMILIES.items())
    yield from ((architecture, name, True) for architecture, nested in NESTED.items() for name in nested.texts)


def _of_class(name: str) -> dict[str, Any]:
    """Return what transformers' class of a name has by default, and what it demands."""
    return dict(transformers.AutoConfig.for_model(name, **_DEMANDED.get(name, {})).to_dict())


def _load(path: Path, config: Mapping[str, object]) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(config))
    return ModelConfig.from_dir(path)


@pytest.mark.parametrize(("architecture", "name", "is_part"), list(_configs()))
def test_what_is_untold_is_as_in_transformers(tmp_path: Path, architecture: str, name: str, is_part: bool) -> None:
    def load(told: dict[str, Any]) -> ModelConfig:
        raw = {"architectures": [architecture]} | ({"text_config": told | {"model_type": name}} if is_part else told)
        return _load(tmp_path, raw)

    told = {key: value for key, value in _of_class(name).items() if key not in ("architectures", "model_type")}
    expected = load(told)
    others = _TOLD_BY_WEIGHTS | _NO_ANSWERS | _OTHERS.get(name, set())
    for key in told.keys() - others:
        try:
            found = load({other: value for other, value in told.items() if other != key})
        except ConfigError:
            assert key in _SIZES, f"{key} is demanded"
        else:
            assert found == expected, key


@pytest.mark.parametrize("name", _UNSCALED)
def test_words_of_other_families_are_not_read(tmp_path: Path, name: str) -> None:
    [architecture] = [architecture for architecture, family in FAMILIES.items() if family.name == name]
    told = _of_class(name) | {"architectures": [architecture]}
    assert _load(tmp_path, told | _STRAY) == _load(tmp_path, told)


def test_words_of_the_family_are(tmp_path: Path) -> None:
    told = _of_class("glm4_moe") | {"architectures": ["Glm4MoeForCausalLM"]}
    experts = _load(tmp_path, told | _STRAY).experts
    assert experts is not None
    assert (experts.num_groups, experts.num_chosen_groups, experts.scale) == (4, 1, 3.5)
    told = _of_class("gemma2") | {"architectures": ["Gemma2ForCausalLM"], "hidden_act": "silu"}
    assert _load(tmp_path, told).activation == "gelu_tanh"
    told = _of_class("lfm2_moe") | {"architectures": ["Lfm2MoeForCausalLM"]}
    experts = _load(tmp_path, told | _STRAY).experts
    assert experts is not None and (experts.num_groups, experts.scale) == (1, 3.5)


@pytest.mark.parametrize(("method", "num_groups"), [(..., 1), ("greedy", 1), ("group_limited_greedy", 4)])
def test_deepseek_2_chooses_among_groups_where_it_says_so(tmp_path: Path, method: object, num_groups: int) -> None:
    told = _of_class("deepseek_v2") | {"architectures": ["DeepseekV2ForCausalLM"], "n_group": 4, "topk_group": 2}
    told |= {"topk_method": method}
    experts = _load(tmp_path, {key: value for key, value in told.items() if value is not ...}).experts
    assert experts is not None and experts.num_groups == num_groups


@pytest.mark.parametrize(
    "changes", [{}, {"no_rope_layers": [1, 0, 0, 1, 1, 0]}, {"no_rope_layer_interval": 2}], ids=str
)
def test_smollm3_has_windows_where_it_turns_no_positions(tmp_path: Path, changes: dict[str, object]) -> None:
    changes |= {"num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 16}
    types = transformers.SmolLM3Config(**changes).layer_types
    told = _of_class("smollm3") | changes | {"architectures": ["SmolLM3ForCausalLM"], "max_window_layers": 3}
    untold = {key: told[key] for key in told.keys() - {"layer_types", *({"no_rope_layers"} - changes.keys())}}
    windows = _load(tmp_path, untold).sliding_windows
    assert windows == tuple(16 if kind == "sliding_attention" else None for kind in types)
    assert any(windows)
