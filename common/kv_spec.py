"""The contents of a page of KV cache, and which part of a model's KV one rank holds.

Two workers exchange pages only where the contents are equal. Who writes what to whom follows from the ranks' shards.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Annotated

import msgspec

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}

Size = Annotated[int, msgspec.Meta(ge=1, le=2**20)]
Edge = Annotated[int, msgspec.Meta(ge=0, le=2**20)]


class Shard(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The part of a model's KV that one rank holds: layers [first_layer, end_layer), heads [first_head, end_head)."""

    first_layer: Edge
    end_layer: Edge
    first_head: Edge  # KV heads, numbered over the whole model
    end_head: Edge

    def __post_init__(self) -> None:
        """Check what the types cannot say. From the wire, a ValueError here is a refused frame."""
        if self.first_layer >= self.end_layer or self.first_head >= self.end_head:
            raise ValueError(f"{self}: a shard holds at least one layer and one head")

    def __str__(self) -> str:
        return f"layers [{self.first_layer}, {self.end_layer}) and heads [{self.first_head}, {self.end_head})"

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


class KVCacheSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The contents of a page. Two workers exchange KV only if their fingerprints are equal."""

    model: str  # digest of the checkpoint
    draft: str = ""  # digest of the draft model whose layers lie behind the model's; empty: none
    num_layers: Size  # pages of a block: one for each layer of the model, then those of its draft model
    num_kv_heads: Size  # of the whole model; a rank holds num_kv_heads / tp_size
    head_dim: Size
    block_size: Size  # tokens
    dtype: str
    layout: str = "HND"
    results: str = ""  # what made it, where all workers must compute the same bits (deterministic); empty: anything

    def page_bytes(self, tp_size: int = 1) -> int:
        """Return the bytes of one block in one layer on one rank: K and V."""
        return 2 * (self.num_kv_heads // tp_size) * self.head_bytes

    @property
    def head_bytes(self) -> int:
        """Return the bytes of one head's keys, or values, in a page."""
        return self.block_size * self.head_dim * _ITEM_BYTES[self.dtype]

    def shard(self, rank: int, tp_size: int) -> Shard:
        """Return what a tensor-parallel rank holds: an even share of the heads, in all layers."""
        num_heads = self.num_kv_heads // tp_size
        return Shard(0, self.num_layers, rank * num_heads, (rank + 1) * num_heads)

    def block_bytes(self, tp_size: int = 1) -> int:
        return self.num_layers * self.page_bytes(tp_size)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self)


@lru_cache(maxsize=8)
def _fingerprint(spec: KVCacheSpec) -> str:
    return hashlib.blake2b(msgspec.msgpack.encode(spec), digest_size=8).hexdigest()
