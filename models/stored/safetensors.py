"""Files of safetensors before a byte of weights is read: which there are, and what stands in their headers.

A safetensors file begins with the length of a header, the header (JSON: name -> dtype, shape, range of bytes), and ends
with those bytes (https://github.com/huggingface/safetensors, "Format"). So a wrong shape and a file that was cut short
are found in milliseconds, by whoever starts a deployment, without torch.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

from ...common.errors import ConfigError
from .pointer import LFS_POINTER, refuse_pointer

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
# What a folder has in place of weights that are read, in the order in which one is told of.
_OTHER_WEIGHTS = {
    "model-*.safetensors": "copy the index, which names all files of the checkpoint, from where they come from",
    "consolidated*.safetensors": "that is Mistral's own form: take the model's files for transformers",
    "adapter_model.safetensors": "that is an adapter: serve the model that it was made for, and it by --lora-modules",
    "*.safetensors": "if that is the whole checkpoint, call it model.safetensors",
    "*.gguf": "to serve that file, name it in place of the folder",
    "pytorch_model*.bin": "convert it by the transformers library: TRANSFORMERS",
    "*.pt*": "convert it to what the transformers library saves",
}
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def safetensors_files(model_dir: Path) -> list[Path]:
    """List the files of a checkpoint. Raises ConfigError if there are none.

    One file for all goes before an index that does not name it, as in `transformers`: whoever saves a model in one file
    leaves the index of an earlier one in several where it is, and their files on the hub.
    """
    index, single = model_dir / "model.safetensors.index.json", model_dir / "model.safetensors"
    names = _indexed_names(index) if index.is_file() else []
    if single.is_file() and single.name not in names:
        return [single]
    for name in names:
        if Path(name).name != name or not (model_dir / name).is_file():
            raise ConfigError(f"{index} names {name!r}, which is no file beside it")
    if names:
        return [model_dir / name for name in names]
    raise ConfigError(
        f"{model_dir} has neither model.safetensors nor model.safetensors.index.json: {_way_out(model_dir)}, "
        "or use --load-format dummy for random weights"
    )


def _way_out(model_dir: Path) -> str:
    """Tell what to do about the weights that a folder has in place of those that are read."""
    by_transformers = f"AutoModelForCausalLM.from_pretrained({str(model_dir)!r}).save_pretrained({str(model_dir)!r})"
    for pattern, what_to_do in _OTHER_WEIGHTS.items():
        if names := sorted(path.name for path in model_dir.glob(pattern)):
            return f"it has {names[0]}; {what_to_do}".replace("TRANSFORMERS", by_transformers)
    return "convert the checkpoint to safetensors"


def _indexed_names(index: Path) -> list[str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is not an index of safetensors files: {error!r}") from error


def read_header(path: Path) -> tuple[int, dict[str, dict[str, object]]]:
    """Return where the tensors' bytes begin, and each tensor's entry. Raises ConfigError for any other file."""
    try:
        with path.open("rb") as file:
            return parse_header(path, lambda start, size: os.pread(file.fileno(), size, start))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def parse_header(path: Path, read: Callable[[int, int], bytes]) -> tuple[int, dict[str, dict[str, object]]]:
    """Return what `read_header` does; `read(start, size)` returns the file's bytes. Raises ConfigError likewise."""
    try:
        prefix = read(0, 8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
        if size > _MAX_HEADER_BYTES:
            refuse_pointer(path, read(0, len(LFS_POINTER)))
            raise ConfigError(f"{path} cannot be read: it is not a safetensors file")
        if len(text := read(8, size)) < size:
            raise ConfigError(f"{path} has {8 + len(text)} bytes and a header of {size}: it was cut short, or damaged")
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ConfigError(f"{path} cannot be read: it is not a safetensors file")
    header.pop("__metadata__", None)
    return 8 + size, header


def stored_dtype(model_dir: Path) -> str | None:
    """Return the type that the embedding is stored in, by its name in config.json; None: it says nothing of others."""
    try:
        headers = [read_header(path)[1] for path in safetensors_files(model_dir)]
    except ConfigError:  # whoever loads the weights says what is wrong with them
        return None
    found = {name: entry for header in headers for name, entry in header.items()}
    for last in ("embed_tokens.weight", "backbone.embeddings.weight", "lm_head.weight"):  # a tied head may stand alone
        if entries := [entry for name, entry in found.items() if name.endswith(last)]:
            return _DTYPES.get(str(entries[0].get("dtype")))
    return None
