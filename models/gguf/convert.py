"""A model in GGUF files, rewritten as a Hugging Face directory.

The weights keep the file's blocks of quantized numbers, byte for byte, or become bfloat16, a few thousand rows at a
time, so that a conversion needs little memory; tokenizer, chat template and configs come from the file's own fields.
Which architectures are read, and how their files differ, is one table (`architectures.py`). Anything else is refused
by name.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.errors import ConfigError
from .architectures.architecture import Architecture
from .architectures.names import FINAL_NORMS, TENSORS
from .config import (
    gguf_architecture,
    gguf_generation_config,
    gguf_model_config,
    gguf_pooling,
    gguf_tokenizer_config,
)
from .experts import MXFP4_STACK, expert_tensors
from .files import read_gguf
from .latent import HALVES, latent_tensors
from .model_file import Json
from .rope import FACTORS, rope_factors
from .states import grouped_rows, state_tensor
from .tensors import ITEM_BYTES, Part, StoredTensor, chained, less, shape_of, stored, undo_permutation
from .tokenizer import write_gguf_tokenizer

if TYPE_CHECKING:
    from gguf import ReaderTensor

_LAYER = re.compile(r"blk\.(\d+)\.((?:shortconv\.|nextn\.)?\w+)(?:\.(weight|bias|scale))?")
_EXPERTS = re.compile(r"ffn_(gate_up|gate|up|down)_exps")
_VECTORS = ("attn_sinks", "exp_probs_b", "layer_output_scale")  # of which a checkpoint's name is no module's
_ROWS = ("ffn_gate_inp_shexp",)  # matrices of one row, which files may have as vectors
_HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def convert_gguf(
    source: Path,
    target: Path,
    progress: Callable[[float], None],
    *,
    kept: Collection[str] = (),
    sampling: Mapping[str, object] | None = None,
) -> None:
    """Write the model in the GGUF file `source`, or in those that it is one of, into the existing directory `target`.

    `kept`: kinds of blocks that stay as they are; none: all numbers become bfloat16. `sampling`: what
    generation_config.json recommends. Raises ConfigError.
    """
    progress(0.0)
    try:
        _convert(source, target, progress, kept, sampling or {})
    except (KeyError, ValueError, IndexError, TypeError, OverflowError, ZeroDivisionError) as error:
        told = error.args[0] if isinstance(error, KeyError) and error.args else error  # as text it has quotes
        raise ConfigError(f"{source} is not a model that kvferry can read: {told}") from error


def _convert(
    source: Path,
    target: Path,
    progress: Callable[[float], None],
    kept: Collection[str],
    sampling: Mapping[str, object],
) -> None:
    fields, sources = read_gguf(source)
    architecture = gguf_architecture(fields)
    shapes = {tensor.name: shape_of(tensor) for tensor in sources}
    config = gguf_model_config(fields, architecture, shapes, rope_factors(sources))
    tokenizer_config = gguf_tokenizer_config(fields, config["max_position_embeddings"])
    pooling = gguf_pooling(fields)
    tensors = list(_stored_tensors(sources, architecture, config, kept))
    _check_names(tensors)
    write_gguf_tokenizer(target / "tokenizer.json", fields)
    if kept and (quantization := _quantization(tensors)):
        config["quantization_config"] = quantization
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", gguf_generation_config(fields, config) | dict(sampling))
    _write_json(target / "tokenizer_config.json", tokenizer_config)
    if pooling is not None:
        (target / "1_Pooling").mkdir()
        _write_json(target / "1_Pooling" / "config.json", {"pooling_mode": pooling})
    _write_safetensors(target / "model.safetensors", tensors, progress)


def _check_names(tensors: list[StoredTensor]) -> None:
    """Refuse two tensors of one name: a file of safetensors would have room for both, and tell of the last alone."""
    for name, count in Counter(tensor.name for tensor in tensors).items():
        if count > 1:
            raise ValueError(f"{count} of its tensors are the checkpoint's {name}")


def _quantization(tensors: list[StoredTensor]) -> Json:
    """Return config.json's `quantization_config`: the kind of each module's blocks, and what has none any more."""
    own = (tensor for tensor in tensors if tensor.kind not in ("", MXFP4_STACK))
    kinds = {tensor.name.removesuffix(".weight"): tensor.kind for tensor in own}
    widened = sorted({tensor.widened_from for tensor in tensors} - {""})
    has_mxfp4 = any(tensor.kind == MXFP4_STACK for tensor in tensors)
    if not kinds and not widened and not has_mxfp4:
        return {}
    return {"quant_method": "gguf", "modules": kinds, "has_mxfp4_experts": has_mxfp4, "widened_experts": widened}


def _stored_tensors(
    sources: list[ReaderTensor], of: Architecture, config: Json, kept: Collection[str]
) -> Iterator[StoredTensor]:
    """Yield the tensors of the checkpoint.

    Raises ValueError, naming a tensor that is none of the architecture, or of a kind that is not read.
    """
    stacks: dict[str, dict[str, Part]] = {}  # by layer: the tensors of its experts
    halves: dict[str, dict[str, Part]] = {}  # by layer: those that make keys and values of latents
    fused: dict[str, dict[str, Part]] = {}  # by the checkpoint's name of one tensor: the file's of it
    for source in sources:
        part = Part.whole(source)
        match = _LAYER.fullmatch(part.name)
        if match is None:
            if part.name not in FACTORS:
                yield _tensor(part, _outer_name(part.name, of), of, kept)
            continue
        layer, own = match[1], match[2]
        if int(layer) >= config["num_hidden_layers"]:
            continue  # it predicts further tokens
        is_vector = f"{own}.{match[3]}" in of.layer
        stack = _EXPERTS.fullmatch(own) if of.family.experts is not None and not is_vector else None
        if stack is not None:
            stacks.setdefault(layer, {})[f"{stack[1]}.{match[3]}"] = part
        elif of.family.is_latent and own in HALVES:
            halves.setdefault(layer, {})[own] = part
        elif own in of.fused:
            fused.setdefault(f"model.layers.{layer}.{of.fused[own]}.{match[3]}", {})[own] = part
        else:
            yield _layer_tensor(part, match, of, config, kept)
    if of.family.experts is not None:
        yield from expert_tensors(stacks, of.family.experts, kept)
    yield from latent_tensors(halves, kept)
    for name, parts in fused.items():
        in_order = [parts[own] for own in of.fused if own in parts]
        yield chained(
            grouped_rows(in_order, config) if of.family.states == "grouped delta nets" else in_order, name, kept
        )


def _layer_tensor(
    part: Part, match: re.Match[str], of: Architecture, config: Json, kept: Collection[str]
) -> StoredTensor:
    own = match[2]
    if (vector := of.layer.get(f"{own}.{match[3]}")) is not None:
        return _tensor(part, f"model.layers.{match[1]}.{vector}", of, kept)
    if own not in of.layer or match[3] == "scale":
        raise ValueError(f"unknown tensor {part.name}")
    suffix = "" if own in _VECTORS or match[3] is None else f".{match[3]}"
    name = f"model.layers.{match[1]}.{of.layer[own]}{suffix}"
    if of.permutes and own in _HEADS:
        part = undo_permutation(part, config[_HEADS[own]])
    if own in _ROWS and len(part.shape) == 1:
        part = part.as_row()
    if of.family.states is not None and (found := state_tensor(part, own, name, of, config, kept)) is not None:
        return found
    return _tensor(part, name, of, kept)


def _tensor(part: Part, name: str, of: Architecture, kept: Collection[str]) -> StoredTensor:
    if of.family.norm_offset and name.endswith("norm.weight"):
        return less(part, name, of.family.norm_offset)
    return stored(part, name, kept)


def _outer_name(name: str, of: Architecture) -> str:
    if name in FINAL_NORMS:
        return f"model.{of.family.final_norm}.weight"
    if (found := TENSORS.get(name)) is None:
        raise ValueError(f"unknown tensor {name}")
    return found


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_safetensors(path: Path, tensors: list[StoredTensor], progress: Callable[[float], None]) -> None:
    """Write the safetensors format piece by piece: header length, JSON header, tensors one after the other.

    Wide types stand first: a tensor begins at a multiple of its numbers' size.
    """
    tensors = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
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
