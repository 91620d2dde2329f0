"""The formats of quantized matrices, each unpacked from its checkpoint tensors into plain numbers or a `GroupedWeight`.

    layout     tensors of a matrix [out, in]                                          w[o, i], g = i // group_size
    integers   weight int8 [out, in], weight_scale, weight_zero_point                 (weight - zero) * scale
    packed     weight_packed int32 [out, in / n], the same; numbers stand 2^(bits - 1) too high
    float8     weight e4m3 [out, in], weight_scale or weight_scale_inv                weight * scale
               (uint8: powers of 2)
    float4     weight or weight_packed uint8 [out, in / 2] e2m1, weight_scale [out, in / group] (FLOAT4_KINDS)
    gptq       qweight int32 [in / n, out], qzeros [in / group, out / n], scales [in / group, out], g_idx [in] says g
    awq        qweight int32 [in, out / n], qzeros, scales as gptq's; a word's numbers are 0 2 4 6 1 3 5 7
    gguf       weight uint8 [out, bytes of a row's blocks]: gguf_blocks.py

n numbers of 4 or 8 bits stand in a word of 32, the first in its lowest bits. A matrix is unpacked as a whole: what a
rank's part of it means is decided by scales of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...common.errors import ConfigError
from ...models.storage import FLOAT4_KINDS, Storage
from .gguf_blocks import unpack_blocks
from .grouped import GroupedWeight, join_nibbles, power_of_2, split_nibbles

# A matrix's tensor by its last name, whole, in the shape and of a type that `Storage.tensors` has; None: there is none.
Read = Callable[[str], Tensor | None]

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word number j stands


def unpack(storage: Storage, shape: tuple[int, ...], read: Read, dtype: torch.dtype) -> Tensor | GroupedWeight:
    """Raises ConfigError for numbers that the format does not have."""
    match storage.layout:
        case "plain":
            return _needed(read, "weight")
        case "gguf":
            return unpack_blocks(storage.kind, _needed(read, "weight"), dtype)
        case "float8":
            return _float8(storage, read, dtype)
        case "float4":
            return _float4(storage, read, dtype)
        case "integers":
            return _integers(storage, shape, read, dtype)
        case "packed":
            return _packed(storage, shape, read, dtype)
        case "gptq":
            return _gptq(storage, shape, read, dtype)
        case "awq":
            return _awq(shape, read, dtype)


def _float8(storage: Storage, read: Read, dtype: torch.dtype) -> GroupedWeight:
    numbers, scales = _needed(read, "weight"), _needed(read, storage.scale_name)
    scales = power_of_2(scales) if scales.dtype == torch.uint8 else scales.float()  # of tools without such a type
    num_outputs, num_inputs = numbers.shape
    if storage.sharing == "block":
        height, width = storage.block
        group_size = math.gcd(width, num_inputs)  # the last block may be smaller
        scales = scales.repeat_interleave(height, 0)[:num_outputs]
        scales = scales.repeat_interleave(width // group_size, 1)[:, : num_inputs // group_size]
    elif storage.sharing == "tensor":
        scales = scales.expand(num_outputs, 1)
    return GroupedWeight(numbers, scales, dtype=dtype)


def _float4(storage: Storage, read: Read, dtype: torch.dtype) -> GroupedWeight:
    _, numbers, whole_scale, is_divisor = FLOAT4_KINDS[storage.kind]
    if whole_scale:
        scales, whole = (_needed(read, name).float() for name in ("weight_scale", whole_scale))
        scales = scales / whole if is_divisor else scales * whole
    else:
        scales = power_of_2(_needed(read, "weight_scale"))
    return GroupedWeight(_needed(read, numbers), scales, dtype=dtype, is_e2m1=True)


def _integers(storage: Storage, shape: tuple[int, ...], read: Read, dtype: torch.dtype) -> GroupedWeight:
    numbers, scales = _needed(read, "weight"), _needed(read, storage.scale_name).float()
    zeros = None if storage.symmetric else _needed(read, "weight_zero_point").float()
    if storage.sharing == "tensor":
        scales = scales.expand(shape[0], 1)
    return GroupedWeight(numbers, scales, None if zeros is None else -zeros * scales, dtype=dtype)


def _packed(storage: Storage, shape: tuple[int, ...], read: Read, dtype: torch.dtype) -> GroupedWeight:
    numbers = _of_words(_needed(read, "weight_packed"), storage.bits, shape[1])
    scales = _needed(read, "weight_scale").float()
    zeros = None
    if not storage.symmetric:
        words = _needed(read, "weight_zero_point")
        zeros = _separate(words.T.contiguous(), storage.bits)[:, : shape[0]].T
    return _grouped(storage, numbers, scales, zeros, read("weight_g_idx"), dtype)


def _gptq(storage: Storage, shape: tuple[int, ...], read: Read, dtype: torch.dtype) -> GroupedWeight:
    numbers = _of_words(_needed(read, "qweight").T.contiguous(), storage.bits, shape[1])
    scales = _needed(read, "scales").float().T.contiguous()
    words = _needed(read, "qzeros")
    if storage.one_less:  # with the carry, as it was taken away
        words = words + sum(1 << shift for shift in range(0, 32, storage.bits))
    zeros = _separate(words, storage.bits)[:, : shape[0]].T
    return _grouped(storage, numbers, scales, zeros, read("g_idx"), dtype)


def _awq(shape: tuple[int, ...], read: Read, dtype: torch.dtype) -> GroupedWeight:
    numbers, zeros = (_in_order(_separate(_needed(read, name), 4)).T for name in ("qweight", "qzeros"))
    scales = _needed(read, "scales").float().T.contiguous()
    return GroupedWeight(join_nibbles(numbers[: shape[0]]), scales, -zeros[: shape[0]].float() * scales, dtype=dtype)


def _in_order(numbers: Tensor) -> Tensor:
    return numbers.view(len(numbers), -1, 8)[:, :, _AWQ_PLACES].flatten(1)


def _grouped(
    storage: Storage, numbers: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor | None, dtype: torch.dtype
) -> GroupedWeight:
    """Return the weight of numbers of words; `zeros`: those that mean 0, `groups`: of each input."""
    middle = 1 << (storage.bits - 1)
    minima = None
    if zeros is not None and storage.symmetric:
        if not bool((zeros == middle).all()):
            raise ConfigError(f"is called symmetrical and has zeros that are not {middle}")
    elif zeros is not None:
        minima = ((middle if storage.bits == 8 else 0) - zeros.float()) * scales
    order = _order(groups, scales.shape[1], numbers.shape[1] * 8 // storage.bits)
    if order is not None:
        numbers = numbers[:, order] if storage.bits == 8 else join_nibbles(split_nibbles(numbers)[:, order])
        order = order.to(torch.int32)
    if storage.bits == 8:
        numbers = (numbers ^ 128).view(torch.int8)
    return GroupedWeight(numbers, scales, minima, order, dtype=dtype)


def _order(groups: Tensor | None, num_groups: int, num_inputs: int) -> Tensor | None:
    """Return the inputs group after group; None where they stand so. Raises ConfigError for groups of other sizes."""
    if groups is None:
        return None
    if groups.dtype not in (torch.int32, torch.int64):
        raise ConfigError(f"its g_idx holds {groups.dtype}, not whole numbers")
    if bool((groups == -1).all()):  # not filled
        return None
    order = groups.argsort(stable=True)
    in_turn = torch.arange(num_groups).repeat_interleave(num_inputs // num_groups)
    if groups.shape != in_turn.shape or not torch.equal(groups[order].long(), in_turn):
        raise ConfigError(f"its g_idx does not name {num_groups} groups of one size")
    return None if torch.equal(order, torch.arange(len(order))) else order


def _of_words(words: Tensor, bits: int, num_inputs: int) -> Tensor:
    """[rows, words] int32 -> [rows, bytes] uint8: nibbles in pairs as `GroupedWeight` has them, or bytes."""
    return words.contiguous().view(torch.uint8)[:, : num_inputs * bits // 8]


def _separate(words: Tensor, bits: int) -> Tensor:
    """[rows, words] int32 -> [rows, numbers] uint8."""
    numbers = words.contiguous().view(torch.uint8)
    return numbers if bits == 8 else split_nibbles(numbers)


def _needed(read: Read, name: str) -> Tensor:
    tensor = read(name)
    assert tensor is not None, name  # names, shapes and types were checked
    return tensor
