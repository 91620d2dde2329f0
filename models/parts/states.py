"""Layers that keep a state in place of keys and values, as config.json tells them.

A state is what a layer knows of all tokens so far, of one size however many they are:

    inputs   the last `kernel_size - 1` tokens' rows, which the next token's convolution reaches back to
    memory   what tokens further back have left, numbers of a kind of layer's own shape; of some kinds nothing

    kinds    `delta_nets.py`  `mamba.py`  `short_convolutions.py`; `state_kinds.py` chooses

The state behind a block's last computed token lies in the block, in pages behind those of keys and values. So a block
is all that is known up to its end: shared, handed over, kept and found again as one of any other model is.

    one block   layers with keys and values   [ 3 ][ 7 ][ 11 ]
                states, one behind another    [ 0, 1, part of 2 ][ rest of 2, 4, ... ]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Set
from dataclasses import dataclass

from ...common.config import BLOCK_SIZE, LONG_BLOCK_SIZES, EngineConfig
from ...common.errors import ConfigError
from .config_fields import ConfigFields

Shape = tuple[int, ...]

_WITH_KEYS = {"full_attention", "attention"}
_ITEM_BYTES = 4  # float32, whatever the weights are: errors of thousands of tokens add up in a state


@dataclass(slots=True, frozen=True, kw_only=True)
class StatesConfig(ABC):
    """The layers with states, and their sizes, of the whole model."""

    layers: tuple[bool, ...]  # by layer: it keeps a state
    kernel_size: int  # tokens that the convolution sees

    @property
    @abstractmethod
    def module(self) -> str:
        """Return the name of such a layer's mixer in a checkpoint."""

    @property
    @abstractmethod
    def num_convolved(self) -> int:
        """Count the numbers of a token's row that the convolution takes."""

    @property
    @abstractmethod
    def memory_shape(self) -> Shape:
        """Return the shape of a layer's memory."""

    @property
    @abstractmethod
    def num_values(self) -> int:
        """Count the numbers of a token that such a layer's mixer yields before its last product."""

    @property
    @abstractmethod
    def num_of_heads(self) -> int:
        """Count the numbers that a token's heads compute with: values, and what they are written and read by."""

    @abstractmethod
    def shapes(self, name: str, hidden_size: int) -> dict[str, Shape]:
        """Return the tensors of a layer's mixer `name`, by their names in a checkpoint."""

    @property
    def num_layers(self) -> int:
        """Count the layers with states."""
        return sum(self.layers)

    @property
    def num_inputs(self) -> int:
        """Count the numbers of a layer's state that are rows of earlier tokens."""
        return (self.kernel_size - 1) * self.num_convolved

    @property
    def layer_size(self) -> int:
        """Count the numbers of a layer's state: of how many tokens it is, their last rows, the memory."""
        return 1 + self.num_inputs + math.prod(self.memory_shape)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all layers' states of one sequence."""
        return self.num_layers * self.layer_size * _ITEM_BYTES

    def num_pages(self, page_bytes: int) -> int:
        """Count the pages of `page_bytes` that a block has for states."""
        return -(-self.num_bytes // page_bytes)

    def pieces(self, index: int, page_bytes: int) -> list[tuple[int, slice]]:
        """List where the state of the `index`th such layer lies: pages, counted from the first, and bytes in each."""
        start, end = (each * self.layer_size * _ITEM_BYTES for each in (index, index + 1))
        pages = range(start // page_bytes, -(-end // page_bytes))
        return [
            (page, slice(max(0, start - page * page_bytes), min(page_bytes, end - page * page_bytes))) for page in pages
        ]


def stateful_layers(
    fields: ConfigFields, key: str, types: object, names: Set[str], others: Set[str] = frozenset()
) -> tuple[bool, ...]:
    """Return of each layer whether it keeps a state: `types`, told under `key`, has one of `names` for those that do.

    `others`: of layers that keep nothing. Raises ConfigError.
    """
    num_layers = fields.count("num_hidden_layers")
    known = names | _WITH_KEYS | others
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in known for kind in types):
        raise fields.refuse(key, f"must name one of {sorted(known)} for each of {num_layers} layers")
    if not _WITH_KEYS & set(types):
        raise fields.refuse(key, "a model without a layer that keeps keys and values is not supported")
    return tuple(kind in names for kind in types)


def block_size_of(engine: EngineConfig, states: StatesConfig | None, kv_token_bytes: int) -> int:
    """Return the tokens of a block: as asked for, or by what a token's keys and values take in all layers.

    Each block has a state. By itself a block is long enough that states are at most half of what is kept, where that
    can be had: a shorter one would be a state with few tokens, a longer one would be mostly empty. Raises ConfigError.
    """
    if states is None:
        if engine.block_size in LONG_BLOCK_SIZES:
            raise ConfigError(f"block_size: {engine.block_size} tokens are for models that keep states; at most 128")
        return engine.block_tokens
    if engine.block_size is not None:
        return engine.block_size
    fits = [size for size in (BLOCK_SIZE, 32, 64, 128, *LONG_BLOCK_SIZES) if size * kv_token_bytes >= states.num_bytes]
    return fits[0] if fits else LONG_BLOCK_SIZES[-1]


def check_states(engine: EngineConfig) -> None:
    """Refuse what is not built of models that keep states. Raises ConfigError."""
    if engine.tensor_parallel_size > 1:
        raise ConfigError("tensor_parallel_size: layers that keep a state are computed by one rank alone; use 1")
    if engine.deterministic:
        raise ConfigError(
            "deterministic: layers that keep a state have no exact steps, and so no speculation; leave both away"
        )
