"""A turn as a sequence of blocks: reasoning, text, and one for each call, in the order in which they were said.

Two APIs tell an answer so. A block begins, grows, and ends before the next one begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from .parts import CallPiece, Thought, TurnDelta

BlockKind = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class Block:
    """One block, as far as it has got. A call's text is its arguments; `name` and `number` are a call's."""

    index: int
    kind: BlockKind
    text: str = ""
    name: str = ""
    number: int = 0


@dataclass(slots=True, frozen=True)
class BlockEvent:
    """A change of a block; `text`: what it grew by."""

    action: Literal["begin", "grow", "end"]
    block: Block
    text: str = ""


@dataclass(slots=True)
class Blocks:
    """The blocks of one turn."""

    blocks: list[Block] = field(default_factory=list)
    _is_open: bool = False  # the last one

    def push(self, delta: TurnDelta) -> Iterator[BlockEvent]:
        for part in delta.parts:
            match part:
                case CallPiece():
                    yield from self._call(part)
                case Thought():
                    yield from self._grow("reasoning", part.text)
                case str():
                    yield from self._grow("text", part)

    def close(self) -> Iterator[BlockEvent]:
        """End the last block."""
        if self._is_open:
            self._is_open = False
            yield BlockEvent("end", self.blocks[-1])

    def _call(self, piece: CallPiece) -> Iterator[BlockEvent]:
        if piece.name is not None:
            yield from self._begin(Block(len(self.blocks), "call", name=piece.name, number=piece.index))
        if piece.arguments:
            yield self._more(piece.arguments)

    def _grow(self, kind: BlockKind, text: str) -> Iterator[BlockEvent]:
        if not self._is_open or self.blocks[-1].kind != kind:
            yield from self._begin(Block(len(self.blocks), kind))
        yield self._more(text)

    def _begin(self, block: Block) -> Iterator[BlockEvent]:
        yield from self.close()
        self.blocks.append(block)
        self._is_open = True
        yield BlockEvent("begin", block)

    def _more(self, text: str) -> BlockEvent:
        block = self.blocks[-1]
        block.text += text
        return BlockEvent("grow", block, text)
