"""States of layers that keep one, in the pages behind those of keys and values (`models/parts/states.py`).

A step begins by saying where each row's state lies: that behind its tokens so far in the block of the last of them,
those behind its new tokens in the blocks that these lie in, one at each block's end. Rows of one token go through a
layer together; of a longer one each block's part goes by itself.

Each state tells of how many tokens it is. One that is of others than its row says is *foreign*: on a CPU the step ends
there, on a GPU they are counted and looked at with the step's tokens (`engine/cuda/states.py`). What is left of such a
row is of no number of tokens, so that wherever it has gone by then, nobody goes on from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.parts.states import StatesConfig
from .plan import StepPlan, step_rows

# Rows of one token that are taken at once. More take more memory beside the cache; fewer are more launches on a GPU,
# where the states of 64 rows of a large model take longer to read than all launches of a layer.
_ROWS = 64

# Is told which of the states that were read are foreign, [n] bool, and of both how many tokens they are of.
Judge = Callable[[Tensor, Tensor, Tensor], None]
Read = Callable[[Tensor], Tensor]  # a layer's `StatefulMixer.read`


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

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.end)


@dataclass(slots=True, frozen=True)
class StepStates:
    """A step's rows as the host knows them."""

    num_tokens: int
    singles: list[tuple[int, int, int, int]]  # of rows of one token: what `Singles` has of each
    stretches: list[Stretch]


@dataclass(slots=True, frozen=True)
class Singles:
    """Rows of one token each, few enough to be taken at once."""

    tokens: Tensor | slice  # [n] int64, in the packed line
    starts: Tensor  # [n] int64, tokens before each in its sequence
    sources: Tensor  # [n] int64
    targets: Tensor  # [n] int64

    def parts(self) -> list[Singles]:
        """Cut many rows: a row's state is megabytes in large models, and is there several times while it is taken."""
        columns = (self.starts, self.sources, self.targets)
        if isinstance(self.tokens, slice):
            tokens: list[Tensor | slice] = [
                slice(first, min(first + _ROWS, self.tokens.stop)) for first in range(0, self.tokens.stop, _ROWS)
            ]
        else:
            tokens = [*torch.split(self.tokens, _ROWS)]
        cut = (torch.split(column, _ROWS) for column in columns)
        return [Singles(*part) for part in zip(tokens, *cut, strict=True)]


class LayerStates:
    """Owned by the engine's thread, and shared by all layers with states: where a step finds them and leaves them."""

    def __init__(self, config: StatesConfig) -> None:
        """`config`: this rank's. `attach` gives it pages."""
        self.config = config
        self.num_tokens = 0  # of the step
        self.are_checked = True  # whether each is that of the tokens which a row says are computed
        self.judge: Judge = refuse_foreign
        # Where it is set it yields what a layer reads of states, and is given what would have, and what that takes.
        self.around: Callable[[Read, Tensor], Tensor] | None = None
        self.singles: list[Singles] = []
        self.stretches: list[Stretch] = []
        self.pages: Tensor | None = None  # that states are kept in
        self._pieces: list[list[Tensor]] = []  # by layer: shares' parts, each [num_blocks, shares, numbers] float32

    def attach(self, pages: Tensor) -> None:
        """Keep states in these pages, [pages of a block, num_blocks, ...], of any type."""
        self.pages = pages
        config, rows = self.config, pages.flatten(2).view(torch.uint8)  # [pages of a block, num_blocks, page_bytes]
        runs = rows.view(*rows.shape[:2], -1, config.num_shares, config.run_bytes(rows.shape[2]))
        self._pieces = [
            [runs[page][:, run, :, part].view(torch.float32) for page, run, part in config.pieces(index, rows.shape[2])]
            for index in range(config.num_layers)
        ]

    def begin(self, plan: StepPlan, block_size: int) -> None:
        """Take a step's rows, where the pages are in the host's memory."""
        assert not plan.drafted, "drafts need exact steps, which are C++'s alone where layers keep states"
        step = step_states(plan, block_size)
        self.take(step, Singles(*torch.tensor(step.singles).unbind(1)) if step.singles else None)

    def take(self, step: StepStates, singles: Singles | None) -> None:
        """Take a step's rows. `singles`: those of one token, where the pages are."""
        self.num_tokens, self.stretches = step.num_tokens, step.stretches
        self.singles = [] if singles is None else singles.parts()

    def read(self, index: int, blocks: Tensor | slice, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states of the `index`th such layer behind `starts` tokens, float32, each with room of its own.

        They are the last rows [n, kernel_size - 1, num_convolved] and memories [n, *memory_shape]; zeros where there
        are no tokens. Then of how many tokens each is, [n] float32: no number of a foreign one. Raises
        ForeignStateError where `judge` does.
        """
        config, count = self.config, len(starts)
        found = torch.cat([piece[blocks] for piece in self._pieces[index]], 2)  # [n, shares, numbers]
        begins, tags = starts == 0, found[:, 0, 0]
        is_foreign = (tags != starts) & (starts > 0)
        if self.are_checked:
            self.judge(is_foreign, tags, starts)
        known = starts.float().masked_fill_(is_foreign, torch.nan)
        # What lies in a new block may be no number. Each part is moved into a piece of its own meanwhile.
        num_rows, end = config.kernel_size - 1, 1 + config.num_share_inputs
        shape = count, config.num_shares, num_rows, sum(map(config.share_of, config.row_parts))
        parts = found[:, :, 1:end], found[:, :, end:]
        inputs, memory = (part.masked_fill(begins.view(-1, 1, 1), 0.0) for part in parts)
        return _joined(config, inputs.reshape(shape)), memory.reshape(count, *config.memory_shape), known

    def write(self, index: int, blocks: Tensor | slice, ends: Tensor, inputs: Tensor, memory: Tensor) -> None:
        """Leave the states behind `ends` tokens in these blocks; their parts are those that `read` returns."""
        config, count = self.config, len(ends)
        tags = ends.view(-1, 1, 1).expand(-1, config.num_shares, -1)
        parts = _by_share(config, inputs).flatten(2), memory.reshape(count, config.num_shares, -1)
        rows = torch.cat((tags, *parts), 2)
        sizes = [piece.shape[2] for piece in self._pieces[index]]
        for piece, part in zip(self._pieces[index], torch.split(rows, sizes, 2), strict=True):
            piece[blocks] = part


def _joined(config: StatesConfig, inputs: Tensor) -> Tensor:
    """Bring the shares' rows of earlier tokens, [n, shares, kernel_size - 1, numbers], into one: their numbers of each
    part of a row stand together.
    """
    parts = torch.split(inputs, [config.share_of(part) for part in config.row_parts], 3)
    joined = [
        each[:, 0] if part.is_common else each.transpose(1, 2).flatten(2)
        for part, each in zip(config.row_parts, parts, strict=True)
    ]
    return torch.cat(joined, 2)


def _by_share(config: StatesConfig, inputs: Tensor) -> Tensor:
    """Do the reverse, of [n, kernel_size - 1, num_convolved]."""
    parts = torch.split(inputs, [part.size for part in config.row_parts], 2)
    cut = [
        each.unsqueeze(1).expand(-1, config.num_shares, -1, -1)
        if part.is_common
        else each.view(*each.shape[:2], config.num_shares, config.share_of(part)).transpose(1, 2)
        for part, each in zip(config.row_parts, parts, strict=True)
    ]
    return torch.cat(cut, 3)


def refuse_foreign(is_foreign: Tensor, tags: Tensor, starts: Tensor) -> None:
    """Raise ForeignStateError if there are foreign states, which is known on a CPU at once."""
    if bool(is_foreign.any()):
        raise ForeignStateError(f"states of {tags.tolist()} tokens in place of {starts.long().tolist()}")


def step_states(plan: StepPlan, block_size: int) -> StepStates:
    """Say where each of a step's rows finds its state, and where it leaves some."""
    singles: list[tuple[int, int, int, int]] = []
    stretches: list[Stretch] = []
    token = 0
    for start, length, table in step_rows(plan, block_size):
        if length == 1:
            singles.append((token, start, table[max(0, start - 1) // block_size], table[start // block_size]))
        else:
            stretches += _stretches(token, start, length, table, block_size)
        token += length
    return StepStates(token, singles, stretches)


def _stretches(token: int, start: int, length: int, table: Sequence[int], block_size: int) -> list[Stretch]:
    """Cut a row's new tokens at the ends of blocks."""
    end, found = start + length, []
    for first in (start, *range((start // block_size + 1) * block_size, end, block_size)):
        last = min(end, (first // block_size + 1) * block_size)
        source = table[max(0, first - 1) // block_size]
        found.append(Stretch(token + first - start, token + last - start, first, source, table[first // block_size]))
    return found
