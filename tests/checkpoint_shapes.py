"""Small random checkpoints in bfloat16 that CUDA attends to, by shapes alone: `transformers` writes none of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvferry.models.checkpoint import tensor_shapes
from kvferry.models.config import ModelConfig

SHAPE: dict[str, object] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
QWEN3_MOE: dict[str, object] = SHAPE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}
GPT_OSS: dict[str, object] = SHAPE | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_act": "silu",
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "attention_bias": True,
}
GLM_4: dict[str, object] = SHAPE | {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "use_qk_norm": True,
}
SMOLLM_3: dict[str, object] = SHAPE | {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "no_rope_layers": [1, 0],
}
GEMMA_2: dict[str, object] = SHAPE | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 64,
    "sliding_window": 20,
    "attn_logit_softcapping": 2.0,  # low enough for these weights
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}


def write_by_shapes(path: Path, config: dict[str, object]) -> Path:
    """Write a checkpoint in bfloat16 of the names and shapes that the product reads of a config.json."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(ModelConfig.from_dir(path))
    tensors = {name: drawn(name, shape, generator).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors")
    return path


def drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw a tensor, [outputs, inputs] or a vector, so that attention is peaked and the best token leads."""
    spread = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return (4.0 if name == "model.norm.weight" else 1.0) + 0.1 * spread
    if len(shape) == 1:
        return spread if name.endswith("sinks") else 0.1 * spread
    scale = 3.0 if name.endswith(("q_proj.weight", "q_b_proj.weight")) else 1.0
    return spread * (scale / math.sqrt(shape[-1]))
