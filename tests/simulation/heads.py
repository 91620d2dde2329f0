"""Pages of workers whose ranks share out the heads of the KV: each rank has its heads' keys, then their values.

    spec of two heads      one rank   K0 K1 V0 V1          two ranks   K0 V0 | K1 V1
                           four ranks K0 V0 | K0 V0 | K1 V1 | K1 V1

A run of a page is a *section*: one head's keys, or its values. It holds the tags of the tokens plus the section's
number, so that what lands in another head's place, or values in that of keys, is as wrong as another token's.
"""

from __future__ import annotations

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.kvcache.frames import frames_of

from .breach import Breach
from .memory import Memory
from .oracle import Answer


def sections_of(rank: int, num_ranks: int, spec: KVCacheSpec) -> tuple[int, ...]:
    """Return a rank's sections, by their numbers over the whole model."""
    heads = heads_of(rank, num_ranks, spec.num_kv_heads)
    return tuple(part * spec.num_kv_heads + head for part in range(2) for head in heads)


def heads_of(rank: int, num_ranks: int, num_heads: int) -> range:
    """Return a rank's heads: an even share of them, or the one that it has as its neighbours do."""
    first = rank * num_heads // num_ranks
    return range(first, max(first + 1, (rank + 1) * num_heads // num_ranks))


class HeadsMemory(Memory):
    """The allocations of all ranks of a worker, which compute the same step each with its heads.

    What `Memory` says of pages is said of all ranks here: a block's pages are those of rank 0, then those of rank 1.
    """

    __slots__ = ("_expected", "ranks")

    def __init__(self, spec: KVCacheSpec, num_blocks: int, num_ranks: int) -> None:
        # It has no pages but those of its ranks.
        windows, frames = spec.windows, frames_of(spec)
        super().__init__(spec.num_layers, 0, spec.block_size, windows=windows, frames=frames)
        self.num_blocks = num_blocks
        self.ranks = [
            Memory(
                spec.num_layers,
                num_blocks,
                spec.block_size,
                sections_of(rank, num_ranks, spec),
                windows=windows,
                frames=frames,
            )
            for rank in range(num_ranks)
        ]
        self._expected: dict[tuple[int, ...], list[list[int]]] = {}  # by a block's tags: the page of each rank

    def copy_block(self, source: int, target: int) -> None:
        for memory in self.ranks:
            memory.copy_block(source, target)

    def block(self, block: int, *, is_thin: bool = False) -> list[list[int]]:
        return [page for memory in self.ranks for page in memory.block(block, is_thin=is_thin)]

    def put(self, block: int, pages: list[list[int]], *, is_thin: bool = False) -> None:
        for rank, memory in enumerate(self.ranks):
            memory.put(block, pages[rank * self.num_layers : (rank + 1) * self.num_layers], is_thin=is_thin)

    def content(self, block: int) -> list[list[int]]:
        size = self.block_size
        layers: list[dict[int, list[int]]] = [{} for _ in range(self.num_layers)]
        for memory in self.ranks:
            for found, page in zip(layers, memory.block(block), strict=True):
                for index, section in enumerate(memory.sections):
                    found[section] = page[index * size : (index + 1) * size]
        return [[tag for _, tags in sorted(found.items()) for tag in tags] for found in layers]

    def write(self, layer: int, block: int, slot: int, tags: list[int]) -> None:
        size, index, count = self.block_size, self.page(layer, block), len(tags)
        for memory in self.ranks:
            page = memory.pages[index]
            for start, section in enumerate(memory.sections):
                first = start * size + slot
                page[first : first + count] = [tag + section for tag in tags]

    def _pages_for(self, tags: list[int]) -> list[list[int]]:
        """Return what each rank's page must be where a block holds the tokens with these tags."""
        key = tuple(tags)
        found = self._expected.get(key)
        if found is None:
            found = [[tag + section for section in memory.sections for tag in tags] for memory in self.ranks]
            self._expected[key] = found
        return found

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
        """Positions [0, end) of an answer are in these blocks, for every head, in every layer, or in these: as far as
        windows reach back from `start`.
        """
        size, tags = self.block_size, answer.tags
        seen = [(layer, self.first_seen(layer, start)) for layer in layers or range(self.num_layers)]
        for index in range(-(-end // size)):
            expected = tags[index * size : min((index + 1) * size, end)]
            length, block = len(expected), table[index]
            for rank, (memory, wanted) in enumerate(zip(self.ranks, self._pages_for(expected), strict=True)):
                for layer, first in seen:
                    hidden = max(0, first - index * size)
                    if hidden >= length:
                        continue
                    page = _cut(memory.pages[self.page(layer, block)], size, hidden, length)
                    right = _cut(wanted, length, hidden, length)
                    if page != right:
                        where = f"its block {index}, layer {layer}, rank {rank}"
                        text = f"{reader} reads block {block} ({where}): {page} instead of {right}"
                        raise Breach(invariant, text)


def _cut(page: list[int], size: int, hidden: int, end: int) -> list[int]:
    """Return the slots [hidden, end) of each of a page's runs of `size` tags."""
    if hidden == 0 and end == size:
        return page
    return [tag for first in range(0, len(page), size) for tag in page[first + hidden : first + end]]
