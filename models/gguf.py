"""A model in one GGUF file, rewritten as a Hugging Face directory.

The weights keep the file's blocks of quantized numbers, byte for byte, or become bfloat16, a few thousand rows at a
time, so that a conversion needs little memory; tokenizer, chat template and configs come from the file's own fields
(`gguf_config.py`). Llama, Qwen2 and Qwen3 with byte-level BPE are read. Anything else is refused by name.
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
from .gguf_config import (
    GgufFields,
    gguf_generation_config,
    gguf_model_config,
    gguf_tokenizer_config,
    write_gguf_tokenizer,
)
from .quantization import GGUF_KINDS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from gguf import GGUFReader, ReaderTensor

_ROWS_AT_ONCE = 4096  # of a tensor, dequantized to float32: bounds the memory that a conversion takes
_ROPE_FACTORS = "rope_freqs.weight"

_TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}
_PLAIN_KINDS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # GGUF's names, safetensors' names


def convert_gguf(
    source: Path,
    target: Path,
    progress: Callable[[float], None],
    *,
    keeps_blocks: bool = False,
    sampling: Mapping[str, object] | None = None,
) -> None:
    """Write the model in the GGUF file `source` into the existing directory `target`.

    `keeps_blocks`: quantized matrices as they are. `sampling`: what generation_config.json recommends.
    Raises ConfigError.
    """
    from gguf import GGUFReader

    progress(0.0)
    try:
        reader = GGUFReader(source)
        fields = GgufFields(reader)
        config = gguf_model_config(fields, tied=not _has(reader, "output.weight"), rope_factors=_rope_factors(reader))
        tokenizer_config = gguf_tokenizer_config(fields, config["max_position_embeddings"])
        named = [tensor for tensor in reader.tensors if tensor.name != _ROPE_FACTORS]
        tensors = [_Tensor.from_reader(tensor, config, keeps_blocks=keeps_blocks) for tensor in named]
        write_gguf_tokenizer(target / "tokenizer.json", fields)
    except (KeyError, ValueError, IndexError, TypeError, OverflowError) as error:
        raise ConfigError(f"{source} is not a model that kvferry can read: {error}") from error
    kinds = {tensor.name.removesuffix(".weight"): tensor.kind for tensor in tensors if tensor.keeps_blocks}
    if kinds:
        config["quantization_config"] = {"quant_method": "gguf", "modules": kinds}
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", gguf_generation_config(fields, config) | dict(sampling or {}))
    _write_json(target / "tokenizer_config.json", tokenizer_config)
    _write_safetensors(target / "model.safetensors", tensors, progress)


def _has(reader: GGUFReader, name: str) -> bool:
    return any(tensor.name == name for tensor in reader.tensors)


def _rope_factors(reader: GGUFReader) -> list[float] | None:
    found = [tensor for tensor in reader.tensors if tensor.name == _ROPE_FACTORS]
    return [float(factor) for factor in found[0].data] if found else None


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- weights


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the GGUF file under its Hugging Face name."""

    name: str
    source: ReaderTensor
    num_heads: int  # > 0: rows of each head are permuted in the file
    is_widened: bool  # to bfloat16

    @classmethod
    def from_reader(cls, source: ReaderTensor, config: Mapping[str, object], *, keeps_blocks: bool) -> _Tensor:
        """Raises ValueError."""
        kind = source.tensor_type.name
        if keeps_blocks and kind not in GGUF_KINDS and kind not in _PLAIN_KINDS:
            raise ValueError(f"{source.name} is {kind}; these are read: {', '.join([*GGUF_KINDS, *_PLAIN_KINDS])}")
        if name := _TENSOR_NAMES.get(source.name):
            return cls(name, source, 0, not keeps_blocks)
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", source.name)
        has_biases = config["model_type"] == "qwen2"
        if match is None or match[2] not in _LAYER_TENSOR_NAMES or (match[3] == "bias" and not has_biases):
            raise ValueError(f"unknown tensor {source.name}")
        heads_key = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(match[2])
        num_heads = config[heads_key] if heads_key and config["model_type"] == "llama" else 0
        assert isinstance(num_heads, int)
        name = f"model.layers.{match[1]}.{_LAYER_TENSOR_NAMES[match[2]]}.{match[3]}"
        return cls(name, source, num_heads, not keeps_blocks)

    @property
    def kind(self) -> str:
        return str(self.source.tensor_type.name)

    @property
    def keeps_blocks(self) -> bool:
        return not self.is_widened and self.kind in GGUF_KINDS

    @property
    def dtype(self) -> str:
        """Return safetensors' name of its type: blocks are bytes."""
        return "U8" if self.keeps_blocks else "BF16" if self.is_widened else _PLAIN_KINDS[self.kind]

    @property
    def shape(self) -> list[int]:
        sizes = [int(size) for size in reversed(self.source.shape)]  # GGUF: fastest dimension first
        return [sizes[0], self.source.data.shape[1]] if self.keeps_blocks else sizes

    @property
    def num_bytes(self) -> int:
        return 2 * int(self.source.n_elements) if self.is_widened else int(self.source.n_bytes)

    def pieces(self) -> Iterator[npt.NDArray[np.uint8] | npt.NDArray[np.uint16]]:
        """Yield the tensor by rows. Quantisation is by row: rows can be moved before it is undone."""
        from gguf import quants

        rows = self.source.data
        if self.num_heads:
            rows = _undo_permutation(rows, self.num_heads)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            piece = rows[start : start + _ROWS_AT_ONCE]
            yield to_bfloat16(quants.dequantize(piece, self.source.tensor_type)) if self.is_widened else _bytes(piece)


def _bytes(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    import numpy as np

    return np.ascontiguousarray(values).view(np.uint8)


def _undo_permutation(rows: npt.NDArray[np.generic], num_heads: int) -> npt.NDArray[np.generic]:
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
    """Write the safetensors format piece by piece: header length, JSON header, tensors one after the other.

    Wide types stand first: a tensor begins at a multiple of its numbers' size.
    """
    tensors = sorted(tensors, key=lambda tensor: -_ITEM_BYTES[tensor.dtype])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # data starts on a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        data_start = file.tell()
        for tensor in tensors:
            for piece in tensor.pieces():
                file.write(piece.astype(piece.dtype.newbyteorder("<"), copy=False).data)
                progress((file.tell() - data_start) / end)
        file.flush()
        os.fsync(file.fileno())  # the rename must not outlive the bytes in a power cut
