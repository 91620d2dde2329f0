"""A tiny Llama or Mixtral with random weights and a tokenizer of its own: made in a second, answers in milliseconds.

For runs in which processes matter and words do not. Weights keep activations near 1, the final norm makes logits large:
the best token leads by far more than rounding, and yet answers differ from prompt to prompt. Tokens are bytes and pairs
of them, so that stop strings may straddle tokens and any text comes back as it went in.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

_LAYERS, _HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM, _INNER = 2, 64, 4, 2, 16, 128
_MAX_VOCAB = 512
_CHOSEN_EXPERTS = 2
_SPECIAL = ("<|bos|>", "<|eos|>", "<|start|>", "<|end|>")  # ids 0, 1, 2, 3
_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_TEXT = (
    "A worker that dies takes its blocks with it; a stream goes on elsewhere and no reader sees more than a pause. "
    "Every token is told once, in its order, and what an earlier attempt still says is dropped. "
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg. 0123456789 (2 + 2 = 4)\n"
)


def write_tiny_model(
    path: Path, *, max_model_len: int = 4096, dtype: str = "float32", seed: int = 0, num_experts: int = 0
) -> Path:
    """Write a checkpoint in Hugging Face's layout into `path`, made if missing, and return it.

    With `num_experts` (at least two) each layer is a mixture of so many.
    """
    path.mkdir(parents=True, exist_ok=True)
    vocab_size = _write_tokenizer(path)
    _write_json(path / "config.json", _config(vocab_size, max_model_len, dtype, num_experts))
    _write_json(path / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [1, 3]})
    _write_weights(path, vocab_size, dtype, seed, num_experts)
    return path


def _config(vocab_size: int, max_model_len: int, dtype: str, num_experts: int) -> dict[str, object]:
    experts = {"num_local_experts": num_experts, "num_experts_per_tok": _CHOSEN_EXPERTS} if num_experts else {}
    return {
        "architectures": ["MixtralForCausalLM" if num_experts else "LlamaForCausalLM"],
        "model_type": "mixtral" if num_experts else "llama",
        **experts,
        "num_hidden_layers": _LAYERS,
        "hidden_size": _HIDDEN,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "intermediate_size": _INNER,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_model_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _write_weights(path: Path, vocab_size: int, dtype: str, seed: int, num_experts: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    kind: torch.dtype = getattr(torch, dtype)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))).to(kind)

    def norm(mean: float) -> torch.Tensor:
        return (mean + 0.1 * torch.randn(_HIDDEN, generator=generator)).to(kind)

    tensors = {
        "model.embed_tokens.weight": matrix(vocab_size, _HIDDEN),
        "model.norm.weight": norm(4.0),
        "lm_head.weight": matrix(vocab_size, _HIDDEN),
    }
    shapes = {
        "self_attn.q_proj": (_HEADS * _HEAD_DIM, _HIDDEN, 3.0),
        "self_attn.k_proj": (_KV_HEADS * _HEAD_DIM, _HIDDEN, 1.0),
        "self_attn.v_proj": (_KV_HEADS * _HEAD_DIM, _HIDDEN, 1.0),
        "self_attn.o_proj": (_HIDDEN, _HEADS * _HEAD_DIM, 1.0),
    }
    wide, narrow = (_INNER, _HIDDEN, 1.0), (_HIDDEN, _INNER, 1.0)
    if num_experts:
        shapes["block_sparse_moe.gate"] = (num_experts, _HIDDEN, 3.0)
        for expert in range(num_experts):
            shapes |= {f"block_sparse_moe.experts.{expert}.{name}": wide for name in ("w1", "w3")}
            shapes[f"block_sparse_moe.experts.{expert}.w2"] = narrow
    else:
        shapes |= {f"mlp.{name}": wide for name in ("gate_proj", "up_proj")}
        shapes["mlp.down_proj"] = narrow
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = norm(1.0)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = norm(1.0)
        for name, (rows, columns, gain) in shapes.items():
            tensors[f"{prefix}.{name}.weight"] = matrix(rows, columns, gain)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(path: Path) -> int:
    """Write the tokenizer and return how many tokens there are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_VOCAB, special_tokens=list(_SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[1],
        "add_bos_token": False,
        "chat_template": _TEMPLATE,
    }
    _write_json(path / "tokenizer_config.json", settings)
    size: int = tokenizer.get_vocab_size()
    return size


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
