"""F2: a block hash stands for one content, in every tier of every worker."""

from __future__ import annotations

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.kvcache.thin import twin

from .breach import Breach


class Contents:
    """What each published hash was first published with."""

    def __init__(self, spec: KVCacheSpec, states_from: int) -> None:
        """`states_from`: the first layer that keeps states, which are of a block's last token."""
        self._states_from = states_from
        self._are_windowed = [spec.is_windowed(layer) for layer in range(spec.num_layers)]
        self._pages: dict[bytes, list[list[int]]] = {}
        self._thin: set[bytes] = set()  # names that were published with less than all

    def check(self, place: str, block: int, block_hash: bytes, pages: list[list[int]]) -> None:
        """Take in a block that can be found from now on. `pages`: its tags, layer by layer."""
        known = self._pages.setdefault(block_hash, pages)
        text = f"{place} publishes block {block} as {block_hash.hex()[:8]}"
        if self._unwindowed(known) != self._unwindowed(pages):
            raise Breach("F2", f"{text} with {pages}, which was {known}")
        if any(page != self._right(pages, layer) for layer, page in enumerate(pages) if self._are_windowed[layer]):
            self._thin.add(block_hash)
            if twin(block_hash) in self._thin:
                raise Breach("F2", f"{text} with {pages}, and its other form is not whole either")

    def _right(self, pages: list[list[int]], layer: int) -> list[int]:
        """Return what a layer's page has where it is there, by that of the first layer, which has no window."""
        return pages[0] if layer < self._states_from else [pages[0][-1]] * len(pages[0])

    def _unwindowed(self, pages: list[list[int]]) -> list[list[int]]:
        return [page for page, windowed in zip(pages, self._are_windowed, strict=True) if not windowed]
