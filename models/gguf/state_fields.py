"""Fields of a GGUF file about layers that keep a state, as config.json has them."""

from __future__ import annotations

from collections.abc import Callable

from .model_file import Json, ModelFile
from .multipliers import granite_fields, turns_positions
from .routing import routing_fields, shared_size


def _lfm2(file: ModelFile) -> Json:
    return {
        "layer_types": _types(file, "conv"),
        "conv_L_cache": file.fields.count("shortconv.l_cache"),
        "conv_bias": file.has("shortconv.conv.bias"),
        "block_auto_adjust_ff_dim": False,  # the file has what comes of it
    }


def _lfm2_moe(file: ModelFile) -> Json:
    return _lfm2(file) | routing_fields(file) | {"norm_topk_prob": True}


def _mamba(file: ModelFile) -> Json:
    num_heads, size = file.fields.count("ssm.time_step_rank"), file.fields.count("ssm.inner_size")
    return {
        "mamba_d_ssm": size,
        "mamba_expand": size / file.config["hidden_size"],
        "mamba_n_heads": num_heads,
        "mamba_d_head": size // num_heads,
        "mamba_d_state": file.fields.count("ssm.state_size"),
        "mamba_n_groups": file.fields.count("ssm.group_count"),
        "mamba_d_conv": file.fields.count("ssm.conv_kernel"),
        "mamba_conv_bias": file.has("ssm_conv1d.bias"),
        "mamba_proj_bias": file.has("ssm_in.bias"),
    }


def _granite_hybrid(file: ModelFile) -> Json:
    name = "shared_intermediate_size"
    shared = shared_size(file, name)
    return {
        "num_local_experts": file.config.get("num_local_experts", 0),
        **_mamba(file),
        **granite_fields(file),
        "layer_types": _types(file, "linear_attention"),
        "position_embedding_type": "rope" if turns_positions(file) else "nope",
        name: shared[name] or file.config["intermediate_size"],
    }


def _falcon_h1(file: ModelFile) -> Json:
    """Return Falcon-H1's. Its factors are in the file's weights: config.json tells none."""
    return _mamba(file) | {"mamba_rms_norm": file.has("ssm_norm.weight"), "mamba_norm_before_gate": False}


def _nemotron_h(file: ModelFile) -> Json:
    """Return Nemotron-H's, whose layers are what their tensors are of."""
    own = _mamba(file)
    blocks = {"ffn_up_exps": "moe", "ffn_up": "mlp", "attn_q": "full_attention", "ssm_in": "linear_attention"}
    types = []
    for layer in range(file.config["num_hidden_layers"]):
        found = [kind for name, kind in blocks.items() if file.of_layer(layer, name)]
        if len(found) != 1:
            raise ValueError(f"blk.{layer} is of {' and '.join(found) or 'no kind'}; a layer has one block")
        types += found
    return {
        "layers_block_type": types,
        "moe_latent_size": file.integer("moe_latent_size", 0) or None,
        "partial_rotary_factor": 1.0,  # whatever the file tells of heads that are not turned
        "mamba_num_heads": own["mamba_n_heads"],
        "mamba_head_dim": own["mamba_d_head"],
        "n_groups": own["mamba_n_groups"],
        "ssm_state_size": own["mamba_d_state"],
        "conv_kernel": own["mamba_d_conv"],
        "use_conv_bias": own["mamba_conv_bias"],
        "use_bias": own["mamba_proj_bias"],
        **(routing_fields(file) | shared_size(file, "moe_shared_expert_intermediate_size") if "moe" in types else {}),
    }


def _delta_nets(file: ModelFile) -> Json:
    num_values = file.fields.count("ssm.time_step_rank")
    return {
        "full_attention_interval": file.fields.count("full_attention_interval"),
        "linear_conv_kernel_dim": file.fields.count("ssm.conv_kernel"),
        "linear_key_head_dim": file.fields.count("ssm.state_size"),
        "linear_num_key_heads": file.fields.count("ssm.group_count"),
        "linear_num_value_heads": num_values,
        "linear_value_head_dim": file.fields.count("ssm.inner_size") // num_values,
    }


def _delta_nets_with_experts(file: ModelFile) -> Json:
    return _delta_nets(file) | shared_size(file, "shared_expert_intermediate_size")


def _types(file: ModelFile, stateful: str) -> list[str]:
    """Return each layer's type: those without KV heads keep a state."""
    heads = file.fields.of_layers("attention.head_count_kv", file.config["num_hidden_layers"], 0)
    return ["full_attention" if count else stateful for count in heads]


STATE_FIELDS: dict[str, Callable[[ModelFile], Json]] = {
    "falcon-h1": _falcon_h1,
    "granitehybrid": _granite_hybrid,
    "lfm2": _lfm2,
    "lfm2moe": _lfm2_moe,
    "nemotron_h": _nemotron_h,
    "nemotron_h_moe": _nemotron_h,
    "qwen35": _delta_nets,
    "qwen35moe": _delta_nets_with_experts,
    "qwen3next": _delta_nets_with_experts,
}
