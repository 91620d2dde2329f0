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
from kvferry.kvcache.thin import ThinRule, leading, thin_rule
from kvferry.prefill import scheduler
from kvferry.transfer.fetch.fetch import Part
from kvferry.transfer.receive.reservation import Reservation

from .planting import Planted


def _whole_name(seq: TokenSequence, place: int) -> bytes:
    return seq.block_hashes[place]


def _whole_names(self: Reservation) -> list[bytes]:
    return self.block_hashes


def _whole_name_of_part(self: Part, place: int) -> bytes:
    return self.hashes[place]


def _any_form(hashes: Sequence[bytes], has: Callable[[bytes], bool], num_thin: ThinRule) -> list[bytes]:
    """Whatever is there can be gone on from."""
    return leading(hashes, has, len(hashes))


def _left_out_to_the_end(self: KVCacheSpec, num_tokens: int) -> int:
    """A handoff brings no more than the last blocks, whatever windows reach."""
    return max(0, num_tokens - 2) // self.block_size if any(self.windows) else 0


def _as_for_itself(self: PrefixCache, num_tokens: int | None = None) -> ThinRule:
    """What is shipped may be gone on from here, and is not there."""
    return thin_rule(self._spec)


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
        frozenset({"H2", "F2", "crash"}),
        ((PrefixCache, "thin_rule", _as_for_itself),),
        within_seeds=2000,
    ),
    Planted(
        "a sequence that comes back forgets which of its blocks are thin",
        frozenset({"H2", "F2"}),
        ((decode_scheduler, "SequenceBlocks", _ForgetsThin),),
        within_seeds=2000,
    ),
)
