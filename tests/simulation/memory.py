"""The KV memory of a simulated worker: pages hold tags in place of numbers.

A page is a list of tags, one for each token slot (see `oracle.py`), or several such runs where ranks share out the
heads (`heads.py`). A layer that keeps states has in all slots of a page the tag of the last token that was computed
there: what a row goes on from is that of the token before its first one, and of no other. Whatever reaches a page that
it should not, a late write, a copy too early, a block with two owners, is a wrong tag for the next row that reads it.
"""

from __future__ import annotations

from .breach import Breach
from .oracle import Answer

_NOTHING = -1


class Memory:
    """The KV allocation of one life of a worker, or of one of its ranks. Page index: layer * num_blocks + block."""

    __slots__ = ("_host", "block_size", "num_blocks", "num_layers", "pages", "sections", "states_from", "windows")

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        sections: tuple[int, ...] = (0,),
        *,
        states_from: int | None = None,
        windows: tuple[int, ...] = (),
    ) -> None:
        """`sections`: what each run of `block_size` tags of a page is, as the bytes lie. `states_from`: the first layer
        that keeps states; None: there is none. `windows`: as `KVCacheSpec` has them.
        """
        self.windows = windows
        self.num_layers = num_layers
        self.states_from = num_layers if states_from is None else states_from
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.sections = sections
        self.pages = [[_NOTHING] * block_size * len(sections) for _ in range(num_layers * num_blocks)]
        self._host: dict[int, list[list[int]]] = {}  # by slot: a block's pages

    @property
    def page_len(self) -> int:
        """Tags of a page."""
        return self.block_size * len(self.sections)

    def sections_at(self, first: int, count: int) -> tuple[int, ...] | None:
        """Return whose tags [first, first + count) of a page are; None: these are no whole sections of it."""
        size = self.block_size
        if first % size or count % size or first + count > self.page_len:
            return None
        return self.sections[first // size : (first + count) // size]

    def write(self, layer: int, block: int, slot: int, tags: list[int]) -> None:
        """What a step computes for neighbouring tokens of a block."""
        self.pages[layer * self.num_blocks + block][slot : slot + len(tags)] = tags

    def copy_block(self, source: int, target: int) -> None:
        for base in range(0, len(self.pages), self.num_blocks):
            self.pages[base + target] = list(self.pages[base + source])

    def block(self, block: int) -> list[list[int]]:
        """Return a block's pages, layer by layer."""
        return [list(self.pages[base + block]) for base in range(0, len(self.pages), self.num_blocks)]

    def put(self, block: int, pages: list[list[int]]) -> None:
        """The reverse of `block`."""
        for layer, page in enumerate(pages):
            self.pages[layer * self.num_blocks + block] = list(page)

    def content(self, block: int) -> list[list[int]]:
        """Return a block's tags layer by layer, the same however many ranks share them out."""
        return self.block(block)

    def host_block(self, slot: int) -> list[list[int]]:
        return self._host[slot]

    def fill_host(self, slot: int, pages: list[list[int]]) -> None:
        self._host[slot] = pages

    def swap_out(self, block: int, slot: int) -> None:
        self._host[slot] = self.block(block)

    def swap_in(self, slot: int, block: int) -> None:
        if slot not in self._host:
            raise Breach("H2", f"block {block} is copied from slot {slot}, which nobody filled")
        self.put(block, self._host[slot])

    def check(
        self,
        table: list[int],
        answer: Answer,
        end: int,
        reader: str,
        layers: range | None = None,
        invariant: str = "H2",
        start: int = 0,
    ) -> None:
        """Positions [0, end) of an answer are in these blocks, in every layer, or in these, as far as windows reach
        back from `start`, the first position that reads.
        """
        size, tags = self.block_size, answer.tags
        seen = [(layer, self.first_seen(layer, start)) for layer in layers or range(self.num_layers)]
        for index in range(-(-end // size)):
            begin = index * size
            length = min(size, end - begin)
            keys, state = tags[begin : begin + length], [tags[begin + length - 1]] * length
            for layer, first in seen:
                page = self.pages[layer * self.num_blocks + table[index]]
                expected = keys if layer < self.states_from else state
                hidden = max(0, first - begin)
                if hidden < length and page[hidden:length] != expected[hidden:]:
                    raise Breach(
                        invariant,
                        f"{reader} reads block {table[index]} (its block {index}, layer {layer}): "
                        f"{page[hidden:length]} instead of {expected[hidden:]}",
                    )

    def first_seen(self, layer: int, start: int) -> int:
        """Return the first position that a layer reads where tokens from `start` on are computed."""
        window = self.windows[layer] if layer < len(self.windows) else 0
        return max(0, start - window) if window else 0
