"""Small random checkpoints as `transformers` writes them: of its own classes, with weights whose best token leads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
# Of four layers three keep a state.
STATES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
# Layers of one block each, in an order in which mixers and feed-forwards do not take turns.
NEMOTRON_H: dict[str, Any] = {
    "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp", "linear_attention"],
    "conv_kernel": 4,
    "mamba_head_dim": 32,
    "mamba_num_heads": 4,
    "n_groups": 2,
    "ssm_state_size": 16,
}
NEMOTRON_H_MOE: dict[str, Any] = NEMOTRON_H | {
    "layers_block_type": [
        *("linear_attention", "moe", "full_attention", "moe"),
        *("linear_attention", "linear_attention", "mlp"),
    ],
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "n_group": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
    "topk_group": 1,
}
# Each layer attends and keeps a state; factors as published, but for those that would leave nothing of a part.
FALCON_H1: dict[str, Any] = {
    "num_hidden_layers": 3,
    "mamba_d_ssm": 128,
    "mamba_n_heads": 4,
    "mamba_d_state": 16,
    "embedding_multiplier": 5.65,
    "lm_head_multiplier": 0.5,
    "key_multiplier": 0.39,
    "attention_in_multiplier": 1.5,
    "attention_out_multiplier": 0.9375,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.7,
    "ssm_multipliers": [0.35, 0.25, 0.7, 0.5, 0.4],
    "mlp_multipliers": [0.88, 0.58],
}
# Layers that attend in chunks, and one that does not; in every second one experts, which see what they are weighed by.
LLAMA_4: dict[str, Any] = {
    "num_hidden_layers": 4,
    "attention_chunk_size": 48,
    "floor_scale": 100,
    "interleave_moe_layer_step": 2,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
}
# Layers with a window, and wide ones whose keys are their values: two of these lie in a page.
GEMMA_4: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 2,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 40,
    "final_logit_softcapping": 30.0,
}
# The last layers read what others keep, and each is given an input of its own.
GEMMA_4_BORROWING: dict[str, Any] = GEMMA_4 | {
    "attention_k_eq_v": False,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": None,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 512,
}
# Beside each MLP experts, by norms of their own.
GEMMA_4_MOE: dict[str, Any] = GEMMA_4 | {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 3,
    "moe_intermediate_size": 32,
}
# Norms before a head, as transformers' classes name them: their logits lie apart.
_LAST_NORMS = tuple(f"model.{name}.weight" for name in ("norm", "embedding_norm", "norm_f", "final_layernorm"))


def write_model(
    path: Path, config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32, draws_norms: bool = False
) -> Path:
    """Write a model of a transformers config, its matrices drawn with the scale that keeps activations near 1.

    `draws_norms`: of norms no number is like another, which tells one norm from the next.
    """
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # what is not drawn below stays as the class begins it, at random in some
        model = auto.from_config(config, dtype=torch.float32)
    draw(model, seed=seed)
    if draws_norms:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if "norm" in name:
                    tensor.mul_(torch.empty_like(tensor).uniform_(0.5, 1.5, generator=generator))
    model.to(dtype).save_pretrained(path)
    return path


def draw(model: torch.nn.Module, *, seed: int = 0) -> None:
    """Draw the weights of a model, or of a part of one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.fill_(4.0 if name in _LAST_NORMS else 1.0)
            elif tensor.dim() >= 2:
                gain = (
                    3.0
                    if "q_proj" in name or name.endswith((".gate.weight", ".router.weight", ".router.proj.weight"))
                    else 1.0
                )
                tensor.normal_(0, gain / math.sqrt(tensor.shape[-1]), generator=generator)
            elif name.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
                tensor.uniform_(0.5, 1.0, generator=generator)
            elif name.endswith("sinks"):
                tensor.normal_(0, 1.0, generator=generator)
            elif "bias" in name:
                tensor.normal_(0, 0.1, generator=generator)


def write_state_models(root: Path, variants: Mapping[str, tuple[str, Mapping[str, Any]]], **common: Any) -> Path:
    """Write each small checkpoint whose layers keep states into a folder of its name: the class of its config, and what
    it has of its own. `common`: what all have.
    """
    import transformers

    for name, (kind, fields) in variants.items():
        write_model(root / name, getattr(transformers, f"{kind}Config")(**SMALL | STATES | common | dict(fields)))
    return root
