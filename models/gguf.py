"""A Llama model in one GGUF file, rewritten as a Hugging Face directory.

The weights become bfloat16, a few thousand rows at a time, so that a conversion needs little memory; tokenizer, chat
template and configs come from the file's own fields. Of the many GGUF files this reads the kind that the default
model is: Llama architecture, tied embeddings, byte-level BPE with SmolLM's pre-tokenizer. Anything else is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from gguf import GGUFReader, ReaderTensor

_ROWS_AT_ONCE = 4096  # of a tensor, dequantized to float32: bounds the memory that a conversion takes
# What SmolLM2's model card recommends; at temperature 1 so small a model rambles.
_SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
_SPECIAL_TOKEN_TYPE = 3  # GGUF: a control token

_TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(source: Path, target: Path, progress: Callable[[float], None]) -> None:
    """Write the Llama model in the GGUF file `source` into the existing directory `target`."""
    from gguf import GGUFReader

    progress(0.0)
    try:
        reader = GGUFReader(source)
        fields = _Fields(reader)
        config = _model_config(fields)
        tokenizer_config = _tokenizer_config(fields)
        tensors = [_Tensor.from_reader(tensor, config) for tensor in reader.tensors]
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(f"{source} is not a Llama model that kvferry can read: {error}") from error
    _write_json(target / "config.json", config)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(target / "generation_config.json", special | _SAMPLING)
    _write_json(target / "tokenizer_config.json", tokenizer_config)
    _write_tokenizer(target / "tokenizer.json", fields)
    _write_safetensors(target / "model.safetensors", tensors, progress)


# ---- configs and tokenizer


class _Fields:
    """Typed reads of the GGUF file's key-value fields."""

    def __init__(self, reader: GGUFReader) -> None:
        self._reader = reader

    def _get(self, key: str) -> object:
        field = self._reader.get_field(key)
        if field is None:
            raise KeyError(f"no field {key}")
        value: object = field.contents()
        return value

    def integer(self, key: str) -> int:
        value = self._get(key)
        if not isinstance(value, int):
            raise ValueError(f"field {key} is {value!r}, not an integer")
        return value

    def number(self, key: str) -> float:
        """Read a float32 field as the decimal that was meant: 9.99999e-06 is 1e-05."""
        value = self._get(key)
        if not isinstance(value, float):
            raise ValueError(f"field {key} is {value!r}, not a number")
        return float(f"{value:.6g}")

    def text(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str):
            raise ValueError(f"field {key} is {value!r}, not a string")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._get(key)
        assert isinstance(value, list), key
        return [str(item) for item in value]

    def integers(self, key: str) -> list[int]:
        value = self._get(key)
        assert isinstance(value, list), key
        return [int(item) for item in value]


def _model_config(fields: _Fields) -> dict[str, object]:
    if (architecture := fields.text("general.architecture")) != "llama":
        raise ValueError(f"its architecture is {architecture}")
    hidden_size, num_heads = fields.integer("llama.embedding_length"), fields.integer("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("llama.feed_forward_length"),
        "num_hidden_layers": fields.integer("llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.integer("llama.attention.head_count_kv"),
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": fields.integer("llama.context_length"),
        "rms_norm_eps": fields.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("llama.rope.freq_base"),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "vocab_size": fields.integer("llama.vocab_size"),
        "bos_token_id": fields.integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.integer("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.integer("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def _tokenizer_config(fields: _Fields) -> dict[str, object]:
    tokens = fields.texts("tokenizer.ggml.tokens")
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config: dict[str, object] = {
        f"{name}_token": tokens[fields.integer(f"tokenizer.ggml.{key}_token_id")] for name, key in special.items()
    }
    return config | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields.integer("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": fields.text("tokenizer.chat_template"),
    }


def _write_tokenizer(path: Path, fields: _Fields) -> None:
    """Write byte-level BPE; digits stand alone, and no space is put before the text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (rules := fields.text("tokenizer.ggml.pre")) != "smollm":
        raise ConfigError(f"the GGUF file's pre-tokenizer is {rules}; kvferry converts smollm only")
    tokens = fields.texts("tokenizer.ggml.tokens")
    merges = [(left, right) for left, right in (pair.split(" ") for pair in fields.texts("tokenizer.ggml.merges"))]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.integers("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _SPECIAL_TOKEN_TYPE]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(path))


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- weights


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the GGUF file under its Hugging Face name."""

    name: str
    source: ReaderTensor
    num_heads: int  # > 0: rows of each head are permuted in the file

    @classmethod
    def from_reader(cls, source: ReaderTensor, config: Mapping[str, object]) -> _Tensor:
        if name := _TENSOR_NAMES.get(source.name):
            return cls(name, source, 0)
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", source.name)
        if match is None or match[2] not in _LAYER_TENSOR_NAMES:
            raise ValueError(f"unknown tensor {source.name}")
        heads_key = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(match[2])
        num_heads = config[heads_key] if heads_key else 0
        assert isinstance(num_heads, int)
        return cls(f"model.layers.{match[1]}.{_LAYER_TENSOR_NAMES[match[2]]}.weight", source, num_heads)

    @property
    def shape(self) -> list[int]:
        return [int(size) for size in reversed(self.source.shape)]  # GGUF: fastest dimension first

    @property
    def num_bytes(self) -> int:
        return 2 * int(self.source.n_elements)

    def pieces(self) -> Iterator[npt.NDArray[np.uint16]]:
        """Yield the tensor's bfloat16 bits by rows. Quantisation is by row: rows can be moved before it is undone."""
        from gguf import quants

        rows = self.source.data
        if self.num_heads:
            rows = _undo_permutation(rows, self.num_heads)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            yield to_bfloat16(quants.dequantize(rows[start : start + _ROWS_AT_ONCE], self.source.tensor_type))


def _undo_permutation(rows: npt.NDArray[np.uint8], num_heads: int) -> npt.NDArray[np.uint8]:
    """llama.cpp interleaves the two rotary halves of each head's rows; Hugging Face keeps one half after the other."""
    num_rows, row_bytes = rows.shape
    interleaved = rows.reshape(num_heads, num_rows // num_heads // 2, 2, row_bytes)
    return interleaved.swapaxes(1, 2).reshape(num_rows, row_bytes)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16, ties to even, of finite values."""
    import numpy as np

    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    bits = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
    return (bits >> 16).astype(np.uint16)


def _write_safetensors(path: Path, tensors: list[_Tensor], progress: Callable[[float], None]) -> None:
    """Write the safetensors format piece by piece: header length, JSON header, tensors one after the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # data starts on a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        data_start = file.tell()
        for tensor in tensors:
            for piece in tensor.pieces():
                file.write(piece.astype("<u2", copy=False).data)
                progress((file.tell() - data_start) / end)
        file.flush()
        os.fsync(file.fileno())  # the rename must not outlive the bytes in a power cut
