"""A draft model's tokens by the graphs of decode steps, one behind another, without waiting for any of them.

    first    all tokens of a row that the draft model has not computed; the last one's logits say the next token
    further  that token, taken on the device, one place further: its place and its pages are known beforehand

So the host prepares a token's step while the one before it is computed, and reads all tokens at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ...common.adapter import NO_ADAPTER
from ...common.batch import BatchRow
from .pipeline import DecodeDevice
from .rows import BlockTables, DecodeRow, fill, padded_size, put_token_ids


class GraphDrafts:
    """Owned by the engine's thread. Its device runs the draft model, and nothing else uses it."""

    def __init__(self, device: DecodeDevice, *, num_choices: int, block_size: int, spare_block: int) -> None:
        """`num_choices`: tokens that both models have; others are fed as token 0."""
        self._device = device
        self._num_choices = num_choices
        self._block_size = block_size
        self._spare_block = spare_block
        self._tables = BlockTables()

    def propose(self, rows: Sequence[BatchRow]) -> list[list[int]] | None:
        """Return as many tokens as each row's draft has places. None: no graph has room for what comes first."""
        spans = [range(row.draft_model_span[0], row.start + row.num_known_tokens) for row in rows]
        if padded_size(self._device.sizes, sum(map(len, spans))) is None:
            return None
        going_on = list(range(len(rows)))
        found, said_of = [self._first(rows, spans)], [*going_on]  # by depth: [rows that go on, 1], and which these are
        for depth in range(1, max(len(row.draft) for row in rows)):
            sources = [place for place, index in enumerate(going_on) if depth < len(rows[index].draft)]
            going_on = [going_on[place] for place in sources]
            size, num_pages = self._prepare([self._row(rows[i], spans[i].stop + depth - 1) for i in going_on])
            self._device.feed(found[-1], sources)
            self._device.upload(size, num_pages)
            found.append(self._best(self._device.launch(size, len(going_on))))
            said_of += going_on
        drafts: list[list[int]] = [[] for _ in rows]
        for index, token in zip(said_of, torch.cat(found)[:, 0].tolist(), strict=True):
            drafts[index].append(token)
        return drafts

    def _first(self, rows: Sequence[BatchRow], spans: Sequence[range]) -> Tensor:
        """Queue what is known; return the likeliest token behind each row, [rows, 1]."""
        places = [(row, place) for row, span in zip(rows, spans, strict=True) for place in span]
        size, num_pages = self._prepare([self._row(row, place) for row, place in places])
        known = [row.seq.token_ids[place] for row, place in places]
        put_token_ids(self._device.arrays, [token if token < self._num_choices else 0 for token in known], size)
        self._device.upload_token_ids(size)
        self._device.upload(size, num_pages)
        logits = self._device.launch(size, len(places))
        ends = [end - 1 for end in accumulate(map(len, spans))]
        return self._best(logits if len(ends) == len(places) else logits[ends])

    def _row(self, row: BatchRow, position: int) -> DecodeRow:
        """The draft model has no adapters."""
        return DecodeRow.of(row.seq, position, self._block_size)._replace(adapter=NO_ADAPTER)

    def _prepare(self, rows: list[DecodeRow]) -> tuple[int, int]:
        """Write rows into the arrays, all but their tokens. Returns the padded size, and the number of pages."""
        size = padded_size(self._device.sizes, len(rows))
        assert size is not None, "more rows than in the step before"
        self._device.reuse_arrays()
        num_pages, missing = fill(
            self._device.arrays, rows, size, self._tables, block_size=self._block_size, spare_block=self._spare_block
        )
        assert not missing, "a block table is shorter than its sequence"
        return size, num_pages

    def _best(self, logits: Tensor) -> Tensor:
        return logits[:, : self._num_choices].argmax(-1, keepdim=True)
