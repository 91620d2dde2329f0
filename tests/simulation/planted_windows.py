"""Planted bugs of blocks that lack what windows do not reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import Sequence as TokenSequence
from kvferry.decode import known_kv
from kvferry.decode import scheduler as decode_scheduler
from kvferry.decode.sequence_blocks import SequenceBlocks
from kvferry.kvcache import prefix_cache
from kvferry.kvcache.prefix_cache import PrefixCache
from kvferry.kvcache.thin import leading
from kvferry.prefill import scheduler
from kvferry.transfer.fetch import lending
from kvferry.transfer.fetch.fetch import Part
from kvferry.transfer.receive.reservation import Reservation

from .planting import Planted


def _whole_name(seq: TokenSequence, place: int) -> bytes:
    return seq.block_hashes[place]


def _whole_names(self: Reservation) -> list[bytes]:
    return self.block_hashes


def _whole_name_of_part(self: Part, place: int) -> bytes:
    return self.hashes[place]


def _any_form(hashes: Sequence[bytes], has: Callable[[bytes], bool], num_thin: Callable[[int], int]) -> list[bytes]:
    """Whatever is there can be gone on from."""
    return leading(hashes, has, len(hashes))


def _all_are_usable(are_thin: Sequence[bool], num_thin: Callable[[int], int]) -> int:
    return len(are_thin)


def _left_out_to_the_end(self: KVCacheSpec, num_tokens: int) -> int:
    """A handoff brings no more than the last blocks, whatever windows reach."""
    return max(0, num_tokens - 2) // self.block_size if any(self.windows) else 0


def _as_for_itself(self: PrefixCache, num_tokens: int) -> Callable[[int], int]:
    """What is shipped may be gone on from here, and is not there."""
    return self.num_thin


def _lent_in_any_form(hashes: Sequence[bytes], has: Callable[[bytes], bool], num_thin: int) -> list[bytes]:
    return leading(hashes, has, len(hashes))


class _ForgetsThin(SequenceBlocks):
    """What was saved of a sequence is whole when it is back."""

    def _count_computed(self, seq: Any, found: Any, slots: list[int]) -> None:
        super()._count_computed(seq, found, slots)
        seq.num_thin_blocks = 0


BUGS = (
    Planted(
        "thin blocks arrive under the names of whole ones",
        frozenset({"H2", "F2"}),
        ((Reservation, "names", _whole_names),),
    ),
    Planted(
        "a sequence publishes its thin blocks as whole ones",
        frozenset({"H2", "F2"}),
        tuple((module, "name_of", _whole_name) for module in (known_kv, scheduler)),
        within_seeds=400,
    ),
    Planted(
        "thin blocks are fetched under the names of whole ones",
        frozenset({"H2", "F2"}),
        ((Part, "name", _whole_name_of_part),),
        within_seeds=200,
    ),
    Planted(
        "prompts go on from whatever blocks there are", frozenset({"H2"}), ((prefix_cache, "usable", _any_form),), 200
    ),
    Planted(
        "windows reach into what a handoff leaves out",
        frozenset({"H2"}),
        ((KVCacheSpec, "num_left_out", _left_out_to_the_end),),
    ),
    Planted(
        "a prefill worker ships as whole what is thin there",
        frozenset({"H2", "F2"}),
        ((PrefixCache, "num_thin_shipped", _as_for_itself),),
        within_seeds=2000,
    ),
    Planted(
        "a thin block is lent where a whole one was asked for",
        frozenset({"H2", "F2"}),
        ((lending, "leading", _lent_in_any_form),),
        within_seeds=400,
    ),
    Planted(
        "a sequence that comes back forgets which of its blocks are thin",
        frozenset({"H2", "F2"}),
        ((decode_scheduler, "SequenceBlocks", _ForgetsThin),),
        within_seeds=2000,
    ),
    Planted(
        "a sequence that comes back goes on from whatever blocks there are",
        frozenset({"H2"}),
        ((known_kv, "num_usable", _all_are_usable),),
        within_seeds=2000,
    ),
)
