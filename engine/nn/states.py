"""States of layers that keep one, in the pages behind those of keys and values (`models/parts/states.py`).

A step begins by saying where each row's state lies: that behind its tokens so far in the block of the last of them,
those behind its new tokens in the blocks that these lie in, one at each block's end. Rows of one token go through a
layer together; of a longer one each block's part goes by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.parts.states import StatesConfig
from .plan import StepPlan, step_rows


class ForeignStateError(RuntimeError):
    """A state is not that behind the tokens which a row says are computed: what it would yield is no answer."""


@dataclass(slots=True, frozen=True)
class Stretch:
    """Tokens of one row within one block, [first, end) of the packed line."""

    first: int
    end: int
    start: int  # tokens before them in their sequence
    source: int  # the block with the state before them, if there are any
    target: int  # the block with the state behind them


@dataclass(slots=True, frozen=True)
class Singles:
    """Rows of one token each."""

    tokens: Tensor  # [n] int64, in the packed line
    starts: Tensor  # [n] int64, tokens before each in its sequence
    sources: Tensor  # [n] int64
    targets: Tensor  # [n] int64


class LayerStates:
    """Owned by the engine's thread, and shared by all layers with states: where a step finds them and leaves them."""

    def __init__(self, config: StatesConfig) -> None:
        """`attach` gives it pages."""
        self.config = config
        self.num_tokens = 0  # of the step
        self.are_checked = True  # whether each is that of the tokens which a row says are computed
        self.singles: Singles | None = None
        self.stretches: list[Stretch] = []
        self._pieces: list[list[Tensor]] = []  # by layer: its state's parts, each [num_blocks, numbers] float32

    def attach(self, pages: Tensor) -> None:
        """Keep states in these pages, [pages of a block, num_blocks, ...], of any type."""
        rows = pages.flatten(2).view(torch.uint8)  # [pages of a block, num_blocks, page_bytes]
        self._pieces = [
            [rows[page][:, part].view(torch.float32) for page, part in self.config.pieces(index, rows.shape[2])]
            for index in range(self.config.num_layers)
        ]

    def begin(self, plan: StepPlan, block_size: int) -> None:
        """Take a step's rows."""
        singles: list[tuple[int, int, int, int]] = []
        self.stretches, token = [], 0
        for start, length, table in step_rows(plan, block_size):
            if length == 1:
                singles.append((token, start, table[max(0, start - 1) // block_size], table[start // block_size]))
            else:
                self.stretches += _stretches(token, start, length, table, block_size)
            token += length
        self.num_tokens = token
        self.singles = Singles(*torch.tensor(singles).unbind(1)) if singles else None

    def read(self, index: int, blocks: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states of the `index`th such layer behind `starts` tokens, float32, each with room of its own.

        They are the last rows [n, kernel_size - 1, num_convolved] and memories [n, *memory_shape]; zeros where there
        are no tokens. Raises ForeignStateError.
        """
        config, count = self.config, len(blocks)
        found = torch.cat([piece[blocks] for piece in self._pieces[index]], 1)
        begins = starts == 0
        if self.are_checked and not bool((begins | (found[:, 0] == starts)).all()):
            raise ForeignStateError(f"states of {found[:, 0].tolist()} tokens in place of {starts.tolist()}")
        found = torch.where(begins.unsqueeze(1), 0.0, found)  # what lies in a new block may be no number
        inputs, memory = torch.split(found[:, 1:], [config.num_inputs, math.prod(config.memory_shape)], 1)
        return (
            inputs.reshape(count, config.kernel_size - 1, config.num_convolved),
            memory.reshape(count, *config.memory_shape),
        )

    def write(self, index: int, blocks: Tensor, ends: Tensor, inputs: Tensor, memory: Tensor) -> None:
        """Leave the states behind `ends` tokens in these blocks; their parts are those that `read` returns."""
        rows = torch.cat((ends.unsqueeze(1).float(), inputs.flatten(1), memory.flatten(1)), 1)
        sizes = [piece.shape[1] for piece in self._pieces[index]]
        for piece, part in zip(self._pieces[index], torch.split(rows, sizes, 1), strict=True):
            piece[blocks] = part


def _stretches(token: int, start: int, length: int, table: Sequence[int], block_size: int) -> list[Stretch]:
    """Cut a row's new tokens at the ends of blocks."""
    end, found = start + length, []
    for first in (start, *range((start // block_size + 1) * block_size, end, block_size)):
        last = min(end, (first // block_size + 1) * block_size)
        source = table[max(0, first - 1) // block_size]
        found.append(Stretch(token + first - start, token + last - start, first, source, table[first // block_size]))
    return found
