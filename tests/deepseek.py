"""Small random checkpoints of DeepSeek-V2 and V3, and of their like, written by transformers' own classes.

    write_deepseek(tmp_path / "model")                                  a V3 of 3 layers, all dense
    write_deepseek(tmp_path / "model", "v2", q_lora_rank=None)          another generation or shape
    write_for_cuda(tmp_path / "model")                                  a V3 that CUDA attends to, without transformers

Weights have the scales of `checkpoints.py`: attention is peaked, and the best token leads by more than rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from .checkpoint_shapes import drawn, write_by_shapes
from .checkpoints import write_tokenizer

SHAPE: dict[str, object] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "max_position_embeddings": 2048,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
Generation = Literal["v2", "v3", "glm4 lite", "youtu", "mistral4"]
_CLASSES: dict[Generation, str] = {
    "v2": "DeepseekV2",
    "v3": "DeepseekV3",
    "glm4 lite": "Glm4MoeLite",
    "youtu": "Youtu",
    "mistral4": "Mistral4",
}
TOKEN_SIZE = 32 + 8  # numbers that are kept of a token in a layer
EXPERTS: dict[str, dict[str, object]] = {  # of the layers behind the first
    "v2": {"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    "v3": {"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "norm_topk_prob": True},
    # Queries grow within the lengths of tests.
    "mistral4": {
        "first_k_dense_replace": 0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 100,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
}
YARN: dict[str, object] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 128,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
}


def write_deepseek(
    path: Path,
    generation: Generation = "v3",
    *,
    tokenizer: bool = False,
    dtype: torch.dtype = torch.float32,
    **fields: object,
) -> Path:
    """Write a checkpoint into `path` (made if missing) and return it; `fields` replace those of SHAPE."""
    import transformers

    name = _CLASSES[generation]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **fields})
    model: torch.nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("inv_freq"):
            continue
        with torch.no_grad():
            parameter.copy_(drawn(name, tuple(parameter.shape), generator))
    model.to(dtype).save_pretrained(path)  # type: ignore[operator]  # torch knows no such attribute of a module
    if tokenizer:
        write_tokenizer(path, int(str({**SHAPE, **fields}["vocab_size"])))
    return path


def write_for_cuda(path: Path, **fields: object) -> Path:
    """Write a V3 in bfloat16 with latents of 512 + 64."""
    own: dict[str, object] = {"hidden_size": 128, "num_hidden_layers": 2, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    architecture = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16"}
    own["routed_scaling_factor"] = 1.0  # by the class's 2.5 experts that nearly tie decide over tokens, in bfloat16
    own |= {"rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "rope_interleave": True}
    return write_by_shapes(path, {**SHAPE, **architecture, **own, **fields})
