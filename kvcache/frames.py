"""Thin blocks share the memory of whole ones: a frame holds one whole block, or some that are thin.

    memory of a rank    [ full 0 ][ full 1 ] [ window ][ window ] [ window ][ window ]     places, of all frames each
    a whole block            j         j          j         j          j         j
    thin blocks              j         j        2N + j    2N + j     4N + j    4N + j      in what a whole one has there

So of three layers, two with windows, three thin blocks lie where one whole one would. The pages of layers without a
window stand first, so that all that kernels and agents know of a thin block is a number: page `place * N + block`, N
being the frames, is right for whole and thin ones alike. Who takes which frame is `frame_pool.py`'s concern.

Blocks with a draft model's pages are not shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ..common.kv_spec import KVCacheSpec

if TYPE_CHECKING:
    from torch import Tensor


# Of one sequence; a cache below that serves nobody. Longer requests than fit are refused one by one.
MIN_CACHE_TOKENS = 256


def too_small_a_cache(num_bytes: int, block_bytes: int, needed: int) -> str:
    """Say why a cache that holds fewer than `needed` blocks cannot serve; empty: it can."""
    if num_bytes // block_bytes >= needed:
        return ""
    return (
        f"kv_cache_memory_bytes: the KV cache of {num_bytes:,} bytes holds {num_bytes // block_bytes} blocks of "
        f"{block_bytes:,} bytes; at least {needed} are needed: set --kv-cache-memory-bytes to {needed * block_bytes:,} "
        "or more"
    )


@dataclass(slots=True, frozen=True)
class Frames:
    """Blocks lie in memory like this."""

    num_shares: int  # thin blocks to a frame; 1: a thin block takes as much as a whole one
    places: tuple[int, ...]  # of each page of a block: which of the places is its
    num_full: int  # pages that thin blocks have, in the first places

    def num_frames(self, num_blocks: int, num_thin: int) -> int:
        """Count the frames that blocks take, `num_thin` of which are thin."""
        return num_blocks - num_thin - -num_thin // self.num_shares

    def step(self, num_frames: int) -> int:
        """Return how far apart the ids of a frame's thin blocks are."""
        return self.num_full * num_frames

    def num_ids(self, num_frames: int) -> int:
        """Return what no block's id reaches. Not all numbers below are ids: `is_id`."""
        return (self.num_shares - 1) * self.step(num_frames) + num_frames

    def is_id(self, block: int, num_frames: int, *, is_thin: bool) -> bool:
        if block < num_frames:
            return block >= 0
        return is_thin and block < self.num_ids(num_frames) and block % self.step(num_frames) < num_frames

    def page(self, layer: int, block: int, num_frames: int) -> int:
        """Return the page of a block in a layer, counted through all places."""
        return self.places[layer] * num_frames + block


@lru_cache(maxsize=32)
def frames_of(spec: KVCacheSpec) -> Frames:
    windowed = [layer for layer in range(spec.num_layers) if spec.is_windowed(layer)]
    full = [layer for layer in range(spec.num_layers) if not spec.is_windowed(layer)]
    each = len(windowed) // len(full) if full else 0
    if not each or len(spec.windows) < spec.num_layers:
        return Frames(1, tuple(range(spec.num_layers)), spec.num_layers)
    places = {layer: place for place, layer in enumerate(full + windowed)}
    return Frames(1 + each, tuple(places[layer] for layer in range(spec.num_layers)), len(full))


def handed_frames(spec: KVCacheSpec, num_blocks: int, num_tokens: int) -> int:
    """Count the frames of so many blocks that begin with a prompt of `num_tokens`, as a handoff brings it."""
    if not spec.windows:  # a router asks for each worker that it looks at
        return num_blocks
    return frames_of(spec).num_frames(num_blocks, spec.num_left_out(num_tokens))


def layer_pages(pages: Tensor, spec: KVCacheSpec) -> Tensor | Sequence[Tensor]:
    """View the pages of each layer, [ids of blocks, *spec.page_shape()], in an allocation [places, frames, ...]."""
    frames, num_frames = frames_of(spec), pages.shape[1]
    if frames.num_shares == 1:
        return pages
    rows = pages.view(-1, *pages.shape[2:])
    found = []
    for layer, place in enumerate(frames.places):
        num_ids = num_frames if spec.is_windowed(layer) else frames.num_ids(num_frames)
        found.append(rows[place * num_frames : place * num_frames + num_ids])
    return found
