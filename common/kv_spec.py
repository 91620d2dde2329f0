"""The contents of a page of KV cache, and which part of a model's KV one rank holds.

Two workers exchange pages only where the contents are equal. Who writes what to whom follows from the ranks' shards.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Annotated, Literal

import msgspec

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}
_SCALE_ITEMS = 4  # one float32 beside the numbers of a token and head

Size = Annotated[int, msgspec.Meta(ge=1, le=2**20)]
Edge = Annotated[int, msgspec.Meta(ge=0, le=2**20)]
MAX_COPIES = 1024  # ranks with one and the same part: a worker that says more is not believed
Copies = Annotated[int, msgspec.Meta(ge=1, le=MAX_COPIES)]
Windows = Annotated[tuple[Edge, ...], msgspec.Meta(max_length=2**12)]
# HND      a page is [2, heads, block_size, head_dim]: keys, then values, of a rank's heads; in int8 with scales behind
#          the numbers of each head (engine/nn/attention/int8_rows.py)
# latent   a page is [1, 1, block_size, head_dim]: one vector of a token that serves all heads as key and value
Layout = Literal["HND", "latent"]
# Each sequence that runs has a block kept free to grow into, so that few are preempted; where blocks are longer than
# this, some share one, as few come to the end of theirs soon. With one for each, half of a pool of 2,048 tokens a block
# (of models whose states lie in blocks) stayed free. Less: more preemptions; more: fewer sequences at once.
_GROWTH_TOKENS = 64


class Shard(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The part of a model's KV that one rank holds: layers [first_layer, end_layer), heads [first_head, end_head).

    Ranks that hold the same part, as all do of latents, and more ranks than heads, tell their copies apart by `copy`.
    """

    first_layer: Edge
    end_layer: Edge
    first_head: Edge  # KV heads, numbered over the whole model
    end_head: Edge
    copy: Edge = 0  # below num_copies
    num_copies: Copies = 1  # of this part, on as many ranks

    def __post_init__(self) -> None:
        """Check what the types cannot say. From the wire, a ValueError here is a refused frame."""
        if self.first_layer >= self.end_layer or self.first_head >= self.end_head:
            raise ValueError(f"{self}: a shard holds at least one layer and one head")
        if self.copy >= self.num_copies:
            raise ValueError(f"{self}: copies are numbered from 0")

    def __str__(self) -> str:
        part = f"layers [{self.first_layer}, {self.end_layer}) and heads [{self.first_head}, {self.end_head})"
        return part if self.num_copies == 1 else f"copy {self.copy} of {self.num_copies} of {part}"

    @property
    def num_heads(self) -> int:
        return self.end_head - self.first_head

    def overlap(self, other: Shard) -> Shard | None:
        """Return what both hold; None: nothing."""
        first_layer, end_layer = max(self.first_layer, other.first_layer), min(self.end_layer, other.end_layer)
        first_head, end_head = max(self.first_head, other.first_head), min(self.end_head, other.end_head)
        if first_layer >= end_layer or first_head >= end_head:
            return None
        return Shard(first_layer, end_layer, first_head, end_head)

    def share_for(self, target: Shard) -> Shard | None:
        """Return what a rank with this shard writes to one with `target`; None: nothing.

        Of equal copies one serves each target, by turns: each part of a page reaches it once.
        """
        return self.overlap(target) if target.copy % self.num_copies == self.copy else None


def growth_blocks(num_sequences: int, block_size: int) -> int:
    """Count the blocks that sequences which run need free to grow."""
    return -(-num_sequences * min(_GROWTH_TOKENS, block_size) // block_size)


def row_items(head_dim: int, dtype: str) -> int:
    """Count the items of a page that a token's numbers of one head take, with the scale of whole numbers."""
    return head_dim + (_SCALE_ITEMS if dtype == "int8" else 0)


class KVCacheSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The contents of a page. Two workers exchange KV only if their fingerprints are equal."""

    model: str  # digest of the checkpoint
    draft: str = ""  # digest of the draft model whose layers lie behind the model's; empty: none
    num_layers: Size  # pages of a block: one for each layer of the model, then those of its draft model
    num_kv_heads: Size  # of the whole model; a rank holds num_kv_heads / tp_size, one at least, and all of latents
    head_dim: Size
    block_size: Size  # tokens
    dtype: str
    layout: Layout = "HND"
    windows: Windows = ()  # of pages, tokens before the next one that are read; 0: all; 1, of states: the last one's
    window_slack: Edge = 0  # tokens: a handoff leaves out what windows do not reach from so far before its prompt's end
    results: str = ""  # what made it, where all workers must compute the same bits (deterministic); empty: anything

    @property
    def is_replicated(self) -> bool:
        """Tell whether every tensor-parallel rank holds all of the KV, instead of some heads of it."""
        return self.layout == "latent"

    @property
    def num_parts(self) -> int:
        """Count what a page has of each head: keys and values, or latents, which are both."""
        return 1 if self.layout == "latent" else 2

    def fits_ranks(self, tp_size: int) -> bool:
        """Tell whether so many ranks can each hold an even share of the heads, or each head be held by as many."""
        if not 1 <= tp_size <= max(MAX_COPIES, self.num_kv_heads):
            return False
        return self.is_replicated or self.num_kv_heads % tp_size == 0 or tp_size % self.num_kv_heads == 0

    def num_copies(self, tp_size: int) -> int:
        """Count the ranks that hold one and the same part: all of latents, some of more ranks than heads."""
        return tp_size if self.is_replicated else max(1, tp_size // self.num_kv_heads)

    def num_heads(self, tp_size: int) -> int:
        """Count the heads in the pages of one rank."""
        return self.num_kv_heads if self.is_replicated else max(1, self.num_kv_heads // tp_size)

    def page_shape(self, tp_size: int = 1) -> tuple[int, int, int, int]:
        """Return the shape of one block in one layer on one rank."""
        return self.num_parts, self.num_heads(tp_size), self.block_size, self._row_items

    def page_bytes(self, tp_size: int = 1) -> int:
        """Return the bytes of one block in one layer on one rank."""
        return self.num_parts * self.num_heads(tp_size) * self.head_bytes

    @property
    def head_bytes(self) -> int:
        """Return the bytes of one head's keys, or values, or of the latents, in a page."""
        return self.block_size * self._row_items * _ITEM_BYTES[self.dtype]

    @property
    def _row_items(self) -> int:
        return row_items(self.head_dim, self.dtype)

    def shard(self, rank: int, tp_size: int) -> Shard:
        """Return what a tensor-parallel rank holds: an even share of the heads, or a copy of one, in all layers."""
        num_copies, num_heads = self.num_copies(tp_size), self.num_heads(tp_size)
        first = rank // num_copies * num_heads
        return Shard(0, self.num_layers, first, first + num_heads, rank % num_copies, num_copies)

    def is_windowed(self, layer: int) -> bool:
        """Tell whether a thin block lacks this page."""
        return layer < len(self.windows) and self.windows[layer] > 0

    def num_thin_blocks(self, num_tokens: int) -> int:
        """Count the leading blocks that no window reaches from behind so many tokens: thin ones will do (`thin.py`)."""
        reach = max(self.windows, default=0)
        return max(0, num_tokens - reach) // self.block_size if reach else 0

    def num_left_out(self, num_tokens: int) -> int:
        """Count the leading blocks that are brought thin. A sequence may go back to its last full block."""
        return self.num_thin_blocks(num_tokens - max(self.window_slack, self.block_size))

    def num_pages(self, num_blocks: int, num_thin: int = 0) -> int:
        """Count the pages of blocks on one rank, `num_thin` of which are thin."""
        return self.num_layers * num_blocks - num_thin * sum(window > 0 for window in self.windows)

    def block_bytes(self, tp_size: int = 1) -> int:
        """Return the bytes of one block on one rank, all layers."""
        return self.num_layers * self.page_bytes(tp_size)

    def worker_bytes(self, num_blocks: int, tp_size: int, num_thin: int = 0) -> int:
        """Return the bytes of blocks, `num_thin` of them thin, on all ranks of a worker: what crosses to fill them."""
        return self.num_pages(num_blocks, num_thin) * tp_size * self.page_bytes(tp_size)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self)


@lru_cache(maxsize=8)
def _fingerprint(spec: KVCacheSpec) -> str:
    return hashlib.blake2b(msgspec.msgpack.encode(spec), digest_size=8).hexdigest()
