"""A full block is whole, or thin: then it lacks the pages of layers whose windows no longer reach it, and its states.

    a prompt's blocks   | thin  thin  thin  thin | whole  whole | next token
                          what every layer reads     a layer with a window reads these, a state is the last one's

Thin ones are what a handoff or a fetch has left out of a long prompt. Both forms of a block are kept like any block, in
every tier, each under a name of its own: the whole one's is the block's hash, the thin one's its `twin`. A prompt that
is computed on from blocks that are found needs whole ones where windows still reach; which these are is said by
`KVCacheSpec.num_thin_blocks`. Routers tell blocks apart by the first half of their names, which twins share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..common.request import Sequence as TokenSequence

_FLIPPED = bytes(255 - value for value in range(256))


def twin(name: bytes) -> bytes:
    """Return the name of a block's other form: the thin one's of the whole one's, and the reverse."""
    return name[:8] + name[8:].translate(_FLIPPED)


def name_of(seq: TokenSequence, place: int) -> bytes:
    """Return the name by which a sequence's full block is published."""
    block_hash = seq.block_hashes[place]
    return twin(block_hash) if place < seq.num_thin_blocks else block_hash


def leading(hashes: Sequence[bytes], has: Callable[[bytes], bool], num_thin: int) -> list[bytes]:
    """Return the names of the longest prefix that is there, if of the first `num_thin` blocks thin ones will do."""
    names = []
    for place, block_hash in enumerate(hashes):
        if has(block_hash):
            names.append(block_hash)
        elif place < num_thin and has(thin := twin(block_hash)):
            names.append(thin)
        else:
            break
    return names


def usable(hashes: Sequence[bytes], has: Callable[[bytes], bool], num_thin: Callable[[int], int]) -> list[bytes]:
    """Return the names of the longest prefix that is there and can be gone on from.

    `num_thin`: of how many leading blocks thin ones will do, behind so many blocks.
    """
    most = num_thin(len(hashes))
    names = leading(hashes, has, most)
    if not most:
        return names
    are_thin = [name != block_hash for name, block_hash in zip(names, hashes, strict=False)]
    return names[: num_usable(are_thin, num_thin)]


def num_usable(are_thin: Sequence[bool], num_thin: Callable[[int], int]) -> int:
    """Count the leading blocks, of those that are there, that can be gone on from. `num_thin` is that of `usable`."""
    end = len(are_thin)
    for place in reversed(range(end)):
        if are_thin[place]:
            if place < num_thin(end):
                break
            end = place
    return end


def num_thin_of(names: Sequence[bytes], hashes: Sequence[bytes]) -> int:
    """Count the leading blocks up to the last thin one."""
    return next((place + 1 for place in reversed(range(len(names))) if names[place] != hashes[place]), 0)
