"""config.json as the world writes it: what runs is read right, what does not is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvferry.common.errors import ConfigError
from kvferry.models.checkpoint import check_checkpoint, tensor_shapes
from kvferry.models.config import ModelConfig
from kvferry.models.draft import check_draft
from kvferry.models.parts.mamba import MambaConfig

from ..checkpoints import write_embedding_model

SMOLLM2: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
QWEN3_MOE: dict[str, object] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
}


def _load(path: Path, changes: dict[str, object], generation: dict[str, object] | None = None) -> ModelConfig:
    config = {key: value for key, value in (SMOLLM2 | changes).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_dir(path)


def test_smollm2(tmp_path: Path) -> None:
    config = _load(tmp_path, {})
    assert (config.num_layers, config.num_qo_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert config.rope.theta == 100_000 and config.rope.kind == "default"
    assert config.tie_embeddings and config.dtype == "bfloat16"
    assert config.eos_token_ids == {2}
    assert config.max_model_len == config.longest_model_len == 8192
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm)


def test_qwen3_has_head_norms_and_its_own_head_size(tmp_path: Path) -> None:
    config = _load(tmp_path, {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128})
    assert config.qk_norm and config.head_dim == 128 and not config.qkv_bias


def test_qwen2_has_biases_on_q_k_v_alone(tmp_path: Path) -> None:
    config = _load(tmp_path, {"architectures": ["Qwen2ForCausalLM"]})
    assert config.qkv_bias and not config.o_bias and not config.qk_norm


@pytest.mark.parametrize("written", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_answers_end_at_the_tokenizers_end_token_too(tmp_path: Path, written: object) -> None:
    """Chats that are taught to a base model end by a token that generation_config.json of the base does not name."""
    added = [{"id": 3, "content": "<|endoftext|>"}, {"id": 5, "content": "<|im_end|>", "special": True}]
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": {"vocab": {"a": 0}}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": written}))
    assert _load(tmp_path, {}, {"eos_token_id": 3}).eos_token_ids == {3, 5}
    assert _load(tmp_path, {"vocab_size": 4}, {"eos_token_id": 3}).eos_token_ids == {3}
    for text in ('{"added_tokens": []}', "{", '{"added_tokens": {}}'):
        tokenizer.write_text(text)
        assert _load(tmp_path, {}, {"eos_token_id": 3}).eos_token_ids == {3}


def test_numbers_and_names_may_be_written_as_other_tools_write_them(tmp_path: Path) -> None:
    config = _load(tmp_path, {"max_position_embeddings": 32768.0, "hidden_act": "swish"})
    assert (config.max_model_len, config.activation) == (32768, "silu")
    for value in (32768.5, float("inf"), -1.0):
        with pytest.raises(ConfigError, match=r"max_position_embeddings = .*: must be a whole number"):
            _load(tmp_path, {"max_position_embeddings": value})


@pytest.mark.parametrize("told", [..., None, "auto"])
def test_a_type_that_is_not_told_is_that_of_the_weights(tmp_path: Path, told: object) -> None:
    assert _load(tmp_path, {"torch_dtype": told}).dtype == "float32"
    for dtype in ("bfloat16", "float16", "float32"):
        save_file({"embed_tokens.weight": torch.zeros(1, dtype=getattr(torch, dtype))}, tmp_path / "model.safetensors")
        assert _load(tmp_path, {"torch_dtype": told}).dtype == dtype
    assert _load(tmp_path, {"torch_dtype": "bfloat16"}).dtype == "bfloat16"
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert _load(tmp_path, {"torch_dtype": told}).dtype == "float32", "whoever loads the weights tells of them"


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Qwen3Model"])
def test_an_embedding_model_may_have_no_head(tmp_path: Path, architecture: str) -> None:
    model_dir = write_embedding_model(tmp_path / "model", architecture=architecture)
    config = ModelConfig.from_dir(model_dir)
    check_checkpoint(model_dir, config)
    assert not config.has_head and config.architecture == "Qwen3ForCausalLM"
    with pytest.raises(ConfigError, match=r"speculative_config: .* has no head"):
        check_draft(model_dir, model_dir, 100, 1)
    tensors = load_file(model_dir / "model.safetensors")
    whole = {f"model.{name}": tensor for name, tensor in tensors.items()}
    save_file(whole, model_dir / "model.safetensors")
    with pytest.raises(ConfigError, match=r"1 tensors are missing: lm_head\.weight"):  # of one that generates
        check_checkpoint(model_dir, ModelConfig.from_dir(model_dir))
    for of_embedding in ("embed_tokens.weight", "model.embed_tokens.weight"):
        head = {"lm_head.weight": tensors["embed_tokens.weight"], of_embedding: tensors["embed_tokens.weight"] * 2}
        save_file(head, model_dir / "model.safetensors")
        assert ModelConfig.from_dir(model_dir).has_head


def test_generation_config_wins_for_end_tokens(tmp_path: Path) -> None:
    assert _load(tmp_path, {}, {"eos_token_id": [7, 9]}).eos_token_ids == {7, 9}


def test_end_tokens_may_be_absent(tmp_path: Path) -> None:
    assert _load(tmp_path, {"eos_token_id": None}, {}).eos_token_ids == frozenset()


def test_model_type_serves_where_architectures_are_missing(tmp_path: Path) -> None:
    assert _load(tmp_path, {"architectures": ..., "model_type": "qwen2"}).architecture == "Qwen2ForCausalLM"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 5}, [None] * 30),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 5}, [5] * 30),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, [None] * 30),
        ({"architectures": ["MistralForCausalLM"]}, [4096] * 30),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 5}, [None] * 30),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 5,
                "use_sliding_window": True,
                "max_window_layers": 28,
            },
            [None] * 28 + [5] * 2,
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "sliding_window": 5,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] + ["full_attention"] * 29,
            },
            [5] + [None] * 29,
        ),
        (QWEN3_MOE | {"use_sliding_window": False}, [None] * 30),
        (QWEN3_MOE | {"use_sliding_window": True, "max_window_layers": 28}, [5] * 30),
    ],
    ids=str,
)
def test_sliding_windows(tmp_path: Path, changes: dict[str, object], expected: list[int | None]) -> None:
    assert list(_load(tmp_path, changes).sliding_windows) == expected


def test_some_layers_turn_no_positions(tmp_path: Path) -> None:
    smollm3: dict[str, object] = {"architectures": ["SmolLM3ForCausalLM"]}
    config = _load(tmp_path, smollm3)
    assert [layer for layer, is_local in enumerate(config.local_layers) if is_local] == list(range(3, 30, 4))
    assert config.local_rope is not None and config.local_rope.kind == "none"
    told = [1, 1, 0] * 12  # for more layers than there are
    assert _load(tmp_path, smollm3 | {"no_rope_layers": told}).local_layers == (False, False, True) * 10
    for value in ([1] * 29, [2] * 30, 4):
        with pytest.raises(ConfigError, match="no_rope_layers"):
            _load(tmp_path, smollm3 | {"no_rope_layers": value})
    assert _load(tmp_path, {"no_rope_layers": told}).local_rope is None, "a Llama's config may say anything"


def test_layers_are_dense_or_sparse_as_they_are_typed(tmp_path: Path) -> None:
    glm: dict[str, object] = {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    assert _load(tmp_path, glm).sparse_layers == (False, *[True] * 29)
    assert _load(tmp_path, glm | {"first_k_dense_replace": 3}).sparse_layers == (*[False] * 3, *[True] * 27)
    typed = _load(tmp_path, glm | {"mlp_layer_types": ["sparse", "dense"] * 15})
    assert typed.sparse_layers == (True, False) * 15 and typed.experts is not None and typed.experts.shared_size == 32
    for types in (["sparse"], ["moe"] * 30, "sparse"):
        with pytest.raises(ConfigError, match="mlp_layer_types"):
            _load(tmp_path, glm | {"mlp_layer_types": types})


def test_norms_of_heads_are_there_where_the_config_says_so(tmp_path: Path) -> None:
    glm: dict[str, object] = {"architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 8, "num_experts_per_tok": 2}
    assert not _load(tmp_path, glm).qk_norm and _load(tmp_path, glm | {"use_qk_norm": True}).qk_norm
    assert _load(tmp_path, glm).rope.fraction == 0.5


def test_exaone_turns_positions_in_layers_with_a_window_alone(tmp_path: Path) -> None:
    exaone: dict[str, object] = {"architectures": ["Exaone4ForCausalLM"], "sliding_window": 5}
    config = _load(tmp_path, exaone | {"sliding_window_pattern": 4})
    assert config.local_layers == tuple((layer + 1) % 4 != 0 for layer in range(30))
    assert config.rope.kind == "none" and config.local_rope is not None and config.local_rope.kind == "default"
    full = {"layer_types": ["full_attention"] * 30}
    config = _load(tmp_path, exaone | full)  # as if others had a window, as in transformers
    assert config.rope.kind == "none" and not any(config.local_layers)
    for changes in ({"sliding_window": None}, full | {"sliding_window": None}):
        config = _load(tmp_path, exaone | changes)
        assert config.rope.kind == "default" and config.local_rope is None and not any(config.local_layers)


def test_queries_grow_with_their_positions_where_a_family_has_it(tmp_path: Path) -> None:
    growing = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
    growing |= {"llama_4_scaling_beta": 0.1}
    told: dict[str, object] = {"rope_parameters": growing, "architectures": ["Ministral3ForCausalLM"]}
    rope = _load(tmp_path, told).rope
    assert (rope.query_beta, rope.query_len, rope.kind) == (0.1, 16384, "yarn")
    with pytest.raises(ConfigError, match=r"llama_4_scaling_beta = 0\.1: queries that grow"):
        _load(tmp_path, told | {"architectures": ["MistralForCausalLM"]})


def test_experts_may_be_in_some_layers_between_others(tmp_path: Path) -> None:
    told: dict[str, object] = {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 3,
        "moe_layer_interval": 2,
    }
    config = _load(tmp_path, told | {"moe_layer_end_index": -1})
    assert [layer for layer, is_sparse in enumerate(config.sparse_layers) if is_sparse] == list(range(3, 30, 2))
    assert config.experts is not None and config.experts.shared_size == 64 and config.experts.scoring == "softmax"
    assert config.experts.score_bias == "mlp.moe_statics.e_score_correction_bias"
    config = _load(tmp_path, told | {"moe_layer_end_index": 7})
    assert [layer for layer, is_sparse in enumerate(config.sparse_layers) if is_sparse] == [3, 5, 7]
    for key, value in (("moe_layer_start_index", -1), ("moe_layer_end_index", "7")):
        with pytest.raises(ConfigError, match=f"{key} = "):
            _load(tmp_path, told | {key: value})


def test_granite_4_has_layers_of_mamba_and_experts_or_has_not(tmp_path: Path) -> None:
    told: dict[str, object] = {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "layer_types": ["attention"] * 30,
        "num_local_experts": 0,
        "position_embedding_type": "rope",
        "shared_intermediate_size": 96,
    }
    plain = _load(tmp_path, told)
    assert (plain.intermediate_size, plain.states, plain.experts, plain.rope.kind) == (96, None, None, "default")
    hybrid = told | {
        "layer_types": ["mamba"] * 27 + ["attention"] * 3,
        "mamba_d_conv": 4,
        "mamba_d_head": "auto",
        "mamba_d_state": 128,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_n_heads": 48,
        "num_experts_per_tok": 6,
        "num_local_experts": 64,
        "position_embedding_type": "nope",
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }
    config = _load(tmp_path, hybrid)
    assert isinstance(config.states, MambaConfig) and config.states.layers == (True,) * 27 + (False,) * 3
    assert config.states.num_heads * config.states.head_dim == 2 * config.hidden_size
    for told_limits, limits in (([0.0, "inf"], (0.0, math.inf)), ([0.01, 1], (0.01, 1.0)), (None, (0.0, math.inf))):
        bounded = _load(tmp_path, hybrid | {"time_step_limit": told_limits}).states
        assert isinstance(bounded, MambaConfig) and bounded.step_limits == limits
    assert config.rope.kind == "none" and config.local_rope is None
    assert config.experts is not None and config.experts.shared == "shared_mlp" and all(config.sparse_layers)
    names = tensor_shapes(config)
    assert names["model.layers.29.shared_mlp.input_linear.weight"] == (192, config.hidden_size)
    assert "model.layers.0.mamba.conv1d.bias" in names and "model.layers.0.self_attn.q_proj.weight" not in names
    for changes, message in (
        ({"mamba_d_head": 5}, "mamba_d_head = 5: 48 heads of 5 numbers are not the"),
        ({"mamba_n_groups": 5}, "mamba_n_groups = 5: must divide mamba_n_heads = 48"),
        ({"time_step_limit": [1.0, 0.5]}, r"time_step_limit = \[1.0, 0.5\]: must be two numbers from 0 on, the"),
        ({"time_step_limit": [0.1]}, r"time_step_limit = \[0.1\]: must be two numbers from 0 on"),
        ({"time_step_limit": ["x", 1]}, r"time_step_limit = \['x', 1\]: must be two numbers from 0 on"),
        (
            {"time_step_limit": [0, 10**400]},
            r"time_step_limit = \[0, 10+.*: must be at most 1\.79769e\+308, or infinity",
        ),
        ({"layer_types": ["mamba"] * 30}, "a model without a layer that keeps keys and values is not supported"),
        (
            {"layer_types": ["moe"] * 30},
            r"layer_types = .*: must name one of \['attention', .*\] for each of 30",
        ),
        ({"layer_types": [["mamba"]] * 30}, r"layer_types = .*: must name one of \['attention', .*\] for each of 30"),
        ({"layer_types": ["mamba", {}] * 15}, r"layer_types = .*: must name one of \['attention', .*\] for each of 30"),
    ):
        with pytest.raises(ConfigError, match=message):
            _load(tmp_path, hybrid | changes)


def test_lfm2_tells_its_mlp_and_its_layers_in_words_of_its_own(tmp_path: Path) -> None:
    told: dict[str, object] = {
        "architectures": ["Lfm2ForCausalLM"],
        "block_auto_adjust_ff_dim": True,
        "block_ff_dim": 6656,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256,
        "conv_L_cache": 3,
        "conv_bias": False,
        "full_attn_idxs": [2, 5],
        "norm_eps": 1e-05,
        "num_hidden_layers": 6,
        "tie_embedding": False,
    }
    config = _load(tmp_path, told)
    assert config.intermediate_size == 4608 and not config.tie_embeddings and config.rms_norm_eps == 1e-5
    assert config.states is not None and config.states.layers == (True, True, False, True, True, False)
    assert _load(tmp_path, told | {"block_auto_adjust_ff_dim": False}).intermediate_size == 6656
    types = ["conv", "full_attention"] * 3
    assert _load(tmp_path, told | {"layer_types": types}).kv_layers == (1, 3, 5)
    with pytest.raises(ConfigError, match=r"full_attn_idxs = .*: must list the layers that attend, of 6"):
        _load(tmp_path, told | {"full_attn_idxs": [6]})
    for nothing in ({"block_ff_dim": 1}, {"block_ffn_dim_multiplier": 1e-4}):
        with pytest.raises(ConfigError, match=r"block_ff_dim = .*: a gated MLP has no column of it"):
            _load(tmp_path, told | nothing)


def test_an_architecture_may_have_the_name_that_it_was_published_under(tmp_path: Path) -> None:
    code = {"AutoModelForCausalLM": "modeling_exaone_moe.ExaoneMoEForCausalLM"}
    told: dict[str, object] = {
        "architectures": ["ExaoneMoEForCausalLM"],
        "first_last_k_dense_replace": 1,
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 10,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "sliding_window": 64,
    }
    config = _load(tmp_path, told | {"auto_map": code})
    assert config == _load(tmp_path, told | {"architectures": ["ExaoneMoeForCausalLM"]})
    assert config.architecture == "ExaoneMoeForCausalLM"
    for changes, message in (
        ({"architectures": ["ExaoneMOEForCausalLM"]}, "is not supported; .*; the nearest is ExaoneMoeForCausalLM"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map.*never run"),
    ):
        with pytest.raises(ConfigError, match=message):
            _load(tmp_path, told | changes)


def test_ernies_converter_names_another_class(tmp_path: Path) -> None:
    code = {"AutoModelForCausalLM": "modeling_ernie4_5.Ernie4_5_ForCausalLM"}
    config = _load(tmp_path, {"architectures": ["Ernie4_5_ForCausalLM"], "auto_map": code})
    assert config == _load(tmp_path, {"architectures": ["Ernie4_5ForCausalLM"]})


def test_minimax_has_words_of_its_own(tmp_path: Path) -> None:
    told: dict[str, object] = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM"},
        "head_dim": 128,
        "rotary_dim": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_mtp_modules": 3,
    }
    config = _load(tmp_path, told)
    assert (config.rope.fraction, config.num_draft_layers) == (0.5, 3)
    assert config.experts is not None and config.experts.scoring == "sigmoid" and config.experts.normalised
    assert config.experts.score_bias == "block_sparse_moe.e_score_correction_bias"
    assert _load(tmp_path, told | {"num_mtp_modules": 0}).num_draft_layers == 0


def test_mixtral_turns_positions_slowly_unless_it_says_otherwise(tmp_path: Path) -> None:
    told = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
    config = _load(tmp_path, told | {"rope_theta": ..., "rms_norm_eps": ...})
    assert (config.rope.theta, config.rms_norm_eps) == (1_000_000.0, 1e-5)
    assert _load(tmp_path, told | {"rope_theta": 10_000.0}).rope.theta == 10_000


@pytest.mark.parametrize(
    ("architecture", "scoring", "is_read"),
    [
        ("DeepseekV2ForCausalLM", "softmax", True),
        ("DeepseekV2ForCausalLM", "sigmoid", False),
        ("DeepseekV3ForCausalLM", "sigmoid", True),
        ("DeepseekV3ForCausalLM", "softmax", False),
        ("DeepseekV3ForCausalLM", "sqrtsoftplus", False),
        ("Dots1ForCausalLM", "noaux_tc", True),
        ("MiniMaxM2ForCausalLM", "sigmoid", True),
    ],
)
def test_another_family_s_scores_are_refused(tmp_path: Path, architecture: str, scoring: str, is_read: bool) -> None:
    told = {"architectures": [architecture], "n_routed_experts": 8, "num_experts_per_tok": 2, "scoring_func": scoring}
    if is_read:
        experts = _load(tmp_path, told).experts
        assert experts is not None and experts.scoring == ("softmax" if scoring == "softmax" else "sigmoid")
        return
    with pytest.raises(ConfigError, match=f"scoring_func = '{scoring}': experts of this family are scored by"):
        _load(tmp_path, told)


def test_attention_over_chunks_is_served_within_the_first_one(tmp_path: Path) -> None:
    chunks: dict[str, object] = {"chunk_size": 262_144, "local_size": 8192, "original_max_position_embeddings": 262_144}
    told: dict[str, object] = {
        "architectures": ["Qwen2ForCausalLM"],
        "max_position_embeddings": 1_010_000,
        "dual_chunk_attention_config": chunks,
    }
    config = _load(tmp_path, told)
    assert config.max_model_len == config.longest_model_len == 253_952
    assert _load(tmp_path, told | {"max_position_embeddings": 32_768}).max_model_len == 32_768
    with pytest.raises(ConfigError, match="local_size = 262144: must be below chunk_size"):
        _load(tmp_path, told | {"dual_chunk_attention_config": chunks | {"local_size": 262_144}})


def test_a_language_model_beside_others_must_be_of_its_family(tmp_path: Path) -> None:
    text = {"model_type": "mistral", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    nested: dict[str, object] = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text}
    config = _load(tmp_path, nested)
    assert config.hidden_size == 64 and config.sliding_windows == (4096,) * config.num_layers
    with pytest.raises(ConfigError, match=r"model_type = 'qwen3': text_config .* as mistral or .* or mistral4 alone"):
        _load(tmp_path, nested | {"text_config": text | {"model_type": "qwen3"}})


def test_a_whole_model_s_word_on_its_head_and_its_ends_goes_before_its_language_model_s(tmp_path: Path) -> None:
    """transformers writes into `text_config` what its class has by default, however the whole model is."""
    text = {"model_type": "ministral3", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    nested: dict[str, object] = {"architectures": ["Mistral3ForConditionalGeneration"], "tie_word_embeddings": ...}
    for whole, own, expected in ((True, False, True), (True, ..., True), (..., True, True), (False, False, False)):
        of_text = text if own is ... else text | {"tie_word_embeddings": own}
        told = nested | {"tie_word_embeddings": whole, "text_config": of_text}
        assert _load(tmp_path, told).tie_embeddings is expected, (whole, own)
    for ends in ({}, {"eos_token_id": None}, {"eos_token_id": 1}):
        assert _load(tmp_path, nested | {"eos_token_id": [1, 106], "text_config": text | ends}).eos_token_ids == {
            1,
            106,
        }
    for none in (..., None):
        told = nested | {"eos_token_id": none, "text_config": text | {"eos_token_id": 5}}
        assert _load(tmp_path, told).eos_token_ids == {5}
    told = nested | {"sliding_window": 9, "text_config": text | {"sliding_window": None}}
    assert not any(_load(tmp_path, told).sliding_windows), "null says that there is no window"


def test_the_length_that_a_model_was_trained_on_goes_first_where_it_stands_beside_its_scaling(tmp_path: Path) -> None:
    key, bands = "original_max_position_embeddings", {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    factors = {"short_factor": [1.0] * 32, "long_factor": [1.0] * 32}
    for kind, expected in {"yarn": 2048, "llama3": 2048, "longrope": 2048}.items():
        scaling = {"rope_type": kind, "factor": 4.0, key: 4096, **bands, **factors}
        assert _load(tmp_path, {"rope_scaling": scaling, key: 2048}).rope.original_max_len == expected
        assert _load(tmp_path, {"rope_scaling": scaling}).rope.original_max_len == 4096
    gemma3 = {"architectures": ["Gemma3ForCausalLM"], "hidden_act": ..., "head_dim": 64}
    yarn = {"rope_type": "yarn", "factor": 4.0}
    for own, expected in (({key: 4096}, 4096), ({}, 8192)):  # of a type of layers
        parameters = {"full_attention": yarn | own, "sliding_attention": {"rope_type": "default"}}
        config = _load(tmp_path, gemma3 | {"rope_scaling": ..., "rope_parameters": parameters, key: 2048})
        assert config.rope.original_max_len == expected


def test_any_number_of_heads_up_to_a_tile_attends_to_latents_on_cuda(tmp_path: Path) -> None:
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2}
    latent = _load(tmp_path, {"architectures": ["DeepseekV3ForCausalLM"], **experts}).latent
    assert latent is not None
    for num_heads in (1, 5, 20, 128):
        latent.check_cuda(num_heads, 8192)
    with pytest.raises(ConfigError, match="up to 128 heads a rank, not 129"):
        latent.check_cuda(129, 8192)
    with pytest.raises(ConfigError, match="possible: 60000"):
        latent.check_cuda(20, 100_000)


def test_bounds_of_queries_and_keys_are_refused(tmp_path: Path) -> None:
    olmoe: dict[str, object] = {"architectures": ["OlmoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2}
    assert _load(tmp_path, olmoe | {"clip_qkv": None}).qk_norm
    with pytest.raises(ConfigError, match=r"clip_qkv = 8\.0"):
        _load(tmp_path, olmoe | {"clip_qkv": 8.0})


def test_rotary_parameters_in_the_newer_place(tmp_path: Path) -> None:
    parameters = {"rope_type": "default", "rope_theta": 500.0}
    config = _load(tmp_path, {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": parameters})
    assert config.rope.theta == 500.0


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_a_scaling_that_was_added_to_the_newer_place_goes_first(tmp_path: Path, key: str) -> None:
    """Model cards tell so of yarn."""
    told: dict[str, object] = {"rope_type": "default", "rope_theta": 500.0}
    added = {"rope_theta": ..., "rope_scaling": {key: "yarn", "factor": 4.0}}
    flat = _load(tmp_path, added | {"rope_parameters": told}).rope
    assert (flat.kind, flat.factor, flat.theta) == ("yarn", 4.0, 500.0)
    gemma3 = {"architectures": ["Gemma3ForCausalLM"], "hidden_act": ..., "head_dim": 64}
    by_type = {"full_attention": told, "sliding_attention": told | {"rope_theta": 50.0}}
    config = _load(tmp_path, gemma3 | added | {"rope_parameters": by_type})
    assert (config.rope.kind, config.rope.factor, config.rope.theta) == ("yarn", 4.0, 500.0)
    assert config.local_rope is not None
    assert (config.local_rope.kind, config.local_rope.theta) == ("default", 50.0)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"type": "linear", "factor": 2.0}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            8192,
        ),
    ],
    ids=str,
)
def test_rope_scaling_extends_the_longest_length(tmp_path: Path, scaling: dict[str, object], longest: int) -> None:
    config = _load(tmp_path, {"rope_scaling": scaling})
    assert config.max_model_len == 8192 and config.longest_model_len == longest


# As published, but for what decides nothing; they leave out what their family has anyway.
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
}
PHI4_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 200064,
}


def _published(path: Path, config: dict[str, object]) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(config))
    return ModelConfig.from_dir(path)


def test_gemma3_is_the_text_of_a_model_that_sees(tmp_path: Path) -> None:
    config = _published(tmp_path, GEMMA3_4B)
    assert (config.num_qo_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert config.tie_embeddings and config.dtype == "bfloat16" and config.eos_token_ids == {1, 106}
    assert config.sliding_windows == ((1024,) * 5 + (None,)) * 5 + (1024,) * 4
    assert (config.rope.theta, config.rope.kind, config.rope.factor) == (1e6, "linear", 8.0)
    assert config.local_rope is not None
    assert (config.local_rope.theta, config.local_rope.kind) == (1e4, "default")
    assert config.score_scale == 256**-0.5 and config.activation == "gelu_tanh"


@pytest.mark.parametrize("architecture", ["SeedOssForCausalLM", "Ernie4_5ForCausalLM"])
def test_a_size_of_heads_that_is_null_is_the_usual_one(tmp_path: Path, architecture: str) -> None:
    told: dict[str, object] = {"architectures": [architecture]}
    assert _load(tmp_path, told).head_dim == 128
    assert _load(tmp_path, told | {"head_dim": None}).head_dim == 64


def test_a_cap_that_is_null_is_none(tmp_path: Path) -> None:
    gemma2 = {"architectures": ["Gemma2ForCausalLM"], "rope_theta": 10000.0}
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    told, untold = _load(tmp_path, gemma2 | caps), _load(tmp_path, gemma2)
    assert (told.score_cap, told.logits_cap) == (None, None)
    assert (untold.score_cap, untold.logits_cap) == (50.0, 30.0)


def test_phi4_turns_a_part_of_each_head(tmp_path: Path) -> None:
    config = _published(tmp_path, PHI4_MINI)
    assert config.rope.fraction == 0.75 and len(config.rope.long_factors) == 48
    assert config.rope.is_long(8192) and not config.rope.is_long(4096)
    assert config.rope.attention_factor == pytest.approx(1.1902, abs=1e-4)
    with pytest.raises(ConfigError, match="short_factor must be a list of 48 numbers"):
        _published(
            tmp_path, PHI4_MINI | {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": []}}
        )


def test_hunyuans_dynamic_scaling_is_fixed_by_its_alpha(tmp_path: Path) -> None:
    hunyuan = {"architectures": ["HunYuanDenseV1ForCausalLM"], "head_dim": 128, "rope_theta": 10000.0}
    scaling = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "mscale": 1.0}  # as with its 7B
    config = _load(tmp_path, hunyuan | {"rope_scaling": scaling})
    assert config.rope.kind == "default" and config.rope.theta == pytest.approx(10000.0 * 1000.0 ** (128 / 126))
    refused: tuple[dict[str, object], ...] = (
        {"architectures": ["LlamaForCausalLM"]},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    )
    for changes in refused:
        with pytest.raises(ConfigError, match="'dynamic' is not supported"):
            _load(tmp_path, hunyuan | {"rope_scaling": scaling} | changes)
    for head_dim, alpha in ((2, 1000.0), (128, 1e307)):
        with pytest.raises(ConfigError, match=r"alpha = .*: (gives no base|must be at most)"):
            _load(tmp_path, hunyuan | {"head_dim": head_dim, "rope_scaling": scaling | {"alpha": alpha}})


def test_cohere2_turns_where_it_has_a_window_and_scales_its_logits(tmp_path: Path) -> None:
    command: dict[str, object] = {"architectures": ["Cohere2ForCausalLM"], "rms_norm_eps": ..., "layer_norm_eps": 1e-4}
    config = _load(tmp_path, command | {"num_hidden_layers": 4, "logit_scale": 0.25})
    assert config.sliding_windows == (4096, 4096, 4096, None) and config.local_layers == (True, True, True, False)
    assert (config.rope.kind, config.local_rope and config.local_rope.kind) == ("none", "default")
    assert (config.logits_divisor, config.rms_norm_eps) == (4.0, 1e-4)
    whole = _load(tmp_path, command | {"num_hidden_layers": 1, "layer_types": ["full_attention"]})
    assert whole.rope.kind == "none" and whole.local_layers == (False,)


def test_hunyuan_counts_experts_by_layer(tmp_path: Path) -> None:
    hunyuan: dict[str, object] = {"architectures": ["HunYuanMoEV1ForCausalLM"], "num_experts": 64}
    told: dict[str, object] = {
        "moe_topk": [8] * 30,
        "moe_intermediate_size": [3072] * 30,
        "num_shared_expert": [1] * 30,
    }
    experts = _load(tmp_path, hunyuan | told).experts  # as with A13B
    assert experts is not None
    assert (experts.num_chosen, experts.intermediate_size, experts.shared_size) == (8, 3072, 3072)
    with pytest.raises(ConfigError, match=r"moe_topk = \[8, .*whole number"):
        _load(tmp_path, hunyuan | told | {"moe_topk": [8] * 29 + [4]})


def test_yarns_temperature_has_a_factor(tmp_path: Path) -> None:
    published = {"attn_factor": 0.8782488562869419}  # with DeepSeek-R1-0528-Qwen3-8B
    for told, expected in (({}, 1.1386), (published, 1.0), (published | {"attention_factor": 1.25}, 1.25)):
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768} | told
        config = _load(tmp_path, {"max_position_embeddings": 131072, "rope_scaling": scaling})
        assert config.rope.attention_factor == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_any_scaling_turns_a_part_of_each_head(tmp_path: Path, kind: str) -> None:
    scaling = {"type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = _published(tmp_path, PHI4_MINI | {"rope_scaling": scaling})
    assert (config.rope.kind, config.rope.fraction) == (kind, 0.75)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MinistralForCausalLM"]},
            "'MinistralForCausalLM' is not supported; these are: LlamaForCausalLM",
        ),
        ({"architectures": ["MinistralForCausalLM"]}, "; the nearest is Ministral3ForCausalLM"),
        ({"architectures": ["GPT2LMHeadModel"]}, "Qwen3VLForConditionalGeneration$"),
        ({"architectures": ..., "model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map.*never run"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor = None"),
        ({"rope_scaling": 3}, "rope_scaling = 3: must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "each layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"hidden_size": "big"}, "hidden_size = 'big'"),
        ({"vocab_size": True}, "vocab_size = True"),
        ({"num_key_value_heads": 2}, "must divide num_attention_heads = 9"),
        ({"head_dim": 7}, "must be even"),
        ({"hidden_size": 1}, "head_dim = None: the head size 0 must be even, and not 0"),
        ({"torch_dtype": "int8"}, "dtype 'int8'"),
        ({"eos_token_id": ["a"]}, "eos_token_id"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1"),
        ({"is_causal": False}, "is_causal = False: tokens see those before them alone"),
        ({"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_theta = 1: yarn"),
        (
            {
                "original_max_position_embeddings": 1,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [1.0] * 32},
            },
            "original_max_position_embeddings = 1: must be at least 2",
        ),
    ],
    ids=str,
)
def test_what_would_run_wrongly_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, changes)


def test_a_mark_of_byte_order_is_no_part_of_a_config(tmp_path: Path) -> None:
    """Editors of some systems write one; all of a directory's JSON files are read alike."""
    plain = _load(tmp_path, {})
    path = tmp_path / "config.json"
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert ModelConfig.from_dir(tmp_path) == plain


@pytest.mark.parametrize(("text", "message"), [(None, "is missing"), ("{", "valid JSON"), ("[1]", "JSON object")])
def test_unreadable_config_names_the_file(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"config\.json.*{message}"):
        ModelConfig.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 10**30}, "num_hidden_layers = 1000000000000000000000000000000: must be at most 1024"),
        ({"num_hidden_layers": 2000}, "num_hidden_layers = 2000: must be at most 1024"),
        ({"hidden_size": 1e308}, "hidden_size = 1e+308: must be at most 2147483647"),
        ({"rope_theta": 1e300}, "rope_theta = 1e+300: must be at most 9.0072e+15"),
        (QWEN3_MOE | {"num_experts": 10**6}, "num_experts = 1000000: must be at most 4096"),
        ({"num_hidden_layers": "9" * 1000}, f"num_hidden_layers = '{'9' * 199}...: must be a whole number"),
        ({"hidden_act": []}, "hidden_act = []: only silu"),
        (
            {"architectures": ["Lfm2ForCausalLM"], "layer_types": ["conv"] * 30, "conv_L_cache": 3, "norm_eps": 1e-5}
            | {"block_multiple_of": 256, "block_ffn_dim_multiplier": 1e308},
            "block_ffn_dim_multiplier = 1e+308: must be at most",
        ),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_multiplied_by_them(
    tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError) as failure:
        _load(tmp_path, changes)
    assert told in str(failure.value)
