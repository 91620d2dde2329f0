"""Layers that keep a state in place of keys and values, or beside them, as config.json tells them.

A state is what a layer knows of all tokens so far, of one size however many they are:

    inputs   the last `kernel_size - 1` tokens' rows, which the next token's convolution reaches back to
    memory   what tokens further back have left, numbers of a kind of layer's own shape; of some kinds nothing

    kinds    `delta_nets.py`  `mamba.py`  `short_convolutions.py`; `state_kinds.py` chooses

The state behind a block's last computed token lies in the block, in pages behind those of keys and values. So a block
is all that is known up to its end: shared, handed over, kept and found again as one of any other model is.

    one block   layers with keys and values   [ 3 ][ 7 ][ 11 ]
                states, one behind another    [ 0, 1, part of 2 ][ rest of 2, 4, ... ]

States are cut into *shares*, as many as KV heads, or groups of these, and a layer's heads divide into evenly. A share
has some of a layer's heads, and lies in the places of its KV heads in those pages. So what ranks hold of a page, and
write of it to ranks of another number, they hold and write of states, and nobody has to know of these.

    two shares, a page   [ keys of head 0 ][ of 1 ][ values of head 0 ][ of 1 ]
    states in it         [ share 0        ][ 1    ][ more of share 0  ][ of 1 ]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from ...common.config import BLOCK_SIZE, LONG_BLOCK_SIZES, EngineConfig
from ...common.errors import ConfigError
from .config_fields import ConfigFields

Shape = tuple[int, ...]

_WITH_KEYS = {"full_attention", "attention"}
_ITEM_BYTES = 4  # float32, whatever the weights are: errors of thousands of tokens add up in a state
_PAGE_PARTS = 2  # keys and values, each of all KV heads


class RowPart(NamedTuple):
    """Numbers of a token's row that stand together: each share has some of them, or all where they are common."""

    size: int
    is_common: bool = False


class Segment(NamedTuple):
    """Numbers of a layer's state that stand together in a share, too."""

    at: int  # in the layer's state, of all shares here
    share: int
    offset: int  # in the share
    size: int
    is_copy: bool  # an earlier share has the same numbers


@dataclass(slots=True, frozen=True, kw_only=True)
class StatesConfig(ABC):
    """The layers with states, and their sizes: of the whole model, or of one rank (`of_rank`)."""

    layers: tuple[bool, ...]  # by layer: it keeps a state
    kernel_size: int  # tokens that the convolution sees
    num_shares: int = 1
    are_beside_keys: bool = False  # these layers keep keys and values as well

    @property
    @abstractmethod
    def module(self) -> str:
        """Return the name of such a layer's mixer in a checkpoint."""

    @property
    @abstractmethod
    def row_parts(self) -> tuple[RowPart, ...]:
        """List what stands one behind another in a token's row that the convolution takes."""

    @property
    @abstractmethod
    def num_divided(self) -> int:
        """Count what shares divide among themselves: heads, or numbers that have none."""

    @abstractmethod
    def _divided(self, parts: int) -> Self:
        """Return the sizes of one of so many even parts."""

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

    def shared_by(self, num_kv_heads: int) -> Self:
        """Return it in as many shares as KV heads allow: pages are cut between these alone."""
        return replace(self, num_shares=math.gcd(num_kv_heads, self.num_divided))

    def of_rank(self, num_ranks: int) -> Self:
        """Return the sizes of each of so many ranks, which divide the shares evenly."""
        return replace(self._divided(num_ranks), num_shares=self.num_shares // num_ranks)

    def keeps_keys(self, layer: int) -> bool:
        """Tell whether a layer with a mixer keeps keys and values."""
        return self.are_beside_keys or not self.layers[layer]

    @property
    def num_convolved(self) -> int:
        """Count the numbers of a token's row that the convolution takes."""
        return sum(part.size for part in self.row_parts)

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
    def share_size(self) -> int:
        """Count the numbers of one share of a layer's state, with all that is common to shares."""
        return 1 + self.num_share_inputs + math.prod(self.memory_shape) // self.num_shares

    @property
    def num_share_inputs(self) -> int:
        """Count the numbers of a share that are rows of earlier tokens."""
        return (self.kernel_size - 1) * sum(self.share_of(part) for part in self.row_parts)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all layers' states of one sequence."""
        return self.num_layers * self.num_shares * self.share_size * _ITEM_BYTES

    def num_pages(self, page_bytes: int) -> int:
        """Count the pages of `page_bytes` that a block has for states."""
        return -(-self.num_bytes // page_bytes)

    def run_bytes(self, page_bytes: int) -> int:
        """Return how much of a page stands together in one share; a page has two such runs of each."""
        return page_bytes // (_PAGE_PARTS * self.num_shares)

    def pieces(self, index: int, page_bytes: int) -> list[tuple[int, int, slice]]:
        """List where a share of the `index`th such layer's state lies: pages, counted from the first, the share's run
        in each, and bytes in the run.
        """
        run_bytes = self.run_bytes(page_bytes)
        start, end = (each * self.share_size * _ITEM_BYTES for each in (index, index + 1))
        return [
            (*divmod(run, _PAGE_PARTS), slice(max(0, start - run * run_bytes), min(run_bytes, end - run * run_bytes)))
            for run in range(start // run_bytes, -(-end // run_bytes))
        ]

    def segments(self) -> Iterator[Segment]:
        """Yield what a layer's state is of shares: share after share, and each from its beginning to its end."""
        for share in range(self.num_shares):
            yield Segment(0, share, 0, 1, share > 0)
            at, offset = 1, 1
            for part in self.row_parts * (self.kernel_size - 1):
                size = self.share_of(part)
                own = 0 if part.is_common else share * size
                yield Segment(at + own, share, offset, size, part.is_common and share > 0)
                at, offset = at + part.size, offset + size
            if size := math.prod(self.memory_shape) // self.num_shares:
                yield Segment(at + share * size, share, offset, size, False)

    def share_of(self, part: RowPart) -> int:
        """Count the numbers of a part of a row that one share has."""
        return part.size if part.is_common else part.size // self.num_shares


def stateful_layers(
    fields: ConfigFields, key: str, types: object, names: Set[str], others: Set[str] = frozenset()
) -> tuple[bool, ...]:
    """Return of each layer whether it keeps a state: `types`, told under `key`, has one of `names` for those that do.

    `others`: of layers that keep nothing. Raises ConfigError.
    """
    num_layers = fields.count("num_hidden_layers")
    known = names | _WITH_KEYS | others
    told = types if isinstance(types, list) else []
    if len(told) != num_layers or not all(isinstance(kind, str) and kind in known for kind in told):
        raise fields.refuse(key, f"must name one of {sorted(known)} for each of {num_layers} layers")
    if not _WITH_KEYS & set(told):
        raise fields.refuse(key, "a model without a layer that keeps keys and values is not supported")
    return tuple(kind in names for kind in told)


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


def check_states(engine: EngineConfig, *, is_cuda: bool) -> None:
    """Refuse what is not built of models that keep states. Raises ConfigError."""
    if is_cuda and engine.speculative_config is not None:
        raise ConfigError(
            "speculative_config: drafts of a model with layers that keep a state are checked on CPUs alone"
        )
    if (speculative := engine.speculative_config) is not None and speculative.model is not None:
        raise ConfigError('speculative_config: layers that keep a state go with "method": "ngram" or "suffix" alone')
