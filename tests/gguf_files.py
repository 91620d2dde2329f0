"""GGUF files of checkpoints that transformers wrote, as llama.cpp's converter makes them.

    write_as_gguf(checkpoint, tmp_path / "m.gguf", {"": "Q8_0"})

Names of tensors are those of the package `gguf` (its `get_tensor_name_map`); fields and what becomes of tensors follow
llama.cpp's `conversion/`, by hand: rows of queries and keys in turns, norms of Gemma plus one, experts in stacks, what
makes keys and values of latents apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from kvferry.models.token_bytes import _BYTE_ALPHABET

from .checkpoints import SPECIAL_TOKENS
from .gguf_fields import LATENT, architecture_of, num_layers, write_fields
from .gguf_latents import heads_apart, write_latents
from .gguf_states import FileTensor, file_tensors
from .quantized import Array, interleaved, random_blocks

if TYPE_CHECKING:
    import gguf

_EXPERT = re.compile(r"((?:model|backbone)\.layers\.\d+\.\w+)\.experts\.(\d+)\.(\w+)\.weight")
_GRANITE_STACK = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.input_linear\.weight")
_STACK = re.compile(r"model\.layers\.\d+\.(?:mlp|feed_forward)\.experts\.(gate_up|down)_proj(_bias)?")
_SCALES = {"scale": "router.proj", "per_expert_scale": "experts.down_proj"}  # of Gemma 4's experts
_PERMUTED = ("llama", "smollm3", "mistral3", "arcee", "granite", "granitemoe", "granitehybrid")
_MOVED_NORMS = ("gemma2", "gemma3", "qwen3next", "qwen35")


def write_as_gguf(
    checkpoint: Path,
    path: Path,
    kinds: Mapping[str, str] | None = None,
    *,
    fields: Callable[[gguf.GGUFWriter], None] | None = None,
    tensors_per_file: int = 0,
    is_old: bool = False,
) -> Path:
    """Write a GGUF file with blocks of `kinds`, by the ends of matrices' names ("": all others), F32 where none is
    named. The checkpoint is given the same weights and is returned. `fields`: the tokenizer's in place of plain ones.
    `tensors_per_file`: at most, in several files; 0: all are in one. `is_old`: of before May 2025, when what makes keys
    and values of latents was one matrix.
    """
    import gguf

    config, plain = _full_config(checkpoint), load_file(checkpoint / "model.safetensors")
    name = architecture_of(config)
    own = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    writer = gguf.GGUFWriter(path, name, split_max_tensors=tensors_per_file)
    write_fields(writer, config, name, plain)
    if name in LATENT:
        write_latents(writer, config, is_old=is_old)
    (fields or plain_tokens(config["vocab_size"]))(writer)
    tensors = _Tensors(writer, gguf.get_tensor_name_map(own, num_layers(config)), config, name, kinds or {})
    tensors.are_heads_apart = not is_old
    meant = tensors.write(plain)
    save_file(meant, checkpoint / "model.safetensors", metadata={"format": "pt"})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return checkpoint


def _full_config(checkpoint: Path) -> dict[str, Any]:
    """Return config.json with transformers' defaults, as the converter reads it."""
    from transformers import AutoConfig

    auto: Any = AutoConfig
    config: dict[str, Any] = auto.from_pretrained(checkpoint).to_dict()
    config["architectures"] = json.loads((checkpoint / "config.json").read_text())["architectures"]
    for own in config.get("per_layer_config", {}).values():  # Gemma 4's, in the words of its published files
        config |= {"global_head_dim": own["head_dim"], "num_global_key_value_heads": own.get("num_key_value_heads")}
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return config


def plain_tokens(vocab_size: int, *special: str) -> Callable[[gguf.GGUFWriter], None]:
    """Return what writes a tokenizer of bytes alone, with padding up to the size of the vocabulary.

    `special`: control tokens, from id 3 on.
    """

    def write(writer: gguf.GGUFWriter) -> None:
        control = [*SPECIAL_TOKENS[:-1], *special]
        tokens = [*control, "ab", *_BYTE_ALPHABET]
        padding = [f"[PAD{index}]" for index in range(len(tokens), vocab_size)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list([*tokens, *padding])
        writer.add_token_types([3] * len(control) + [1] * (len(tokens) - len(control)) + [5] * len(padding))
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)

    return write


# --- tensors ----------------------------------------------------------------------------------------------------------


class _Tensors:
    are_heads_apart = True

    def __init__(
        self, writer: gguf.GGUFWriter, names: gguf.TensorNameMap, config: dict[str, Any], name: str, kinds: Any
    ) -> None:
        self._writer, self._names, self._config, self._arch, self._kinds = writer, names, config, name, kinds
        self._rng = np.random.default_rng(1)
        self._stacks: dict[tuple[str, str], list[tuple[Array, str]]] = {}

    def write(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add all tensors to the file; return them with the values that their blocks mean."""
        meant: dict[str, torch.Tensor] = {}
        # The ends of names have no order that puts expert 2 before expert 10.
        for key in sorted(tensors, key=lambda key: [int(part) if part.isdigit() else part for part in key.split(".")]):
            if self._config.get("tie_word_embeddings") and key == "lm_head.weight":
                continue
            meant[key] = torch.from_numpy(np.ascontiguousarray(self._add(key, tensors[key].float().numpy())))
        for (module, part), matrices in self._stacks.items():
            rows = np.stack([rows for rows, _ in matrices])
            self._put(f"{module}.experts.{part}", ".weight", rows, matrices[0][1])
        return meant

    def _add(self, key: str, values: Array) -> Array:
        if self._arch in ("gpt-oss", "llama4") and _STACK.fullmatch(key):
            return self._add_stack(key, values)
        if match := _GRANITE_STACK.fullmatch(key):
            return self._add_granite_stack(match[1], values)
        if found := file_tensors(key, self._config, self._arch):
            return self._add_changed(key, values, found)
        if key.endswith("kv_b_proj.weight") and self.are_heads_apart:
            return self._add_apart(key.removesuffix("kv_b_proj.weight"), values)
        key = key.replace("e_score_correction_bias", "e_score_correction.bias")
        key = key.replace("expert_bias", "expert_bias.bias")
        module, _, suffix = key.rpartition(".")
        kind = self._kind(module) if values.ndim == 2 else "F32"
        rows, values = _of_kind(kind, self._rng, values)
        if match := _EXPERT.fullmatch(key):
            self._stacks.setdefault((match[1], match[3]), []).append((rows, kind))
            return values
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(module.rpartition(".")[2])
        if heads is not None and self._arch in _PERMUTED:
            rows = interleaved(rows, self._config[heads])
        if self._arch.startswith(_MOVED_NORMS) and key.endswith("norm.weight") and "linear_attn" not in key:
            rows = rows + np.float32(1)
        if suffix in ("sinks", "layer_scalar", "gate_up_proj", "down_proj"):  # what is no module's has its own name
            module, suffix = key, "weight"
        if (own := _SCALES.get(suffix)) is not None:
            module, suffix = f"{module.removesuffix('.router')}.{own}", "scale"
        self._put(module, f".{suffix}", rows, kind)
        return values

    def _add_changed(self, key: str, values: Array, found: list[FileTensor]) -> Array:
        meant = values.copy()
        for own in found:
            part = values if own.rows is None else values[own.rows]
            if own.change is not None:
                self._writer.add_tensor(own.name, np.ascontiguousarray(own.change(part), np.float32))
                continue
            kind = self._kind(key.removesuffix(".weight"))
            rows, plain = _of_kind(kind, self._rng, part if own.columns is None else part[:, own.columns])
            raw = None if kind in ("F32", "F16") else gguf_kind(kind)
            self._writer.add_tensor(own.name, np.ascontiguousarray(rows), raw_dtype=raw)
            if own.columns is not None:
                meant[:, own.columns] = plain
            else:
                meant[slice(None) if own.rows is None else own.rows] = plain
        return meant

    def _add_granite_stack(self, layer: str, values: Array) -> Array:
        """Add gates and ups of all experts: [experts, 2 inner, in]."""
        inner = values.shape[1] // 2
        for part, own in (("gate", values[:, :inner]), ("up", values[:, inner:])):
            index = layer.rpartition(".")[2]
            self._writer.add_tensor(f"blk.{index}.ffn_{part}_exps.weight", np.ascontiguousarray(own))
        return values

    def _add_stack(self, key: str, values: Array) -> Array:
        """Add gpt-oss's or Llama 4's experts: [experts, in, 2 inner], [experts, inner, out] or biases."""
        is_bias, is_down = key.endswith("_bias"), "down_proj" in key
        layer = key.rpartition(".")[0]
        if is_bias:
            parts = {"down_proj": values} if is_down else {"gate_proj": values[:, ::2], "up_proj": values[:, 1::2]}
            for part, own in parts.items():
                self._put(f"{layer}.{part}", ".bias", np.ascontiguousarray(own), "F32")
            return values
        count, size_in, size_out = values.shape
        kind = self._kind(key)
        rows, plain = _of_kind(kind, self._rng, values.transpose(0, 2, 1).reshape(-1, size_in))
        rows, plain = rows.reshape(count, size_out, -1), plain.reshape(count, size_out, size_in)
        half, is_apart = size_out // 2, self._arch == "llama4"
        gate, up = (rows[:, :half], rows[:, half:]) if is_apart else (rows[:, ::2], rows[:, 1::2])
        parts = {"down_proj": rows} if is_down else {"gate_proj": gate, "up_proj": up}
        for part, own in parts.items():
            self._put(f"{layer}.{part}", ".weight", np.ascontiguousarray(own), kind)
        return plain.transpose(0, 2, 1)

    def _add_apart(self, attention: str, values: Array) -> Array:
        """Add what makes keys of latents, turned over, and what makes values."""
        keys, values_of = heads_apart(values, self._config)
        meant = []
        for part, own in (("k_b_proj", keys.transpose(0, 2, 1)), ("v_b_proj", values_of)):
            kind = self._kind(f"{attention}{part}")
            rows, plain = _of_kind(kind, self._rng, np.ascontiguousarray(own).reshape(-1, own.shape[2]))
            self._put(f"{attention}{part}", ".weight", rows.reshape(*own.shape[:2], -1), kind)
            meant.append(plain.reshape(own.shape))
        return np.concatenate((meant[0].transpose(0, 2, 1), meant[1]), 1).reshape(values.shape)

    def _kind(self, module: str) -> str:
        known = self._kinds
        return next((known[end] for end in sorted(known, key=len, reverse=True) if module.endswith(end)), "F32")

    def _put(self, module: str, suffix: str, rows: Array, kind: str) -> None:
        name = self._names.get_name(module) or self._names.get_name(_as_converter_names(module))
        assert name is not None, module
        raw = None if kind in ("F32", "F16") else gguf_kind(kind)
        self._writer.add_tensor(name + suffix, np.ascontiguousarray(rows), raw_dtype=raw)


def _as_converter_names(module: str) -> str:
    """Return the name under which a converter looks up what its table has under no checkpoint's name."""
    return (
        module.replace("mixer.experts", "mlp.experts")
        .replace("backbone.", "model.")
        .replace("model.layers", "layers" if "feed_forward" in module else "model.layers")
    )


def gguf_kind(kind: str) -> gguf.GGMLQuantizationType:
    import gguf

    return gguf.GGMLQuantizationType[kind]


def _of_kind(kind: str, rng: np.random.Generator, values: Array) -> tuple[Array, Array]:
    """Return rows of blocks, and what they mean: of plain kinds the values themselves, else random ones."""
    import gguf

    if kind == "F32":
        return values, values
    if kind == "F16":
        halves = values.astype(np.float16)
        return halves, halves.astype(np.float32)
    if kind in ("BF16", "TQ2_0"):  # of the kinds that are not read the one that is easily made
        own = gguf.GGMLQuantizationType[kind]
        size, num_bytes = gguf.GGML_QUANT_SIZES[own]
        rows = rng.integers(0, 256, (len(values), values.shape[1] // size * num_bytes), dtype=np.uint8)
        if kind == "BF16":
            rows = gguf.quants.quantize(values, own)
        else:
            blocks = rows.reshape(-1, num_bytes)
            blocks[:, -2:] = np.full(len(blocks), 2**-10, np.float16).view(np.uint8).reshape(-1, 2)
        return rows, gguf.quants.dequantize(rows, own)
    return random_blocks(kind, rng, *values.shape)
