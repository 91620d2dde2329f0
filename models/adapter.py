"""Adapters (LoRA) as peft saves them: adapter_config.json and adapter_model.safetensors, checked without torch.

    y = x W^T + scale * (x A^T) B^T      A [rank, inputs], B [outputs, rank], scale = alpha / rank

The tensors say which modules an adapter is for, whatever way `target_modules` named them. What would change the model
in another way than that sum is refused by name. An adapter's digest is over the bytes of both files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from blake3 import blake3

from ..common.errors import ConfigError
from .checkpoint import tensor_shapes
from .config import ModelConfig
from .digest import file_digest
from .families.module_names import full_name
from .parts.lora import CONFIG_NAME, Scales, check_targets, checked_settings
from .storage import Shape
from .stored.json_files import read_json
from .stored.safetensors import Entry, Header, parse_header, read_header

MAX_RANK = 256  # vLLM's largest --max-lora-rank that is common; a larger one would take memory in every slot
WEIGHTS_NAME = "adapter_model.safetensors"
NO_LORA_EXPERTS = "adapters of experts need lora_experts on a GPU, which sets memory aside in every slot"
_COLUMN_STEP = 32  # see `expert_columns`
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_READ_BYTES = 1 << 20  # at once: it is digested while a core's cache holds it. Smaller ones are more calls

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_REFUSED_TENSORS = (
    ("lora_magnitude_vector", "a magnitude vector of DoRA"),
    ("lora_embedding_", "an adapter of embeddings"),
    ("lora_bias", "a bias"),
)


def expert_columns(num_slots: int, max_rank: int) -> int:
    """Count what a GPU has room for beside an expert: all slots' ranks, in whole steps that its products take."""
    return -(-num_slots * max_rank // _COLUMN_STEP) * _COLUMN_STEP


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in the weights' file."""

    name: str
    dtype: str  # one of ITEM_BYTES
    shape: tuple[int, int]
    begin: int  # its first byte in the file

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """One linear module's pair of matrices."""

    name: str  # in the model's checkpoint, whatever stood around its layers in training; without ".weight"
    rank: int
    scale: float
    down: StoredTensor  # A [rank, inputs]
    up: StoredTensor  # B [outputs, rank]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that has been checked, but for what the model must have."""

    digest: str  # 32 hexadecimal digits
    modules: tuple[AdaptedModule, ...]
    num_bytes: int  # of the weights' file

    @property
    def rank(self) -> int:
        return max(module.rank for module in self.modules)

    def check(self, model: ModelConfig, max_rank: int) -> None:
        """Refuse what the model has no place for. Raises ConfigError."""
        if self.rank > max_rank:
            raise ConfigError(f"its rank is {self.rank}; --max-lora-rank is {max_rank}")
        shapes = tensor_shapes(model)
        for module in self.modules:
            shape = shapes.get(f"{module.name}.weight")
            if shape is None or len(shape) != 2 or not module.name.startswith("model.layers."):
                raise ConfigError(f"it adapts {module.name}, which is no linear module of this model's layers")
            check_pair(module, shape)


def check_pair(module: AdaptedModule, shape: Shape) -> None:
    """Refuse matrices for a module of another size. Raises ConfigError."""
    found = (module.up.shape[0], module.down.shape[1])
    if found != shape:
        raise ConfigError(f"its matrices for {module.name} make {list(found)}; the model's is {list(shape)}")


Take = Callable[[AdaptedModule, StoredTensor, memoryview], None]  # of a module, one of its tensors, and its bytes


def inspect_adapter(path: Path) -> Adapter:
    """Read all but the numbers, and the digest from a side file where there is one. Raises ConfigError."""
    config, weights = _read_config(path), _weights_file(path)
    header, size = read_header(weights), weights.stat().st_size
    return Adapter(_digest(config, file_digest(weights)), _modules(path, config, header, size), size)


def read_adapter(path: Path, begin: Callable[[Sequence[AdaptedModule]], None], take: Take) -> Adapter:
    """Read both files whole, once. Raises ConfigError.

    `begin` is told the modules, then `take` each matrix in the file's order, in memory that the next one overwrites: a
    gigabyte in memory of its own takes longer than all else. The digest is of the bytes that were taken.
    """
    config, weights = _read_config(path), _weights_file(path)
    try:
        with weights.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            header = parse_header(weights, lambda first, count: os.pread(file.fileno(), count, first))
            modules = _modules(path, config, header, size)
            begin(modules)
            digest = _read_through(file, modules, take)
    except (OSError, MemoryError) as error:
        raise ConfigError(f"{weights} cannot be read: {error}") from error
    return Adapter(_digest(config, digest), modules, size)


def _read_through(file: FileIO, modules: Sequence[AdaptedModule], take: Take) -> bytes:
    tensors = [(tensor, module) for module in modules for tensor in (module.down, module.up)]
    buffer = memoryview(bytearray(max(_READ_BYTES, *(tensor.num_bytes for tensor, _ in tensors))))
    digest, position = blake3(), 0

    def read(count: int) -> memoryview:
        nonlocal position
        data, done = buffer[:count], 0
        while done < count and (found := file.readinto(data[done : done + _READ_BYTES])):
            digest.update(data[done : done + found])
            done += found
        position += done
        return data[:done]

    for tensor, module in sorted(tensors, key=lambda one: one[0].begin):
        while position < tensor.begin and read(min(_READ_BYTES, tensor.begin - position)):
            pass
        is_there = position == tensor.begin  # another one does not reach into it
        if not is_there or len(data := read(tensor.num_bytes)) < tensor.num_bytes:
            raise ConfigError(f"{file.name!r} was cut short at {tensor.name}, or another tensor reaches into it")
        take(module, tensor, data)
    while read(_READ_BYTES):
        pass
    return digest.digest()


def _digest(config: bytes, weights: bytes) -> str:
    return blake3(b"kvferry adapter 1" + blake3(config).digest() + weights).hexdigest(length=16)


def _read_config(path: Path) -> bytes:
    name = path / CONFIG_NAME
    if not name.is_file():
        raise ConfigError(f"{path} has no {CONFIG_NAME}: an adapter is a directory as peft's save_pretrained writes it")
    read_json(name)  # refuses what is too large, or no object
    return name.read_bytes()


def _weights_file(path: Path) -> Path:
    weights = path / WEIGHTS_NAME
    if not weights.is_file():
        if (path / "adapter_model.bin").exists():
            raise ConfigError(f"{path} has adapter_model.bin, a pickle, which is never read: save it as safetensors")
        raise ConfigError(f"{path} has no {WEIGHTS_NAME}")
    return weights


def _modules(path: Path, config: bytes, header: Header, size: int) -> tuple[AdaptedModule, ...]:
    """Check the settings, and the tensors of a file of `size`. Raises ConfigError."""
    fields = checked_settings(path, config)
    pairs: dict[str, dict[str, StoredTensor]] = {}
    for tensor in [_stored(path, name, entry, size) for name, entry in header.entries.items()]:
        module, side = _place(path, tensor.name)
        pairs.setdefault(module, {})[side] = tensor
    if not pairs:
        raise ConfigError(f"{path} adapts no module")
    check_targets(path, fields, pairs)
    scales = Scales(fields)
    modules = tuple(_module(path, name, pair, scales) for name, pair in sorted(pairs.items()))
    if len({module.name for module in modules}) == len(modules):
        return modules
    raise ConfigError(f"{path} adapts a module under two names")


def _stored(path: Path, name: str, entry: Entry, size: int) -> StoredTensor:
    if entry.dtype not in ITEM_BYTES:
        raise ConfigError(f"{path}: {name} is of type {entry.dtype}, not one of {', '.join(ITEM_BYTES)}")
    rows, columns = entry.shape if len(entry.shape) == 2 else (0, 0)
    num_bytes = entry.end - entry.begin
    if rows * columns == 0 or num_bytes != rows * columns * ITEM_BYTES[entry.dtype]:
        raise ConfigError(f"{path}: {name} is no matrix of its size: shape {[*entry.shape]}, {num_bytes} bytes")
    if entry.end > size:
        raise ConfigError(
            f"{path}: the file has {size} bytes, {name} ends at {entry.end}: it was cut short, or damaged"
        )
    return StoredTensor(name, entry.dtype, (rows, columns), entry.begin)


def _place(path: Path, name: str) -> tuple[str, str]:
    """Return the module that a tensor is for, and its side."""
    for part, what in _REFUSED_TENSORS:
        if part in name:
            raise ConfigError(f"{path}: {name} is {what}, which is not served")
    if (match := _TENSOR.fullmatch(name)) is None:
        raise ConfigError(f"{path}: {name} is no matrix of LoRA (base_model.model.MODULE.lora_A.weight or lora_B)")
    module, side = match[1], match[2]
    if module.endswith(("lm_head", "embed_tokens")):
        raise ConfigError(f"{path}: {name} adapts {module}; adapters of embeddings and head are not served")
    return module, side


def _module(path: Path, name: str, pair: Mapping[str, StoredTensor], scales: Scales) -> AdaptedModule:
    if len(pair) != 2:
        raise ConfigError(f"{path}: {name} has lora_{next(iter(pair))} alone")
    down, up = pair["A"], pair["B"]
    rank, scale = scales.of(name)
    if down.shape[0] != rank or up.shape[1] != rank:
        raise ConfigError(f"{path}: {name} has matrices of ranks {down.shape[0]} and {up.shape[1]}, not {rank:g}")
    if rank > MAX_RANK:
        raise ConfigError(f"{path}: {name} has rank {rank}; at most {MAX_RANK} is served")
    return AdaptedModule(full_name(name), int(rank), scale, down, up)
