"""Layers of a GGUF file that keep a state: their tensors as a checkpoint has them, and their sizes.

llama.cpp's converter stores of A_log what the model computes of it, -exp(A_log), drops dimensions of one number, and
lets the value heads of delta nets stand in turns, where a checkpoint has those of one key head side by side:

    file, 2 key heads, 3 value heads each    0.0 1.0 0.1 1.1 0.2 1.2   ->   0.0 0.1 0.2 1.0 1.1 1.2
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .architectures.architecture import Architecture
from .tensors import Part, StoredTensor, chained, computed, with_columns

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

_CONVOLUTIONS = ("ssm_conv1d", "shortconv.conv")
_FLAT = ("ssm_d", "ssm_norm")


def state_tensor(
    part: Part, own: str, name: str, of: Architecture, config: Mapping[str, Any], kept: Collection[str]
) -> StoredTensor | None:
    """Return a tensor of a layer's state as a checkpoint has it; None: it is there as it is.

    `own`: the file's name of it in its layer, `name`: the checkpoint's. Raises ValueError.
    """
    is_weight = name.endswith(".weight")
    heads = _Heads.of(config) if of.family.states == "delta nets" else None
    if own == "ssm_dt":
        return computed(part, f"{name.removesuffix('dt.bias')}dt_bias", (part.shape[0],), partial(_flat, heads))
    if own == "ssm_a":
        return computed(part, name, (math.prod(part.shape),), partial(_logarithm, heads))
    if own in _FLAT:
        return computed(part, name, (math.prod(part.shape),), partial(_flat, None))
    if own in _CONVOLUTIONS and is_weight:
        channels, kernel = part.shape
        return computed(part, name, (channels, 1, kernel), partial(_kernels, heads))
    return None if heads is None else heads.in_order(part, own, name, kept)


def grouped_rows(parts: Sequence[Part], config: Mapping[str, Any]) -> list[Part]:
    """Return the rows of queries, keys and values, and of gates, key head by key head, as Qwen3-Next has them."""
    heads, (inputs, gates) = _Heads.of(config), parts
    found = []
    for head in range(heads.num_keys):
        keys = [inputs.some_rows(first + head * heads.key_dim, heads.key_dim) for first in (0, heads.num_key_rows)]
        size = heads.num_each * heads.value_dim
        values = inputs.some_rows(2 * heads.num_key_rows + head * size, size)
        found += [*keys, values, gates.some_rows(head * size, size)]
    return found


class _Heads:
    """The heads of delta nets."""

    def __init__(self, num_keys: int, num_values: int, key_dim: int, value_dim: int) -> None:
        self.num_keys, self.num_each = num_keys, num_values // num_keys
        self.key_dim, self.value_dim = key_dim, value_dim
        self.num_key_rows = num_keys * key_dim

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Heads:
        names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
        return cls(*(config[f"linear_{name}"] for name in names))

    @property
    def places(self) -> list[int]:
        """Return where the file has each value head."""
        return [each * self.num_keys + key for key in range(self.num_keys) for each in range(self.num_each)]

    def in_order(self, part: Part, own: str, name: str, kept: Collection[str]) -> StoredTensor | None:
        if self.num_each == 1:
            return None
        if own == "ssm_out":
            return with_columns(part, name, kept, self.places)
        rows = {"attn_qkv": self.value_dim, "attn_gate": self.value_dim, "ssm_alpha": 1, "ssm_beta": 1}.get(own)
        if rows is None:
            return None
        first = 2 * self.num_key_rows if own == "attn_qkv" else 0
        before = [part.some_rows(0, first)] if first else []
        return chained([*before, *(part.some_rows(first + place * rows, rows) for place in self.places)], name, kept)


def _flat(heads: _Heads | None, numbers: Floats) -> Floats:
    flat = numbers.reshape(-1)
    return flat if heads is None else flat[heads.places]


def _logarithm(heads: _Heads | None, numbers: Floats) -> Floats:
    """Return A_log of -exp(A_log)."""
    import numpy as np

    found: Floats = np.log(-_flat(heads, numbers))
    return found


def _kernels(heads: _Heads | None, numbers: Floats) -> Floats:
    """[channels, kernel] -> [channels, 1, kernel]"""
    if heads is not None:
        import numpy as np

        keys, values = numbers[: 2 * heads.num_key_rows], numbers[2 * heads.num_key_rows :]
        of_heads = values.reshape(-1, heads.value_dim, values.shape[1])[heads.places]
        numbers = np.concatenate((keys, of_heads.reshape(values.shape)))
    return numbers[:, None, :]
