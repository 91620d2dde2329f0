"""The contents of a page of KV cache: two workers exchange pages only where these are equal."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Annotated

import msgspec

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}

Size = Annotated[int, msgspec.Meta(ge=1, le=2**20)]


class KVCacheSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The contents of a page. Two workers exchange KV only if their fingerprints are equal."""

    model: str  # digest of the checkpoint
    num_layers: Size
    num_kv_heads: Size  # of the whole model; a rank holds num_kv_heads / tp_size
    head_dim: Size
    block_size: Size  # tokens
    dtype: str
    layout: str = "HND"
    results: str = ""  # what made it, where all workers must compute the same bits (deterministic); empty: anything

    def page_bytes(self, tp_size: int = 1) -> int:
        """Return the bytes of one block in one layer on one rank: K and V."""
        heads = self.num_kv_heads // tp_size
        return 2 * heads * self.block_size * self.head_dim * _ITEM_BYTES[self.dtype]

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
