"""Safetensors straight into this rank's parameters.

Each tensor is read by slice from the mapped file into the parameter that holds it, so memory never has a second
copy of the model. Every tensor that the model has must be there in its shape, and none may be left over. Under
load format `dummy` weights are random numbers from (seed, tensor name): the same on every rank and worker.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...common.errors import ConfigError
from ...models.checkpoint import KV_SCALE, check_names, check_shape, full_name, safetensors_files
from .decoder import Decoder
from .weight import WeightSlot

Progress = Callable[[str, float], None]  # what is being done, fraction in [0, 1]


class _TensorSlice(Protocol):
    """A tensor in a file: read by slice."""

    def get_shape(self) -> list[int]: ...
    def __getitem__(self, index: tuple[slice, ...]) -> Tensor: ...


class _TensorFile(Protocol):
    """An open safetensors file."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _TensorSlice: ...
    def get_tensor(self, name: str) -> Tensor: ...


def load_weights(
    decoder: Decoder, model_dir: Path, *, load_format: str, seed: int, progress: Progress | None = None
) -> None:
    """Fill every parameter of this rank. Raises ConfigError naming tensors that are missing, extra or misshapen."""
    slots = list(decoder.slots())
    total = sum(slot.target.numel() for slot in slots)
    files = {} if load_format == "dummy" else _open_files(model_dir)
    if load_format != "dummy":
        wanted = {slot.name for slot in slots}
        check_names(wanted, set(files), model_dir, tied=decoder.config.tie_embeddings)
    done = 0
    for slot in slots:
        if load_format == "dummy":
            _fill_random(slot, seed)
        else:
            _fill_from_file(slot, *files[slot.name])
        done += slot.target.numel()
        if progress is not None:
            progress("loading weights", done / total)


def _open_files(model_dir: Path) -> dict[str, tuple[_TensorFile, str]]:
    """Return tensor name -> the open (mapped, not read) file that holds it, and the name that it has there."""
    from safetensors import SafetensorError, safe_open

    by_name: dict[str, tuple[_TensorFile, str]] = {}
    for path in safetensors_files(model_dir):
        try:
            file: _TensorFile = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        by_name |= {full_name(name): (file, name) for name in file.keys()}  # noqa: SIM118  # a file is no mapping
    return by_name


def _fill_from_file(slot: WeightSlot, file: _TensorFile, name: str) -> None:
    source = file.get_slice(name)
    check_shape(slot.name, tuple(source.get_shape()), slot.shape)
    length = slot.target.shape[slot.dim]
    index = tuple(
        slice(slot.start, slot.start + length) if dim == slot.dim else slice(0, size)
        for dim, size in enumerate(slot.shape)
    )
    slot.target.copy_(source[index])


def read_kv_scales(model_dir: Path, num_layers: int) -> list[tuple[float, float]]:
    """Return each layer's k_scale and v_scale of a cache in 8 bits; 1 where there is none. Raises ConfigError."""
    scales = [[1.0, 1.0] for _ in range(num_layers)]
    for name, (file, own_name) in _open_files(model_dir).items():
        match = KV_SCALE.fullmatch(name)
        if match is None:
            continue
        value = file.get_tensor(own_name)
        if int(match[1]) >= num_layers or value.numel() != 1 or not float(value) > 0:
            raise ConfigError(f"{model_dir}: {name} is no positive number for one of {num_layers} layers")
        scales[int(match[1])]["kv".index(match[2])] = float(value)
    return [(k_scale, v_scale) for k_scale, v_scale in scales]


def _fill_random(slot: WeightSlot, seed: int) -> None:
    """Draw variance 1 / fan_in for matrices, small biases, norms of 1; of the whole tensor, then this rank's part."""
    if slot.name.endswith("norm.weight"):
        slot.target.fill_(1.0)
        return
    key = hashlib.blake2b(f"{seed}:{slot.name}".encode(), digest_size=8).digest()
    generator = torch.Generator(slot.target.device).manual_seed(int.from_bytes(key, "little") >> 1)
    std = 1 / math.sqrt(slot.shape[-1]) if len(slot.shape) == 2 else 0.02
    whole = torch.empty(slot.shape, dtype=torch.float32, device=slot.target.device).normal_(0, std, generator=generator)
    slot.target.copy_(whole.narrow(slot.dim, slot.start, slot.target.shape[slot.dim]))
