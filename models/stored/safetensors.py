"""Files of safetensors before a byte of weights is read: which there are, and what stands in their headers.

A safetensors file begins with the length of a header, the header (JSON: name -> dtype, shape, range of bytes), and ends
with those bytes (https://github.com/huggingface/safetensors, "Format"). So a wrong shape and a file that was cut short
are found in milliseconds, by whoever starts a deployment, without torch.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from ...common.errors import ConfigError
from .json_files import read_json
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


class Entry(NamedTuple):
    """A tensor of a file, by the file's header."""

    dtype: str  # by the format's name
    shape: tuple[int, ...]
    begin: int  # its first byte in the file
    end: int  # behind its last one


class Header(NamedTuple):
    """A file's header."""

    end: int  # where it ends, and the tensors' bytes begin
    entries: dict[str, Entry]  # by name


_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]  # no file is as large, and places of larger ones overflow


class _Told(msgspec.Struct):
    """`_Told` is what a header says of a tensor, in the format's own words."""

    dtype: str
    shape: tuple[_Number, ...]
    data_offsets: tuple[_Number, _Number]  # its bytes, from the header's end on


_ALL_TOLD = msgspec.json.Decoder(dict[str, msgspec.Raw])  # what `__metadata__` has is of no form
_TOLD = msgspec.json.Decoder(_Told)


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
    if not isinstance(weight_map := read_json(index).get("weight_map"), dict):
        raise ConfigError(f"{index} is not an index of safetensors files: its weight_map is no JSON object")
    return sorted({str(name) for name in weight_map.values()})


def read_header(path: Path) -> Header:
    """Return what a safetensors file says of its tensors. Raises ConfigError for any other file."""
    try:
        with path.open("rb") as file:
            return parse_header(path, lambda start, size: os.pread(file.fileno(), size, start))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def parse_header(path: Path, read: Callable[[int, int], bytes]) -> Header:
    """Return what `read_header` does; `read(start, size)` returns the file's bytes. Raises ConfigError likewise."""
    try:
        prefix = read(0, 8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
        if size > _MAX_HEADER_BYTES:
            refuse_pointer(path, read(0, len(LFS_POINTER)))
            raise ConfigError(f"{path} cannot be read: it is not a safetensors file")
        if len(text := read(8, size)) < size:
            raise ConfigError(f"{path} has {8 + len(text)} bytes and a header of {size}: it was cut short, or damaged")
        told = _ALL_TOLD.decode(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: its header is malformed: {error}") from error
    told.pop("__metadata__", None)
    return Header(8 + size, {name: _entry(path, name, of_one, 8 + size) for name, of_one in told.items()})


def _entry(path: Path, name: str, told: msgspec.Raw, begin: int) -> Entry:
    """Return what a header has `told` of a tensor, the first of which has its bytes from `begin` on."""
    try:
        found = _TOLD.decode(told)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: what its header says of {name} is malformed: {error}") from error
    first, last = found.data_offsets
    if first > last:
        raise ConfigError(f"{path} cannot be read: by its header {name} begins at {first} and ends at {last}")
    return Entry(found.dtype, found.shape, begin + first, begin + last)


def stored_dtype(model_dir: Path) -> str | None:
    """Return the type that the embedding is stored in, by its name in config.json; None: it says nothing of others."""
    try:
        headers = [read_header(path).entries for path in safetensors_files(model_dir)]
    except ConfigError:  # whoever loads the weights says what is wrong with them
        return None
    found = {name: entry for header in headers for name, entry in header.items()}
    for last in ("embed_tokens.weight", "backbone.embeddings.weight", "lm_head.weight"):  # a tied head may stand alone
        if entries := [entry for name, entry in found.items() if name.endswith(last)]:
            return _DTYPES.get(entries[0].dtype)
    return None
