"""Fields of a GGUF file by a checkpoint's config.json, as the converter of llama.cpp writes them, by hand.

`conversion/` there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .quantized import Array

if TYPE_CHECKING:
    import gguf
    from torch import Tensor

_ARCHITECTURES = {
    "MixtralForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "SmolLM3ForCausalLM": "smollm3",
    "Llama4ForCausalLM": "llama4",
    "Ministral3ForCausalLM": "mistral3",
    "Mistral4ForCausalLM": "mistral4",
    "ArceeForCausalLM": "arcee",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Qwen3NextForCausalLM": "qwen3next",
    "Qwen3_5ForCausalLM": "qwen35",
    "Qwen3_5MoeForCausalLM": "qwen35moe",
    "OlmoeForCausalLM": "olmoe",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma4ForCausalLM": "gemma4",
    "Phi3ForCausalLM": "phi3",
    "Glm4ForCausalLM": "glm4",
    "Glm4MoeForCausalLM": "glm4moe",
    "MiniMaxM2ForCausalLM": "minimax-m2",
    "Dots1ForCausalLM": "dots1",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo2",
    "SeedOssForCausalLM": "seed_oss",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "Ernie4_5_MoeForCausalLM": "ernie4_5-moe",
    "Exaone4ForCausalLM": "exaone4",
    "ExaoneMoeForCausalLM": "exaone-moe",
    "HunYuanDenseV1ForCausalLM": "hunyuan-dense",
    "HunYuanMoEV1ForCausalLM": "hunyuan-moe",
    "Cohere2ForCausalLM": "cohere2",
    "GraniteForCausalLM": "granite",
    "GraniteMoeForCausalLM": "granitemoe",
    "GraniteMoeHybridForCausalLM": "granitehybrid",
    "Lfm2ForCausalLM": "lfm2",
    "Lfm2MoeForCausalLM": "lfm2moe",
    "NemotronHForCausalLM": "nemotron_h",
    "FalconH1ForCausalLM": "falcon-h1",
    "GptOssForCausalLM": "gpt-oss",
    "DeepseekV2ForCausalLM": "deepseek2",
    "DeepseekV3ForCausalLM": "deepseek2",
    "Glm4MoeLiteForCausalLM": "deepseek2",
}
# Converters that tell no size of heads.
LATENT = ("deepseek2", "mistral4")
_WITHOUT_HEAD_DIM = ("phi3", "granite", "granitemoe", "granitehybrid", "lfm2", "lfm2moe", "olmo2", *LATENT)
_WITH_WINDOWS = ("gemma2", "gemma3", "phi3", "gpt-oss", "exaone4", "exaone-moe", "cohere2")
_DELTA_NETS = ("qwen3next", "qwen35", "qwen35moe")
_TOLD_PARTS = ("llama4", "glm4", "glm4moe", "minimax-m2", *_DELTA_NETS)


def architecture_of(config: dict[str, Any]) -> str:
    name = _ARCHITECTURES[config["architectures"][0]]
    return f"{name}_moe" if name == "nemotron_h" and "moe" in config["layers_block_type"] else name


def num_layers(config: dict[str, Any]) -> int:
    count: int = config.get("num_hidden_layers") or len(config["layers_block_type"])
    return count


def write_fields(writer: gguf.GGUFWriter, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> None:
    writer.add_block_count(num_layers(config))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(_feed_forward(config, name, tensors))
    writer.add_head_count(config["num_attention_heads"])
    if name not in LATENT:
        writer.add_head_count_kv(_kv_heads(config))
    _write_norms(writer, config, name)
    if name not in _WITHOUT_HEAD_DIM:
        head_dim = config["global_head_dim"] if name == "gemma4" else config["head_dim"]
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    _write_rope(writer, config, name)
    _write_experts(writer, config, name, tensors)
    _write_states(writer, config, name)
    if name in _WITH_WINDOWS or config["architectures"][0].startswith("Olmo3"):
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if name in ("exaone4", "exaone-moe") or config["architectures"][0].startswith("Olmo3"):
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if name == "gemma4":
        _write_gemma4(writer, config)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if name == "cohere2":
        writer.add_logit_scale(config["logit_scale"])
    if name.startswith("granite"):
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])


def _write_gemma4(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    wide, share = config["global_head_dim"], config["rope_parameters"]["full_attention"]["partial_rotary_factor"]
    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"] or 0)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    writer.add_key_length_swa(config["head_dim"])
    writer.add_value_length_swa(config["head_dim"])
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    writer.add_rope_dimension_count(wide)
    writer.add_rope_dimension_count_swa(config["head_dim"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    turned = int(share * wide // 2)
    writer.add_tensor("rope_freqs.weight", np.array([1.0] * turned + [1e30] * (wide // 2 - turned), np.float32))


def _feed_forward(config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> int | list[int]:
    if name.startswith("nemotron"):
        sizes = {"mlp": config["intermediate_size"], "moe": config.get("moe_intermediate_size")}
        return [sizes.get(kind, 0) for kind in config["layers_block_type"]]
    if name == "lfm2":
        return tensors["model.layers.0.feed_forward.w1.weight"].shape[0]
    if name == "gemma4" and config["use_double_wide_mlp"]:
        own, num_kept = config["intermediate_size"], num_layers(config) - config["num_kv_shared_layers"]
        return [own if layer < num_kept else 2 * own for layer in range(num_layers(config))]
    size: int = (
        config.get("intermediate_size_mlp") or config.get("intermediate_size") or config["moe_intermediate_size"]
    )
    return size


def _kv_heads(config: dict[str, Any]) -> int | list[int]:
    """Return the number of KV heads, or of each layer, where some have none."""
    count: int = config["num_key_value_heads"]
    types = config.get("layers_block_type") or config.get("layer_types") or []
    if (wide := config.get("num_global_key_value_heads")) is not None:
        return [count if kind == "sliding_attention" else wide for kind in types]
    if config["architectures"][0].startswith("Qwen3") or not {"conv", "linear_attention"} & set(types):
        return count
    return [count if kind == "full_attention" else 0 for kind in types]


def _write_norms(writer: gguf.GGUFWriter, config: dict[str, Any], name: str) -> None:
    if name == "cohere2":
        writer.add_layer_norm_eps(config["layer_norm_eps"])
        return
    known = ("rms_norm_eps", "norm_eps", "layer_norm_epsilon")
    writer.add_layer_norm_rms_eps(next(config[key] for key in known if key in config))


def _write_rope(writer: gguf.GGUFWriter, config: dict[str, Any], name: str) -> None:
    import gguf

    rope = config.get("rope_parameters")
    if name.startswith(("granite", "nemotron")):  # whatever heads have
        writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    if name == "granitehybrid":
        writer.add_rope_scaling_finetuned(config.get("position_embedding_type") == "rope")
    if rope is None:
        return
    rope = rope.get("full_attention", rope)
    if name != "gemma2":
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, config["head_dim"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if rope.get("attention_factor") is not None:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
    if name == "mistral3":
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    fraction = rope.get("partial_rotary_factor") or 1.0
    if name in _TOLD_PARTS:
        writer.add_rope_dimension_count(int(config["head_dim"] * fraction))
    if name == "phi3":
        writer.add_rope_dimension_count(int(fraction * config["hidden_size"]) // config["num_attention_heads"])
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        scale = config["max_position_embeddings"] / config["original_max_position_embeddings"]
        factor = np.sqrt(1 + np.log(scale) / np.log(config["original_max_position_embeddings"])) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(float(factor))
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32))


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> Array:
    """Return by what frequencies are divided."""
    lengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    assert rope["low_freq_factor"] == rope["high_freq_factor"] == 1.0
    factors = np.where(lengths < rope["original_max_position_embeddings"], 1.0, rope["factor"])
    return np.asarray(factors, np.float32)


def _write_experts(writer: gguf.GGUFWriter, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> None:
    import gguf

    def told(*keys: str) -> Any:
        return next((config[key] for key in keys if config.get(key) is not None), None)

    shared = told("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size")
    if shared and name != "nemotron_h":
        writer.add_expert_shared_feed_forward_length(shared)
    count = told("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    if count is None or name == "nemotron_h":
        return
    writer.add_expert_count(count)
    if not count:
        return
    writer.add_expert_used_count(told("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"))
    has_one_size = name in ("gpt-oss", "minimax-m2", "llama4")
    if size := told("moe_intermediate_size") or (has_one_size and config["intermediate_size"]):
        writer.add_expert_feed_forward_length(size if isinstance(size, int) else size[0])
    if name in LATENT:
        return  # `gguf_latents.py`
    shared_count = told("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
    if shared_count is not None:
        writer.add_expert_shared_count(shared_count if isinstance(shared_count, int) else shared_count[0])
    first = told("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
    if first is None and "mlp_layer_types" in config:
        first = config["mlp_layer_types"].index("sparse")
    if first is not None:
        writer.add_leading_dense_block_count(first)
    if (step := told("moe_layer_interval", "interleave_moe_layer_step")) is not None:
        writer.add_interleave_moe_layer_step(step)
    if told("routed_scaling_factor") is not None:
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if name in ("glm4moe", "dots1", "exaone-moe", "nemotron_h_moe"):
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    if (narrower := told("moe_latent_size")) is not None:
        writer.add_moe_latent_size(narrower)
    if name in ("glm4moe", "minimax-m2", "lfm2moe"):
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if name != "minimax-m2" and told("n_group") is not None:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])


def _write_states(writer: gguf.GGUFWriter, config: dict[str, Any], name: str) -> None:
    if name in ("lfm2", "lfm2moe"):
        writer.add_shortconv_l_cache(config["conv_L_cache"])
        return
    if name in _DELTA_NETS:
        writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
        writer.add_ssm_state_size(config["linear_key_head_dim"])
        writer.add_ssm_group_count(config["linear_num_key_heads"])
        writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
        writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
        writer.add_full_attention_interval(4)
        return
    if name.startswith("nemotron"):
        words = ("conv_kernel", "ssm_state_size", "n_groups", "mamba_num_heads", "mamba_head_dim")
    elif name in ("granitehybrid", "falcon-h1"):
        words = ("mamba_d_conv", "mamba_d_state", "mamba_n_groups", "mamba_n_heads", "mamba_d_head")
    else:
        return
    kernel, state, groups, heads, head_dim = (config[word] for word in words)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_state_size(state)
    writer.add_ssm_group_count(groups)
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(heads * head_dim)
