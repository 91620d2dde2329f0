"""States of layers on CUDA (`engine/nn/states.py`): where a step finds them, without the host waiting for the device.

    any batch    the host knows each row's blocks: indices of rows of one token go up with the step's other arrays,
                 longer rows are cut at the ends of blocks, and a block is named by a number that a launch carries
    pieces       rows of one token alone, whose uploaded indices are copied to where the pieces read them
    decode       rows of one token in a graph, which works its indices out of the page index in its own buffers:

        target = the row's last page               source = target, or the page before it where a token begins one

Padding rows begin a sequence in the spare block, so they read nothing, and write where nobody reads.

Whether a state is foreign is known on the device alone. There they are counted, the count goes to the host with the
step's tokens, and `check` ends the step in place of any answer. Others may have been sent pages of such a step by then:
the states in them are of no number of tokens, so whoever goes on from one counts it as foreign again.

Not run on a card: shown on an emulated device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..nn.attention.page_index import PageIndex
from ..nn.plan import StepPlan
from ..nn.states import ForeignStateError, LayerStates, Read, Singles, StepStates, Stretch, step_states

_COLUMNS = 4  # of a row of one token: its place in the line, start, source, target


class DeviceStates:
    """Owned by the engine's thread, like the states that it leads through a step."""

    def __init__(self, states: LayerStates, device: torch.device, block_size: int) -> None:
        self._states = states
        self._device = device
        self._block_size = block_size
        assert states.pages is not None, "no pages are attached"
        self._spare_block = states.pages.shape[1] - 1
        self._rows = torch.empty(0, 0, dtype=torch.int64, device=device)  # of pieces: starts, sources, targets
        self._num_foreign = torch.zeros(1, dtype=torch.int64, device=device)  # of the step
        self._reported = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        states.judge = self._count
        self.are_rows = False  # the step has rows of one token alone

    def _count(self, is_foreign: Tensor, tags: Tensor, starts: Tensor) -> None:
        self._num_foreign += is_foreign.sum()

    # --- any batch --------------------------------------------------------------------------------------------

    def step(self, plan: StepPlan) -> tuple[StepStates, Tensor]:
        """Return a step's rows, and what is to be uploaded of them, int32."""
        step = step_states(plan, self._block_size)
        return step, torch.tensor(step.singles, dtype=torch.int32).flatten()

    def begin(self, step: StepStates, uploaded: Tensor) -> None:
        """Take a step's rows as `step` returned them; what was to be uploaded is on the device."""
        self._num_foreign.zero_()
        self.are_rows = not step.stretches
        columns = uploaded.long().view(-1, _COLUMNS).unbind(1)
        self._states.take(step, Singles(*columns) if step.singles else None)

    def begin_smallest(self) -> None:
        """Take `page_index.smallest_step`: a row of one token and one of two, both in the spare block."""
        block = self._spare_block
        step = StepStates(3, [(0, 0, block, block)], [Stretch(1, 3, 0, block, block)])
        self.begin(step, torch.tensor(step.singles, dtype=torch.int32, device=self._device).flatten())

    # --- pieces -----------------------------------------------------------------------------------------------

    @contextmanager
    def apart(self, around: Callable[[Read, Tensor], Tensor]) -> Iterator[None]:
        """Begin a step of padding alone, of whose layers `around` yields what they read of states."""
        self._states.take(StepStates(0, [], []), None)
        self._states.around = around
        try:
            yield
        finally:
            self._states.around = None

    def begin_padding(self, num_rows: int, max_rows: int) -> None:
        """Begin a step of so many rows of padding. What is captured of it reads what `put_rows` has put there."""
        if not len(self._rows):
            self._rows = torch.zeros(_COLUMNS - 1, max_rows, dtype=torch.int64, device=self._device)
        self._num_foreign.zero_()
        self._pad(0, num_rows)
        singles = Singles(slice(0, num_rows), *self._rows[:, :num_rows])
        self._states.take(StepStates(num_rows, [], []), singles)

    def put_rows(self, num_rows: int) -> None:
        """Put the begun step's rows where pieces read them, padding behind them."""
        end = 0
        for part in self._states.singles:
            first, end = end, end + len(part.starts)
            torch.stack((part.starts, part.sources, part.targets), out=self._rows[:, first:end])
        self._pad(end, num_rows)

    def _pad(self, first: int, end: int) -> None:
        self._rows[:1, first:end] = 0
        self._rows[1:, first:end] = self._spare_block

    # --- decode -----------------------------------------------------------------------------------------------

    def begin_rows(self, index: PageIndex) -> None:
        """Take as many rows of one token as `index` has. May be captured: a replay reads what is there by then."""
        self._num_foreign.zero_()
        starts, ends = index.positions.long(), index.paged_kv_indptr[1:].long()
        opens = (starts > 0) & (starts % self._block_size == 0)  # the token is the first one of its block
        targets = index.paged_kv_indices[ends - 1].long()
        sources = index.paged_kv_indices[ends - 1 - opens.long()].long()
        singles = Singles(slice(0, len(starts)), starts, sources, targets)
        self._states.take(StepStates(len(starts), [], []), singles)

    # --- the end of a step ------------------------------------------------------------------------------------

    def report(self) -> None:
        """Queue the count's way to the host, behind the step's layers."""
        self._reported.copy_(self._num_foreign, non_blocking=True)

    def check(self) -> None:
        """Raise ForeignStateError if the step read foreign states. The caller has waited for what it queued."""
        count = int(self._reported)
        if count and self._states.are_checked:
            raise ForeignStateError(f"{count} states are not those behind the tokens that rows say are computed")
