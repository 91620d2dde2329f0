"""A step of answers' tokens alone, as arrays of a padded size, and the step after it foretold.

    Batch --rows_of--> [DecodeRow] --fill--> StepArrays        what the device reads
    Batch --foretell-> Forecast --fill--> StepArrays           the same for the next step, while this one runs
                       Forecast.fits(next batch)?  put_new_pages: block ids that were not known yet

A row that verifies a draft becomes as many rows, one for each token, of the same pages: keys and values of all are
written before any is attended to, so each sees those before it. That takes the graphs that there are, and reads its
pages as often as it has tokens; where that is much, the batch is no such step (`MAX_READ_AGAIN_BYTES`).

The forecast: every row that goes on feeds the token that it has just sampled, one place further. How many pages that
takes is known; which block a row gets where it begins a new one is not, so that page is filled in when the batch has
come. Rows that end at a length known beforehand are left out. What cannot be foretold (an end by a token, a new
sequence, a preemption) makes the forecast not fit, and the step is prepared anew.

Block tables are compared by identity: the scheduler appends to a table or replaces it and never changes an entry.
Pure: numpy and no device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...common.adapter import NO_ADAPTER
from ...common.batch import Batch, BatchRow, RowKind
from ...common.request import Sequence

# Of keys and values that a step reads more than once. Where it is more, attention of chunks reads them once, launched
# layer by layer: that takes the host a millisecond or two, in which an H100 reads so much. Not measured on a card. Too
# high: drafts of long contexts make steps longer, so that fewer are tried; too low: those of short ones do.
MAX_READ_AGAIN_BYTES = 4 << 30
_MAX_VERIFIED = 256  # tokens of a step for which there are graphs because of drafts

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


def graph_sizes(max_num_seqs: int, num_drafts: int = 0) -> tuple[int, ...]:
    """List padded numbers of rows: 1, 2, 4, then every eighth; past 256 every sixteenth.

    The last is `max_num_seqs` or, with drafts of so many tokens, what they make of it, up to 256.
    """
    max_num_rows = max(max_num_seqs, min(_MAX_VERIFIED, max_num_seqs * (1 + num_drafts)))
    sizes = [size for size in (1, 2, 4, *range(8, 257, 8)) if size < max_num_rows]
    sizes += range(272, max_num_rows, 16)
    return (*sizes, max_num_rows)


def padded_size(sizes: Seq[int], num_rows: int) -> int | None:
    """Return the smallest of `sizes` with room for the rows; None if there is none."""
    index = bisect_left(sizes, num_rows)
    return sizes[index] if index < len(sizes) else None


class DecodeRow(NamedTuple):
    """One token: it stands at `position` and is attended to together with those before it, in `num_pages` pages."""

    seq: Sequence
    table: list[int]  # the sequence's own, as it was
    position: int
    num_pages: int
    adapter: int = NO_ADAPTER  # its slot

    @classmethod
    def of(cls, seq: Sequence, position: int, block_size: int) -> DecodeRow:
        return cls(seq, seq.block_table, position, position // block_size + 1, seq.adapter_slot)


@dataclass(slots=True, frozen=True)
class StepArrays:
    """A step as the device reads it, in host memory of fixed size. Padding rows feed token 0 into the spare block."""

    input_ids: Int64  # [max rows]
    positions: Int32  # [max rows]
    paged_kv_indptr: Int32  # [max rows + 1]
    paged_kv_last_page_len: Int32  # [max rows]
    paged_kv_indices: Int32  # [max rows * pages of the longest sequence]
    adapters: Int32  # [max rows] slots


class BlockTables:
    """Block tables as arrays, extended by what was appended to them: a step adds a block to few rows."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[list[int], Int32, int]] = {}  # by id(table): table, array, entries in use

    def array(self, table: list[int], num_pages: int) -> Int32:
        """Return the first `num_pages` entries, or as many as there are."""
        wanted = min(num_pages, len(table))
        _, array, known = self._known.get(id(table), (table, np.empty(0, np.int32), 0))
        if known < wanted:
            if len(array) < wanted:
                array = np.concatenate((array[:known], np.empty(2 * wanted - known, np.int32)))
            array[known:wanted] = table[known:wanted]
            self._known[id(table)] = (table, array, wanted)
        return array[:wanted]

    def keep(self, tables: Seq[list[int]]) -> None:
        """Forget all others, once they are many."""
        if len(self._known) > 2 * len(tables) + 16:
            kept = {id(table) for table in tables}
            self._known = {key: entry for key, entry in self._known.items() if key in kept}


def rows_of(batch: Batch, block_size: int, max_read_again: int = 0) -> list[DecodeRow] | None:
    """Return the batch as rows of one token; None if it is not one, or if more than next tokens is asked of it.

    `max_read_again`: tokens whose keys and values rows that verify may read besides.
    """
    rows = []
    for row in batch.rows:
        if row.kind is RowKind.CHUNK or _wants_prompt_logprobs(row):
            return None
        max_read_again -= row.end * len(row.draft)
        rows += [DecodeRow.of(row.seq, position, block_size) for position in range(row.start, row.end)]
    return rows if max_read_again >= 0 or len(rows) == len(batch.rows) else None


def _wants_prompt_logprobs(row: BatchRow) -> bool:
    return row.seq.sampling.prompt_logprobs is not None and row.start < row.seq.num_prompt_tokens - 1


def fill(
    arrays: StepArrays, rows: Seq[DecodeRow], size: int, tables: BlockTables, *, block_size: int, spare_block: int
) -> tuple[int, list[tuple[int, DecodeRow]]]:
    """Write `rows`, padded to `size`, into the arrays, all but the token ids.

    Returns the number of pages, and the pages that no block is known for yet: where they stand, and whose they are.
    """
    count, end = len(rows), 0
    pages, indptr, missing = arrays.paged_kv_indices, arrays.paged_kv_indptr, []
    for index, row in enumerate(rows):
        table = tables.array(row.table, row.num_pages)
        pages[end : end + len(table)] = table
        indptr[index] = end
        end += row.num_pages
        if len(table) < row.num_pages:
            pages[end - 1] = spare_block
            missing.append((end - 1, row))
    pages[end : end + size - count] = spare_block
    indptr[count : size + 1] = np.arange(end, end + size - count + 1)
    arrays.positions[:count] = [row.position for row in rows]
    arrays.positions[count:size] = 0
    arrays.adapters[:count] = [row.adapter for row in rows]
    arrays.adapters[count:size] = NO_ADAPTER
    np.remainder(arrays.positions[:size], block_size, out=arrays.paged_kv_last_page_len[:size])
    arrays.paged_kv_last_page_len[:size] += 1
    tables.keep([row.table for row in rows])
    return end + size - count, missing


def put_token_ids(arrays: StepArrays, token_ids: Seq[int], size: int) -> None:
    arrays.input_ids[: len(token_ids)] = token_ids
    arrays.input_ids[len(token_ids) : size] = 0


# --- the next step --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Forecast:
    """The next batch as far as it can be known while the one before it is computed."""

    rows: list[DecodeRow]
    sources: list[int]  # the row of the step before that samples each row's token
    missing: list[tuple[int, DecodeRow]]  # filled in by whoever calls `fill`

    def fits(self, batch: Batch, sampled: Seq[int]) -> bool:
        """Tell whether the batch is the one foretold. `sampled`: the token ids that the step before yielded, by row."""
        if batch.block_copies or batch.swap_out or batch.swap_in or len(batch.rows) != len(self.rows):
            return False
        for row, wanted, source in zip(batch.rows, self.rows, self.sources, strict=True):
            seq, position = row.seq, wanted.position
            if (
                seq is not wanted.seq
                or row.kind is not RowKind.DECODE
                or seq.num_computed_tokens != position
                or seq.block_table is not wanted.table
                or seq.adapter_slot != wanted.adapter
                or len(wanted.table) < wanted.num_pages
                or seq.token_ids[position] != sampled[source]
            ):
                return False
        return True

    def put_new_pages(self, arrays: StepArrays) -> None:
        """Fill in the blocks that have been allocated meanwhile."""
        for index, row in self.missing:
            arrays.paged_kv_indices[index] = row.table[row.num_pages - 1]


def foretell(batch: Batch, block_size: int, max_model_len: int) -> Forecast | None:
    """Return what follows a step of one-token rows; None if nothing can be said, as of how much of a draft is right."""
    rows, sources = [], []
    for index, row in enumerate(batch.rows):
        seq, position = row.seq, row.start + 1
        if not row.samples or len(row.choices) > 1 or row.draft:
            return None
        if _ends_with_next_token(seq, max_model_len):
            continue
        rows.append(DecodeRow.of(seq, position, block_size))
        sources.append(index)
    return Forecast(rows, sources, []) if rows else None


def _ends_with_next_token(seq: Sequence, max_model_len: int) -> bool:
    return seq.num_output_tokens + 1 >= seq.sampling.max_tokens or seq.num_tokens + 1 >= max_model_len
