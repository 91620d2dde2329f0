"""Safetensors straight into this rank's parameters.

Each tensor is read by slice from the mapped file into the parameter that holds it, so memory never has a second
copy of the model. Every tensor that the model has must be there in its shape, and none may be left over. Under
load format `dummy` weights are random numbers from (seed, tensor name): the same on every rank and worker.
A quantized matrix is read as a whole, one at a time, and each rank takes its part of what it stands for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ...common.errors import ConfigError
from ...models.checkpoint import (
    KV_SCALE,
    StoredTensor,
    check_act_order,
    check_names,
    check_tensor,
    matrix_storage,
    stored_tensors,
    tensor_shapes,
)
from ...models.config import ModelConfig
from ...models.families.module_names import full_name
from ...models.heads import with_embedding
from ...models.quantization import Quantization
from ...models.storage import MXFP4_GROUP, Storage
from ...models.stored.safetensors import safetensors_files
from ..weights.expert_files import TensorFile, TensorSlice, with_parts
from ..weights.formats import unpack
from ..weights.grouped import GroupedRows, GroupedWeight, power_of_2
from ..weights.weight import WeightSlot
from .decoder import Decoder
from .stacked_experts import mxfp4_as_float8, part_of_mxfp4, unpack_mxfp4

_EXPONENT = 120  # of random groups of MXFP4: their numbers then vary as `_random`'s
Progress = Callable[[str, float], None]  # what is being done, fraction in [0, 1]


def load_weights(
    decoder: Decoder, model_dir: Path, *, load_format: str, seed: int, progress: Progress | None = None
) -> None:
    """Fill every parameter of this rank. Raises ConfigError naming tensors that are missing, extra or misshapen."""
    slots = list(decoder.slots())
    total = sum(slot.target.numel() for slot in slots)
    files = {} if load_format == "dummy" else _files_of(decoder.config, model_dir)
    quantization = decoder.config.quantization
    if load_format != "dummy":
        shapes = {slot.name: slot.shape for slot in slots}
        if decoder.expert_plan is not None:  # those of other ranks are in the files, too
            shapes |= tensor_shapes(decoder.config)
        wanted, optional = stored_tensors(quantization, shapes)
        check_names(set(wanted), set(files) - optional, model_dir, decoder.config)
        for name, tensor in wanted.items():
            check_tensor(name, _found(*files[name]), tensor)
        _check_extra_biases(files, optional)
        check_act_order(model_dir, quantization, _shared_by_inputs(slots))
    done = 0
    for slot in slots:
        storage = matrix_storage(quantization, slot.name, slot.shape)
        if load_format == "dummy":
            _fill_randomly(slot, seed, quantization)
        elif f"{slot.name}_blocks" in files:
            _fill_from_mxfp4(slot, files)
        elif storage is not None:
            _fill_unpacked(slot, storage, files, decoder.dtype)
        elif slot.rows is not None:
            file, name = files[slot.name]
            _put(slot, file.get_tensor(name), quantization)
        else:
            _fill_from_file(slot, *files[slot.name])
        done += slot.target.numel()
        if progress is not None:
            progress("loading weights", done / total)


def _files_of(config: ModelConfig, model_dir: Path) -> dict[str, tuple[TensorFile, str]]:
    """Return what `_open_files` does, by the names of this model's slots."""
    return with_parts(with_embedding(_open_files(model_dir), is_tied=config.tie_embeddings), config)


def _open_files(model_dir: Path) -> dict[str, tuple[TensorFile, str]]:
    """Return tensor name -> the open (mapped, not read) file that holds it, and the name that it has there."""
    from safetensors import SafetensorError, safe_open

    by_name: dict[str, tuple[TensorFile, str]] = {}
    for path in safetensors_files(model_dir):
        try:
            file: TensorFile = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        by_name |= {full_name(name): (file, name) for name in file.keys()}  # noqa: SIM118  # a file is no mapping
    return by_name


def _found(file: TensorFile, name: str) -> StoredTensor:
    stored = file.get_slice(name)
    return StoredTensor(tuple(stored.get_shape()), stored.get_dtype())


def _shared_by_inputs(slots: Sequence[WeightSlot]) -> list[str]:
    """List the quantized modules of whose inputs this rank has a part."""
    return [
        slot.name.removesuffix(".weight")
        for slot in slots
        if isinstance(slot.rows, GroupedRows) and slot.rows.weight.num_inputs < slot.shape[1]
    ]


def _fill_from_file(slot: WeightSlot, file: TensorFile, name: str) -> None:
    stored = file.get_slice(name)
    source = cast("TensorSlice | Tensor", stored)
    if len(stored.get_shape()) != len(slot.shape):  # a vector that stands in dimensions of one besides
        source = file.get_tensor(name).view(slot.shape)
    length = slot.target.shape[slot.dim]
    index = tuple(
        slice(slot.start, slot.start + length) if dim == slot.dim else slice(0, size)
        for dim, size in enumerate(slot.shape)
    )
    slot.target.copy_(source[index])


def _fill_from_mxfp4(slot: WeightSlot, files: Mapping[str, tuple[TensorFile, str]]) -> None:
    """Fill expert after expert: all of them in plain numbers are a layer's worth of memory."""
    (blocks, name), (scales, scales_name) = (files[f"{slot.name}_{kind}"] for kind in ("blocks", "scales"))
    first = slot.start if slot.dim == 0 else 0
    for index, target in enumerate(slot.target, first):
        one = slice(index, index + 1)
        stored = blocks.get_slice(name)[(one,)], scales.get_slice(scales_name)[(one,)]
        if slot.scales is not None and target.dtype == torch.float8_e4m3fn:
            _put_float8(slot, index - first, *(tensor[0] for tensor in stored))
            continue
        if slot.scales is not None:
            numbers, powers = (part_of_mxfp4(tensor[0], slot.dim, slot.start, target) for tensor in stored)
            target.copy_(numbers.flatten(1))
            _put_powers(slot.scales[index - first], powers)
            continue
        plain = unpack_mxfp4(*stored)[0]
        target.copy_(plain if slot.dim == 0 else plain.narrow(slot.dim - 1, slot.start, target.shape[slot.dim - 1]))


def _put_powers(scales: Tensor, powers: Tensor) -> None:
    """Fill scales, which are float32 or as stored, with powers of 2 as MXFP4 stores them."""
    scales.copy_(powers if scales.dtype == torch.uint8 else power_of_2(powers))


def _put_float8(slot: WeightSlot, index: int, blocks: Tensor, scales: Tensor) -> None:
    """Put a rank's part of an expert's blocks in MXFP4, [out, groups, 16] and [out, groups], as 8-bit floats."""
    target, stored = slot.target[index], [blocks, scales]
    assert slot.scales is not None
    is_part_of_inputs = slot.dim == 1  # of the plain stack: a scale is made of the whole output all the same
    if not is_part_of_inputs:
        stored = [part_of_mxfp4(each, slot.dim, slot.start, target) for each in stored]
    numbers, own_scales = mxfp4_as_float8(*(each.to(target.device) for each in stored))
    target.copy_(numbers.narrow(1, slot.start, target.shape[1]) if is_part_of_inputs else numbers)
    slot.scales[index].copy_(own_scales)


def _fill_unpacked(
    slot: WeightSlot, storage: Storage, files: Mapping[str, tuple[TensorFile, str]], dtype: torch.dtype
) -> None:
    """Fill from the tensors that stand for the matrix of a module, each in the shape that its storage tells."""
    module = slot.name.removesuffix(".weight")
    wanted = storage.tensors(module, slot.shape[0], slot.shape[1])

    def read(suffix: str) -> Tensor | None:
        full = f"{module}.{suffix}"
        file, name = files.get(full, (None, ""))
        tensor = None if file is None else file.get_tensor(name)
        return tensor.reshape(wanted[full].shape) if tensor is not None and full in wanted else tensor

    try:
        _put(slot, unpack(storage, slot.shape, read, dtype), None)
    except ConfigError as error:
        raise ConfigError(f"{module}: {error}") from error


def _check_extra_biases(files: Mapping[str, tuple[TensorFile, str]], optional: set[str]) -> None:
    """Refuse biases that config.json does not tell of, unless they are zeros, as some tools write them."""
    for name in sorted(name for name in optional & files.keys() if name.endswith(".bias")):
        file, own_name = files[name]
        if bool(file.get_tensor(own_name).any()):
            raise ConfigError(f"{name} is not zero, and config.json tells of no bias")


def _put(slot: WeightSlot, matrix: Tensor | GroupedWeight, quantization: Quantization | None) -> None:
    """Fill with this rank's part of a whole tensor: widened, or rounded, where the slot is of the other kind."""
    if slot.rows is None:
        if isinstance(matrix, GroupedWeight):
            matrix.widen_into(slot.target, slot.dim, slot.start)
        else:
            slot.target.copy_(matrix.narrow(slot.dim, slot.start, slot.target.shape[slot.dim]))
        return
    form = quantization.form([slot.name.removesuffix(".weight")], slot.shape[1]) if quantization is not None else None
    if form is not None and not isinstance(matrix, GroupedWeight):
        matrix = GroupedWeight.quantized(matrix, form)
    slot.rows.put(matrix, slot.dim, slot.start)


def read_kv_scales(model_dir: Path, num_layers: int) -> list[tuple[float, float]]:
    """Return each layer's k_scale and v_scale of a cache in 8 bits; 1 where there is none. Raises ConfigError."""
    scales = [[1.0, 1.0] for _ in range(num_layers)]
    for name, (file, own_name) in _open_files(model_dir).items():
        match = KV_SCALE.fullmatch(name)
        if match is None:
            continue
        if (layer := int(match[1])) >= num_layers:  # one that predicts further tokens, which is not read
            continue
        value = file.get_tensor(own_name)
        if value.numel() != 1:
            raise ConfigError(f"{model_dir}: {name} has {value.numel()} numbers; one for all heads of a layer is read")
        if not 0 < float(value) < math.inf:
            raise ConfigError(f"{model_dir}: {name} is {float(value)}, no number above 0")
        scales[layer]["kv".index(match[2])] = float(value)
    return [(k_scale, v_scale) for k_scale, v_scale in scales]


def _fill_randomly(slot: WeightSlot, seed: int, quantization: Quantization | None) -> None:
    if slot.scales is None:
        _put(slot, _random(slot, seed), quantization)
        return
    count, num_inputs, num_outputs = slot.shape
    generator = torch.Generator().manual_seed(_seed_of(slot, seed))
    numbers = torch.randint(256, (count, num_outputs, num_inputs // 2), dtype=torch.uint8, generator=generator)
    if slot.target.dtype == torch.float8_e4m3fn:
        groups = torch.full((num_outputs, num_inputs // MXFP4_GROUP), _EXPONENT, dtype=torch.uint8)
        for index in range(len(slot.target)):
            own = numbers[index + (slot.start if slot.dim == 0 else 0)]
            _put_float8(slot, index, own.view(*groups.shape, -1), groups)
        return
    dim, start = ((0, slot.start), (2, slot.start // 2), (1, slot.start))[slot.dim]
    slot.target.copy_(numbers.narrow(dim, start, slot.target.shape[dim]))
    _put_powers(slot.scales, torch.full(slot.scales.shape, _EXPONENT, dtype=torch.uint8))


def _seed_of(slot: WeightSlot, seed: int) -> int:
    key = hashlib.blake2b(f"{seed}:{slot.name}".encode(), digest_size=8).digest()
    return int.from_bytes(key, "little") >> 1


def _random(slot: WeightSlot, seed: int) -> Tensor:
    """Draw variance 1 / fan_in for matrices, small biases, norms and factors of 1; of the whole tensor."""
    device = slot.target.device
    if slot.name.endswith(("norm.weight", "norm_f.weight", ".layer_scalar")):
        return torch.ones(slot.shape, device=device)
    generator = torch.Generator(device).manual_seed(_seed_of(slot, seed))
    std = 1 / math.sqrt(slot.shape[-1]) if len(slot.shape) == 2 else 0.02
    return torch.empty(slot.shape, dtype=torch.float32, device=device).normal_(0, std, generator=generator)
