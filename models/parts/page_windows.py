"""Pages of layers with windows, and states, are not read back to a prompt's beginning."""

from __future__ import annotations

from typing import Protocol

from .uneven_heads import UnevenHeads

# How far before a prompt's end a later one may part from it and still go on from its KV where windows' was left out:
# templates drop thoughts, and add words. Less: such prompts are computed anew; more: more is shipped.
SLACK_TOKENS = 256
# Kernels on CPUs read whole tiles of keys, and give those before a window a weight of zero, which does not silence NaN:
# what an earlier owner left in a thin block must not be among them. The largest tile, of the exact ones.
_TILE_TOKENS = 256
_MAX_WINDOW = 1 << 19  # tokens; a larger one is none


class PagedLayers(Protocol):
    """A model as far as its pages are concerned."""

    @property
    def sliding_windows(self) -> tuple[int | None, ...]: ...
    @property
    def uneven(self) -> UnevenHeads | None: ...
    @property
    def num_kv_pages(self) -> int: ...
    def page_of(self, layer: int) -> int | None: ...


def page_windows(model: PagedLayers, num_state_pages: int = 0) -> tuple[int, ...]:
    """Return, of each page of a block, how many tokens before the next one are read of it; 0: all. Empty: all of each.

    `num_state_pages`: these lie behind keys and values, and the state behind the last token is the one that is read.
    """
    readers: list[list[int]] = [[] for _ in range(model.num_kv_pages)]
    for layer, window in enumerate(model.sliding_windows):
        page = model.page_of(layer) if model.uneven is None else model.uneven.spot(model.uneven.lender(layer)).page
        if page is not None:
            readers[page].append(0 if window is None or window > _MAX_WINDOW else window - 1 + _TILE_TOKENS)
    windows = tuple(max(of_page) if all(of_page) else 0 for of_page in readers) + num_state_pages * (1,)
    return windows if any(windows) else ()
