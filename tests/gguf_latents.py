"""What llama.cpp's converter makes of a DeepSeek's latents, by hand: fields of a GGUF file, and matrices of heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .quantized import Array

if TYPE_CHECKING:
    import gguf


def write_latents(writer: gguf.GGUFWriter, config: dict[str, Any], *, is_old: bool) -> None:
    import gguf

    turned, kept = config["qk_rope_head_dim"], config["kv_lora_rank"]
    of_heads = (config["qk_nope_head_dim"] + turned, config["v_head_dim"])
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(kept)
    writer.add_head_count_kv(config["num_attention_heads"] if is_old else 1)
    key_length, value_length = of_heads if is_old else (kept + turned, kept)
    writer.add_key_length(key_length)
    writer.add_value_length(value_length)
    if not is_old:
        writer.add_key_length_mla(of_heads[0])
        writer.add_value_length_mla(of_heads[1])
    writer.add_rope_dimension_count(turned)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if config["n_group"] is not None:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
    if config["architectures"][0].startswith(("DeepseekV3", "Glm4MoeLite")):
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if config.get("norm_topk_prob"):
        writer.add_expert_weights_norm(True)
    if (mscale := config["rope_parameters"].get("mscale_all_dim")) is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * mscale)


def heads_apart(values: Array, config: dict[str, Any]) -> tuple[Array, Array]:
    """`kv_b_proj` -> what makes keys [heads, nope_dim, kv_rank] and values [heads, value_dim, kv_rank]."""
    by_head = values.reshape(config["num_attention_heads"], -1, values.shape[1])
    return by_head[:, : config["qk_nope_head_dim"]], by_head[:, config["qk_nope_head_dim"] :]
