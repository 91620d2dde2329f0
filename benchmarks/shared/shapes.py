"""Model directories for measuring: a shape without weights (load format `dummy`), and a small whole checkpoint.

A speed depends on a model's shape and not on what its weights say, so big shapes need no file but config.json. Where
answers are compared, weights are written to disk: both sides must read the same ones. They are scaled so that
activations stay near 1, queries are three times larger and the final norm gains 4, which makes attention peaked and
lets the best token lead by more than rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.common.errors import ConfigError
from kvferry.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

_LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "dtype": "bfloat16",
    "eos_token_id": 1,
}
# By the checkpoints' own config.json (Llama 3, Meta 2024); positions are set to what a measurement needs.
SHAPES: dict[str, dict[str, object]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    # An eighth of it in width and depth: small enough to be written, computed in float32 and compared.
    "llama-small": {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    # Few wide layers: much of a step in large products, little in anything else.
    "llama-wide": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "llama-tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
}


def write_shape(path: Path, name: str, max_model_len: int) -> Path:
    """config.json of a shape and a tokenizer that knows bytes; `path` is made if missing."""
    if name not in SHAPES:
        raise ConfigError(f"--shape {name}: choose from {', '.join(SHAPES)}")
    path.mkdir(parents=True, exist_ok=True)
    _write_config(path, _LLAMA | SHAPES[name] | {"max_position_embeddings": max_model_len})
    _write_tokenizer(path)
    return path


def write_checkpoint(path: Path, name: str, max_model_len: int, seed: int = 0) -> Path:
    """A shape with random weights on disk."""
    from safetensors.torch import save_file

    write_shape(path, name, max_model_len)
    save_file(dict(_tensors(ModelConfig.from_dir(path), seed)), path / "model.safetensors")
    return path


def _tensors(model: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    import torch

    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(gain / math.sqrt(columns)).bfloat16()

    def norm(mean: float) -> Tensor:
        return torch.randn(size, generator=generator).mul_(0.1).add_(mean).bfloat16()

    size, mlp = model.hidden_size, model.intermediate_size
    num_q, num_kv = model.num_qo_heads * model.head_dim, model.num_kv_heads * model.head_dim
    yield "model.embed_tokens.weight", matrix(model.vocab_size, size)
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", norm(1.0)
        yield f"{prefix}.self_attn.q_proj.weight", matrix(num_q, size, 3.0)
        yield f"{prefix}.self_attn.k_proj.weight", matrix(num_kv, size)
        yield f"{prefix}.self_attn.v_proj.weight", matrix(num_kv, size)
        yield f"{prefix}.self_attn.o_proj.weight", matrix(size, num_q)
        yield f"{prefix}.post_attention_layernorm.weight", norm(1.0)
        yield f"{prefix}.mlp.gate_proj.weight", matrix(mlp, size)
        yield f"{prefix}.mlp.up_proj.weight", matrix(mlp, size)
        yield f"{prefix}.mlp.down_proj.weight", matrix(size, mlp)
    yield "model.norm.weight", norm(4.0)
    yield "lm_head.weight", matrix(model.vocab_size, size)


def _write_config(path: Path, config: Mapping[str, object]) -> None:
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _write_tokenizer(path: Path) -> None:
    """Two marks and the 256 bytes. Ids beyond have no text; whoever measures sends and reads ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    marks = ["<|begin|>", "<|end|>"]
    vocab = {token: index for index, token in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": marks[0], "eos_token": marks[1]}
    (path / "tokenizer_config.json").write_text(json.dumps(names) + "\n", encoding="utf-8")
