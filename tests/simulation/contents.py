"""F2: a block hash stands for one content, in every tier of every worker."""

from __future__ import annotations

from .breach import Breach


class Contents:
    """What each published hash was first published with."""

    def __init__(self) -> None:
        self._pages: dict[bytes, list[list[int]]] = {}

    def check(self, place: str, block: int, block_hash: bytes, pages: list[list[int]]) -> None:
        """Take in a block that can be found from now on. `pages`: its tags, layer by layer."""
        known = self._pages.setdefault(block_hash, pages)
        if known != pages:
            text = f"{place} publishes block {block} as {block_hash.hex()[:8]}"
            raise Breach("F2", f"{text} with {pages}, which was {known}")
