"""A full block is whole, or thin: then it lacks the pages of layers whose windows no longer reach it, and its states.

    a prompt's blocks   | thin  thin  thin  thin | whole  whole | next token
                          what every layer reads     a layer with a window reads these, a state is the last one's

Thin ones are what a handoff or a fetch has left out of a long prompt. Both forms of a block are kept like any block, in
every tier, each under a name of its own: the whole one's is the block's hash, the thin one's its `twin`. A prompt that
is computed on from blocks that are found needs whole ones where windows still reach, and one that is handed over from
there where they are shipped whole: `thin_rule` says which these are. Workers and routers find by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..common.kv_spec import KVCacheSpec
from ..common.request import Sequence as TokenSequence

# Of so many leading blocks that are found, how many may be thin.
ThinRule = Callable[[int], int]
_FLIPPED = bytes(255 - value for value in range(256))


def twin(name: bytes) -> bytes:
    """Return the name of a block's other form: the thin one's of the whole one's, and the reverse."""
    return name.translate(_FLIPPED)


def thin_rule(spec: KVCacheSpec | None, num_tokens: int | None = None) -> ThinRule:
    """Return of how many leading blocks thin ones will do. `num_tokens`: of a prompt that is handed over from here, so
    that what is shipped whole is whole here; None: it is computed on here. `spec`: None: no layer has a window.
    """
    if spec is None or not any(spec.windows):
        return lambda num_blocks: 0
    size, may_be_thin = spec.block_size, spec.num_thin_blocks
    if num_tokens is None:
        return lambda num_blocks: may_be_thin(num_blocks * size)
    left_out = spec.num_left_out(num_tokens)
    return lambda num_blocks: min(may_be_thin(num_blocks * size), left_out)


def name_at(hashes: Sequence[bytes], place: int, num_thin: int) -> bytes:
    """Return the name by which a prompt's block is published, the first `num_thin` of which are thin."""
    return twin(hashes[place]) if place < num_thin else hashes[place]


def name_of(seq: TokenSequence, place: int) -> bytes:
    """Return the name by which a sequence's full block is published."""
    return name_at(seq.block_hashes, place, seq.num_thin_blocks)


def forms(hashes: Sequence[bytes], place: int, num_thin: int) -> list[bytes]:
    """Return the names of a prompt's block in the forms that will do, the whole one first; none behind its last."""
    whole = list(hashes[place : place + 1])
    return whole + [twin(block_hash) for block_hash in whole if place < num_thin]


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


def usable(hashes: Sequence[bytes], has: Callable[[bytes], bool], num_thin: ThinRule) -> list[bytes]:
    """Return the names of the longest prefix that is there and can be gone on from."""
    most = num_thin(len(hashes))
    names = leading(hashes, has, most)
    if not most:
        return names
    thin = [place for place, name in enumerate(names) if name != hashes[place]]
    return names[: num_usable(len(names), thin, num_thin)]


def num_usable(num_blocks: int, thin: Sequence[int], num_thin: ThinRule) -> int:
    """Count the leading ones, of so many blocks that are there, that can be gone on from. `thin`: places, ascending."""
    for place in reversed(thin):
        if place < num_thin(num_blocks):
            break
        num_blocks = place
    return num_blocks


def num_thin_of(names: Sequence[bytes], hashes: Sequence[bytes]) -> int:
    """Count the leading blocks up to the last thin one."""
    return next((place + 1 for place in reversed(range(len(names))) if names[place] != hashes[place]), 0)
