"""Planted bugs of thin blocks that share the memory of whole ones."""

from __future__ import annotations

from kvferry.common.request import BlockId
from kvferry.decode.sequence_blocks import SequenceBlocks
from kvferry.kvcache.frame_pool import FramePool

from .planting import Planted


def _as_if_whole(self: FramePool, block_id: BlockId) -> int:
    return block_id


def _one_more_thin(self: FramePool, count: int, num_thin: int = 0) -> list[BlockId]:
    """The first block that must be whole shares a frame."""
    return _allocate(self, count, min(count, num_thin + 1) if num_thin else 0)


def _still_found(self: FramePool, *, is_whole: bool = True) -> BlockId:
    """What other shares of a frame held can be found when a whole block has it."""
    if self._free:
        return self._free.pop()
    block = next(iter(self._resting or self._cached))
    frame = self._frame(block)
    self._lose(block, is_told=False)
    self._cut.pop(frame, None)
    return frame


def _all_outgoing(self: SequenceBlocks) -> list[BlockId]:
    return [block for block in reversed(self._outgoing) if self._pool.ref_count(block) == 1]


def _moves_nothing(self: SequenceBlocks, source: BlockId, target: BlockId) -> None:
    """What is made thin is left behind in its old block."""
    self._pool.free([source])


def _holds_nothing(self: FramePool, block: BlockId) -> None:
    """A frame is available as long as its last share is."""
    if self._frame(block) not in self._cut or self._num_held[self._frame(block)] == 0:
        _hold(self, block)


_allocate, _hold = FramePool.allocate, FramePool._hold
BUGS = (
    Planted(
        "copies of thin blocks take along what others have beside them",
        frozenset({"H2", "F2"}),
        ((FramePool, "in_copies", _as_if_whole),),
        within_seeds=400,
    ),
    Planted(
        "a whole block gets a thin one's memory",
        frozenset({"H1", "H2", "F2"}),
        ((FramePool, "allocate", _one_more_thin),),
        200,
    ),
    Planted(
        "what shared a frame is found when a whole block has it",
        frozenset({"H2", "F2", "I1"}),
        ((FramePool, "_take_frame", _still_found),),
        within_seeds=400,
    ),
    Planted(
        "a thin block that is copied out is filled as a whole one",
        frozenset({"H2", "F2", "I1"}),
        ((SequenceBlocks, "_reusable", _all_outgoing),),
        within_seeds=2000,
    ),
    Planted(
        "what is made thin stays behind",
        frozenset({"H2", "F2"}),
        ((SequenceBlocks, "move", _moves_nothing),),
        within_seeds=1000,
    ),
    Planted(
        "a frame's second share is not counted as held", frozenset({"I1"}), ((FramePool, "_hold", _holds_nothing),), 200
    ),
)
