"""The KV memory of a simulated worker: pages hold tags in place of numbers.

A page is a list of tags, one for each token slot (see `oracle.py`), or several such runs where ranks share out the
heads (`heads.py`). A layer that keeps states has in all slots of a page the tag of the last token that was computed
there: what a row goes on from is that of the token before its first one, and of no other. Whatever reaches a page that
it should not, a late write, a copy too early, a block with two owners, is a wrong tag for the next row that reads it.
"""

from __future__ import annotations

from kvferry.kvcache.blocks import BlockPool
from kvferry.kvcache.frame_pool import FramePool
from kvferry.kvcache.frames import Frames

from .breach import Breach
from .oracle import Answer

_NOTHING = -1


class Memory:
    """The KV allocation of one life of a worker, or of one of its ranks. Thin blocks have others' pages of layers with
    windows, where these share memory (`kvcache/frames.py`).
    """

    __slots__ = (
        "_host",
        "block_size",
        "frames",
        "num_blocks",
        "num_layers",
        "pages",
        "sections",
        "states_from",
        "windows",
    )

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        sections: tuple[int, ...] = (0,),
        *,
        states_from: int | None = None,
        windows: tuple[int, ...] = (),
        frames: Frames | None = None,
    ) -> None:
        """`sections`: what each run of `block_size` tags of a page is, as the bytes lie. `states_from`: the first layer
        that keeps states; None: there is none. `windows`: as `KVCacheSpec` has them.
        """
        self.windows = windows
        self.frames = frames or Frames(1, tuple(range(num_layers)), num_layers)
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
        self.pages[self.page(layer, block)][slot : slot + len(tags)] = tags

    def page(self, layer: int, block: int) -> int:
        if block >= self.num_blocks and self.is_windowed(layer):
            raise Breach("H2", f"layer {layer} of block {block}, which is thin")
        return self.frames.page(layer, block, self.num_blocks)

    def owner_of(self, page: int, pool: BlockPool) -> int:
        """Return whose page this is, or would be."""
        place, frame = divmod(page, self.num_blocks)
        if not isinstance(pool, FramePool) or not self.is_windowed(self.frames.places.index(place)):
            return frame
        share = place // self.frames.num_full
        is_share = pool.is_thin(frame) and share < pool.num_shares
        return frame + share * self.frames.step(self.num_blocks) if is_share else frame

    def is_windowed(self, layer: int) -> bool:
        return layer < len(self.windows) and self.windows[layer] > 0

    def copy_block(self, source: int, target: int) -> None:
        is_thin, target = target < 0, max(target, ~target)
        for layer in range(self.num_layers):
            if is_thin and self.is_windowed(layer):
                continue
            self.pages[self.page(layer, target)] = list(self.pages[self.page(layer, source)])

    def block(self, block: int, *, is_thin: bool = False) -> list[list[int]]:
        """Return a block's pages, layer by layer: without what a thin one lacks."""
        is_thin = is_thin or block >= self.num_blocks
        return [
            [_NOTHING] * self.page_len
            if is_thin and self.is_windowed(layer)
            else list(self.pages[self.page(layer, block)])
            for layer in range(self.num_layers)
        ]

    def put(self, block: int, pages: list[list[int]], *, is_thin: bool = False) -> None:
        """The reverse of `block`."""
        for layer, page in enumerate(pages):
            if not (is_thin and self.is_windowed(layer)):
                self.pages[self.page(layer, block)] = list(page)

    def content(self, block: int) -> list[list[int]]:
        """Return a block's tags layer by layer, the same however many ranks share them out."""
        return self.block(block)

    def host_block(self, slot: int) -> list[list[int]]:
        return self._host[slot]

    def fill_host(self, slot: int, pages: list[list[int]]) -> None:
        self._host[slot] = pages

    def swap_out(self, block: int, slot: int) -> None:
        self._host[slot] = self.block(max(block, ~block), is_thin=block < 0)

    def swap_in(self, slot: int, block: int) -> None:
        if slot not in self._host:
            raise Breach("H2", f"block {block} is copied from slot {slot}, which nobody filled")
        self.put(max(block, ~block), self._host[slot], is_thin=block < 0)

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
                expected = keys if layer < self.states_from else state
                hidden = max(0, first - begin)
                if hidden >= length:
                    continue
                page = self.pages[self.page(layer, table[index])]
                if page[hidden:length] != expected[hidden:]:
                    raise Breach(
                        invariant,
                        f"{reader} reads block {table[index]} (its block {index}, layer {layer}): "
                        f"{page[hidden:length]} instead of {expected[hidden:]}",
                    )

    def first_seen(self, layer: int, start: int) -> int:
        """Return the first position that a layer reads where tokens from `start` on are computed."""
        window = self.windows[layer] if layer < len(self.windows) else 0
        return max(0, start - window) if window else 0
