"""Small random checkpoints, as Hugging Face directories: of the four first families written without transformers.

    write_checkpoint(tmp_path / "model")                          a Llama of 2 layers, 512 tokens, with a tokenizer
    write_checkpoint(tmp_path / "model", "qwen3", num_layers=3)   another family or shape; see `Shape`
    write_checkpoint(tmp_path / "model", "gemma3_text")           any other family: by its own classes of transformers

Weights have the scale that keeps activations near 1, queries are three times larger and the final norm gains 4, so
that attention is peaked and the best token leads by far more than rounding. The tokenizer is a byte-level BPE over
a fixed text: any text round-trips.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Family = Literal[
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3", "granite", "olmo2", "olmo3", "phi3",
    "smollm3", "seed_oss", "mistral3", "ministral3", "glm", "glm4", "ernie4_5", "exaone4", "cwm",
    "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "granitemoehybrid", "hunyuan_v1_dense", "cohere2", "arcee",
]  # fmt: skip

BOS, EOS, IM_START, IM_END = "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (BOS, EOS, IM_START, IM_END)  # ids 0, 1, 2, 3
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
YARN_OF_ARCEE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0}
# What makes a family of transformers' own classes itself; sizes are those of `Shape`.
OWN_CLASSES: dict[str, dict[str, object]] = {
    "gemma2": {"query_pre_attn_scalar": 40, "attn_logit_softcapping": 20.0, "sliding_window": 20},
    "gemma3_text": {
        "query_pre_attn_scalar": 40,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "num_hidden_layers": 3,
    },
    "granite": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.0,
    },
    "granitemoehybrid": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.0,
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
        "layer_types": ["attention", "attention"],
        "position_embedding_type": "rope",
    },
    "arcee": {"mlp_bias": True, "rope_parameters": YARN_OF_ARCEE},
    "hunyuan_v1_dense": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10_000.0},
    },
    "cohere2": {"sliding_window": 20, "num_hidden_layers": 4, "logit_scale": 1.0},
    "olmo2": {},
    "olmo3": {
        "num_hidden_layers": 4,
        "sliding_window": 20,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 500_000.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 500_000.0},
        },
    },
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 2047},
    "smollm3": {"no_rope_layer_interval": 2},
    "seed_oss": {"head_dim": 16, "attention_bias": True, "attention_out_bias": False},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 32,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
    "qwen3_vl_text": {
        "head_dim": 16,
        "rope_parameters": {"rope_theta": 1e6, "mrope_section": [3, 3, 2], "mrope_interleaved": True},
    },
    "qwen3_vl_moe_text": {
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "rope_parameters": {"rope_theta": 1e6, "mrope_section": [3, 3, 2], "mrope_interleaved": True},
    },
    "glm": {"head_dim": 32},
    "glm4": {"head_dim": 32},
    "ernie4_5": {"head_dim": 16, "use_bias": True},
    "exaone4": {"head_dim": 16, "sliding_window": 20, "num_hidden_layers": 4},
    "cwm": {
        "head_dim": 16,
        "sliding_window": 20,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 4,
    },
}
_CORPUS = (
    "The router places each request; a prefill worker computes the prompt and a decode worker streams the answer. "
    "Blocks of the cache cross from one to the other while the next layer is being computed. "
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 0123456789\n"
)


@dataclass(slots=True, frozen=True, kw_only=True)
class Shape:
    num_layers: int = 2
    hidden_size: int = 64
    num_qo_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 128
    vocab_size: int = 512
    max_model_len: int = 2048
    tie_embeddings: bool = False
    sliding_window: int | None = None
    biases: bool = False  # of a Llama: attention and MLP
    dtype: str = "float32"
    seed: int = 0


def write_checkpoint(
    path: Path,
    family: Family = "llama",
    *,
    tokenizer: bool = True,
    num_files: int = 1,
    config: dict[str, object] | None = None,
    eos_token_ids: list[int] | None = None,
    shape: Shape | None = None,
    **fields: int | str | bool | None,
) -> Path:
    """Write a checkpoint into `path` (made if missing) and return it.

    `fields` replace those of `Shape`; `config` adds to or overrides config.json (rope_scaling, ...);
    `eos_token_ids` goes to generation_config.json (default: that of the tokenizer's end marks).
    """
    shape = replace(shape or Shape(), **fields)  # type: ignore[arg-type]  # checked by the dataclass's users
    path.mkdir(parents=True, exist_ok=True)
    if family in _ARCHITECTURES:
        _write_json(path / "config.json", _config(family, shape) | (config or {}))
        _write_tensors(path, random_tensors(family, shape), num_files)
    else:
        _write_by_own_classes(path, family, shape, config or {})
    eos = eos_token_ids if eos_token_ids is not None else [1, 3]
    _write_json(path / "generation_config.json", {"bos_token_id": 0, "eos_token_id": eos})
    if tokenizer:
        write_tokenizer(path, shape.vocab_size)
    return path


def _write_by_own_classes(path: Path, family: str, shape: Shape, config: dict[str, object]) -> None:
    """Let transformers write config.json and weights: its names, its defaults left out."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if family in _NESTED:
        text = _own_fields(_NESTED[family], shape) | {"model_type": _NESTED[family]} | config
        own: dict[str, object] = {"text_config": text, "vision_config": _TINY_VISION[family]}
        own["tie_word_embeddings"] = shape.tie_embeddings
        own |= {"mm_tokens_per_image": 4, "image_token_index": 510, "boi_token_index": 508, "eoi_token_index": 509}
    else:
        own = _own_fields(family, shape) | config
    auto = AutoModelForImageTextToText if family in _NESTED else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(family, **own))
    generator = torch.Generator().manual_seed(shape.seed)
    dtype = getattr(torch, shape.dtype)
    model.to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random_parameter(name, parameter, generator, "gemma" in family))
    model.save_pretrained(path)


# The language model beside a part that sees.
_NESTED = {
    "gemma3": "gemma3_text",
    "mistral3": "ministral3",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
}
_SEEING: dict[str, object] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_SEEING: dict[str, object] = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1}
_QWEN_SEEING |= {"patch_size": 14, "out_hidden_size": 64}
_TINY_VISION = {
    "gemma3": _SEEING,
    "mistral3": _SEEING | {"model_type": "pixtral", "head_dim": 16},
    "qwen2_5_vl": _QWEN_SEEING | {"fullatt_block_indexes": [0]},
    "qwen3_vl": _QWEN_SEEING | {"deepstack_visual_indexes": [0], "num_position_embeddings": 4},
    "qwen3_vl_moe": _QWEN_SEEING | {"deepstack_visual_indexes": [0], "num_position_embeddings": 4},
}


def _own_fields(family: str, shape: Shape) -> dict[str, object]:
    fields: dict[str, object] = {
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_qo_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_model_len,
        "tie_word_embeddings": shape.tie_embeddings,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if "gemma" in family:
        fields["head_dim"] = shape.head_dim
    return fields | OWN_CLASSES[family]


def _random_parameter(name: str, parameter: Tensor, generator: torch.Generator, is_gemma: bool) -> Tensor:
    """Draw as `random_tensors` does. Gemma's norms are one less than the factors that they mean."""
    values = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() >= 2:
        values /= math.sqrt(parameter.shape[1])
        return values * 3.0 if "q_proj" in name or "qkv_proj" in name else values
    if name.endswith("norm.weight"):
        mean = 4.0 if name.endswith("model.norm.weight") else 2.0 if "q_norm" in name or "query_l" in name else 1.0
        return mean - int(is_gemma) + 0.1 * values
    return values * (1.0 if name.endswith("sinks") else 0.1)


def put_nan(path: Path, tensor: str, row: int) -> Path:
    """Spoil one number of a checkpoint in one file, and return it."""
    tensors = load_file(path / "model.safetensors")
    tensors[tensor][row, 5] = math.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_embedding_model(path: Path, *, architecture: str = "Qwen3ForCausalLM") -> Path:
    """Write a Qwen3 without a head, whose tensors' names lack a prefix, and return it."""
    write_checkpoint(path, "qwen3", config={"architectures": [architecture]})
    tensors = load_file(path / "model.safetensors")
    del tensors["lm_head.weight"]
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, path / "model.safetensors", metadata={"format": "pt"})
    return path


def random_tensors(family: Family, shape: Shape) -> dict[str, Tensor]:
    """The checkpoint's tensors by name."""
    generator = torch.Generator().manual_seed(shape.seed)
    dtype = getattr(torch, shape.dtype)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * (scale / math.sqrt(columns))).to(dtype)

    def vector(size: int, mean: float, spread: float) -> Tensor:
        return (mean + spread * torch.randn(size, generator=generator)).to(dtype)

    size, num_q, num_kv = shape.hidden_size, shape.num_qo_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    tensors = {"model.embed_tokens.weight": matrix(shape.vocab_size, size), "model.norm.weight": vector(size, 4.0, 0.1)}
    if not shape.tie_embeddings:
        tensors["lm_head.weight"] = matrix(shape.vocab_size, size)
    for layer in range(shape.num_layers):
        name = f"model.layers.{layer}"
        tensors[f"{name}.input_layernorm.weight"] = vector(size, 1.0, 0.1)
        tensors[f"{name}.post_attention_layernorm.weight"] = vector(size, 1.0, 0.1)
        tensors[f"{name}.self_attn.q_proj.weight"] = matrix(num_q, size, 3.0)
        tensors[f"{name}.self_attn.k_proj.weight"] = matrix(num_kv, size)
        tensors[f"{name}.self_attn.v_proj.weight"] = matrix(num_kv, size)
        tensors[f"{name}.self_attn.o_proj.weight"] = matrix(size, num_q)
        tensors[f"{name}.mlp.gate_proj.weight"] = matrix(shape.intermediate_size, size)
        tensors[f"{name}.mlp.up_proj.weight"] = matrix(shape.intermediate_size, size)
        tensors[f"{name}.mlp.down_proj.weight"] = matrix(size, shape.intermediate_size)
        if family == "qwen2" or shape.biases:
            for part, count in (("q", num_q), ("k", num_kv), ("v", num_kv)):
                tensors[f"{name}.self_attn.{part}_proj.bias"] = vector(count, 0.0, 0.1)
        if shape.biases:
            tensors[f"{name}.self_attn.o_proj.bias"] = vector(size, 0.0, 0.1)
            tensors[f"{name}.mlp.gate_proj.bias"] = vector(shape.intermediate_size, 0.0, 0.1)
            tensors[f"{name}.mlp.up_proj.bias"] = vector(shape.intermediate_size, 0.0, 0.1)
            tensors[f"{name}.mlp.down_proj.bias"] = vector(size, 0.0, 0.1)
        if family == "qwen3":
            tensors[f"{name}.self_attn.q_norm.weight"] = vector(shape.head_dim, 2.0, 0.1)
            tensors[f"{name}.self_attn.k_norm.weight"] = vector(shape.head_dim, 1.0, 0.1)
    return tensors


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """tokenizer.json (byte-level BPE, at most `vocab_size` tokens) and tokenizer_config.json with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "add_bos_token": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _config(family: Family, shape: Shape) -> dict[str, object]:
    config: dict[str, object] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_qo_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_model_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tie_embeddings,
        "torch_dtype": shape.dtype,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if shape.biases:
        config |= {"attention_bias": True, "mlp_bias": True}
    if family != "llama":
        config["sliding_window"] = shape.sliding_window
    if family in ("qwen2", "qwen3") and shape.sliding_window is not None:
        config |= {"use_sliding_window": True, "max_window_layers": 1}
    return config


def _write_tensors(path: Path, tensors: dict[str, Tensor], num_files: int) -> None:
    if num_files == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(num_files):
        file = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        part = {name: tensors[name] for name in names[number::num_files]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    _write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
