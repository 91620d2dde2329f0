"""One-token steps as arrays, and the next step foretold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.batch import Batch, BatchRow
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.engine.cuda.rows import (
    BlockTables,
    Forecast,
    StepArrays,
    fill,
    foretell,
    graph_sizes,
    padded_size,
    put_token_ids,
    rows_of,
)

BLOCK, SPARE, LONGEST = 4, 99, 64


def _arrays(max_rows: int = 8) -> StepArrays:
    return StepArrays(
        input_ids=np.full(max_rows, -1, np.int64),
        positions=np.full(max_rows, -1, np.int32),
        paged_kv_indptr=np.full(max_rows + 1, -1, np.int32),
        paged_kv_last_page_len=np.full(max_rows, -1, np.int32),
        paged_kv_indices=np.full(max_rows * LONGEST // BLOCK, -1, np.int32),
        adapters=np.full(max_rows, -2, np.int32),
    )


def _decoding(num_tokens: int, blocks: list[int], *, num_prompt: int = 1, **sampling: int) -> Sequence:
    """A sequence whose last token has no KV yet; token i is 10 + i."""
    params = SamplingParams(**({"max_tokens": 100} | sampling))  # type: ignore[arg-type]
    seq = Sequence(RequestId("r"), 0, 0, [10 + i for i in range(num_tokens)], num_prompt, params)
    seq.num_computed_tokens = num_tokens - 1
    seq.block_table = list(blocks)
    return seq


def _batch(*seqs: Sequence) -> Batch:
    return Batch([BatchRow(seq, 1) for seq in seqs])


def _fill(arrays: StepArrays, batch: Batch, size: int) -> int:
    rows = rows_of(batch, BLOCK)
    assert rows is not None
    num_pages, missing = fill(arrays, rows, size, BlockTables(), block_size=BLOCK, spare_block=SPARE)
    assert not missing
    put_token_ids(arrays, [token for row in batch.rows for token in row.token_ids], size)
    return num_pages


def _advance(batch: Batch, token_ids: list[int]) -> None:
    """What a scheduler does after a step, but for growth."""
    for row, token_id in zip(batch.rows, token_ids, strict=True):
        row.seq.num_computed_tokens += 1
        row.seq.token_ids.append(token_id)


# --- sizes ------------------------------------------------------------------------------------------------------


def test_sizes_grow_by_eight_and_end_with_the_most_rows() -> None:
    assert graph_sizes(1) == (1,)
    assert graph_sizes(3) == (1, 2, 3)
    assert graph_sizes(24) == (1, 2, 4, 8, 16, 24)
    assert graph_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert graph_sizes(300)[-4:] == (256, 272, 288, 300)


def test_drafts_have_sizes_of_their_own_up_to_a_bound() -> None:
    assert graph_sizes(2, 5) == (1, 2, 4, 8, 12)
    assert graph_sizes(64, 5)[-2:] == (248, 256)
    assert graph_sizes(300, 5) == graph_sizes(300)


@given(max_rows=st.integers(1, 600), data=st.data())
def test_every_batch_has_a_size_with_room_and_none_of_the_smaller_ones_has(max_rows: int, data: st.DataObject) -> None:
    sizes = graph_sizes(max_rows)
    assert list(sizes) == sorted(set(sizes)) and sizes[-1] == max_rows
    num_rows = data.draw(st.integers(1, max_rows))
    size = padded_size(sizes, num_rows)
    assert size == min(s for s in sizes if s >= num_rows)
    assert padded_size(sizes, max_rows + 1) is None


# --- arrays -----------------------------------------------------------------------------------------------------


def test_rows_and_padding_stand_as_the_kernels_read_them() -> None:
    arrays = _arrays()
    batch = _batch(_decoding(6, [7, 3]), _decoding(4, [5]), _decoding(9, [8, 2, 6]))
    assert _fill(arrays, batch, size=5) == 8
    assert arrays.paged_kv_indptr[:6].tolist() == [0, 2, 3, 6, 7, 8]
    assert arrays.paged_kv_indices[:8].tolist() == [7, 3, 5, 8, 2, 6, SPARE, SPARE]
    assert arrays.paged_kv_last_page_len[:5].tolist() == [2, 4, 1, 1, 1]
    assert arrays.positions[:5].tolist() == [5, 3, 8, 0, 0]
    assert arrays.input_ids[:5].tolist() == [15, 13, 18, 0, 0]


def test_a_draft_is_as_many_rows_of_the_same_pages() -> None:
    arrays, verified = _arrays(), _decoding(7, [8, 2, 6])
    batch = Batch([BatchRow(_decoding(6, [7, 3]), 1), BatchRow(verified, 4, (91, 92, 93))])
    rows = rows_of(batch, BLOCK, 30)
    assert rows is not None
    num_pages, missing = fill(arrays, rows, 6, BlockTables(), block_size=BLOCK, spare_block=SPARE)
    put_token_ids(arrays, [token for row in batch.rows for token in row.token_ids], 6)
    assert (num_pages, missing) == (13, [])
    assert arrays.paged_kv_indptr[:7].tolist() == [0, 2, 4, 6, 9, 12, 13]
    assert arrays.paged_kv_indices[:13].tolist() == [7, 3, 8, 2, 8, 2, 8, 2, 6, 8, 2, 6, SPARE]
    assert arrays.paged_kv_last_page_len[:5].tolist() == [2, 3, 4, 1, 2]
    assert arrays.positions[:6].tolist() == [5, 6, 7, 8, 9, 0]
    assert arrays.input_ids[:6].tolist() == [15, 16, 91, 92, 93, 0]
    assert foretell(batch, BLOCK, LONGEST) is None


def test_a_draft_that_would_read_much_again_is_left_to_others() -> None:
    batch = Batch([BatchRow(_decoding(7, [8, 2, 6]), 4, (91, 92, 93))])  # 3 tokens read up to 10 each
    assert rows_of(batch, BLOCK, 30) is not None
    assert rows_of(batch, BLOCK, 29) is None
    assert rows_of(_batch(_decoding(6, [7, 3])), BLOCK, 0) is not None


def test_a_table_longer_than_needed_is_cut() -> None:
    arrays = _arrays()
    assert _fill(arrays, _batch(_decoding(4, [5, 6, 7])), size=1) == 1
    assert arrays.paged_kv_indices[0] == 5


def test_batches_of_another_kind_are_refused() -> None:
    chunk = _decoding(6, [1, 2])
    assert rows_of(Batch([BatchRow(chunk, 2)]), BLOCK) is None
    reporting = _decoding(6, [1, 2], num_prompt=8, prompt_logprobs=1)
    assert rows_of(_batch(reporting), BLOCK) is None
    reporting.num_prompt_tokens = 3
    assert rows_of(_batch(reporting), BLOCK) is not None


def test_tables_follow_growth_and_replacement() -> None:
    tables, table = BlockTables(), [4, 2]
    assert tables.array(table, 2).tolist() == [4, 2]
    table += [9, 1]
    assert tables.array(table, 3).tolist() == [4, 2, 9]
    assert tables.array(table, 9).tolist() == [4, 2, 9, 1]
    assert tables.array([7], 1).tolist() == [7]


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=60))
def test_tables_are_never_stale(steps: list[tuple[int, bool]]) -> None:
    tables, known = BlockTables(), [[0] for _ in range(6)]
    for count, (index, replaced) in enumerate(steps, 1):
        if replaced:
            known[index] = [count]
        else:
            known[index] += [count]
        tables.keep(known)
        for table in known:
            assert tables.array(table, len(table)).tolist() == table


# --- the forecast -----------------------------------------------------------------------------------------------


def _foretold(batch: Batch, arrays: StepArrays, size: int = 4) -> Forecast:
    forecast = foretell(batch, BLOCK, LONGEST)
    assert forecast is not None
    _, forecast.missing = fill(arrays, forecast.rows, size, BlockTables(), block_size=BLOCK, spare_block=SPARE)
    return forecast


def test_the_next_step_is_prepared_as_it_will_be() -> None:
    """Also where a row begins a new block, whose id comes with the batch."""
    first, second, third = _decoding(6, [7, 3]), _decoding(4, [5]), _decoding(9, [8, 2, 6])
    batch, prepared = _batch(first, second, third), _arrays()
    forecast = _foretold(batch, prepared)
    assert [index for index, _ in forecast.missing] == [3]
    _advance(batch, [50, 51, 52])
    second.block_table += [1]
    following = _batch(first, second, third)
    assert forecast.fits(following, [50, 51, 52])
    forecast.put_new_pages(prepared)
    direct = _arrays()
    num_pages = _fill(direct, following, size=4)
    assert num_pages == 8
    assert prepared.paged_kv_indices[:8].tolist() == direct.paged_kv_indices[:8].tolist()
    for name in ("positions", "paged_kv_indptr", "paged_kv_last_page_len"):
        assert getattr(prepared, name)[:4].tolist() == getattr(direct, name)[:4].tolist(), name


def test_rows_that_end_by_length_are_left_out() -> None:
    ending = _decoding(6, [7, 3], num_prompt=2, max_tokens=5)
    longest = _decoding(LONGEST - 1, list(range(16)))
    staying = _decoding(4, [5, 1])
    forecast = foretell(_batch(ending, longest, staying), BLOCK, LONGEST)
    assert forecast is not None
    assert [row.seq for row in forecast.rows] == [staying] and forecast.sources == [2]
    assert foretell(_batch(ending), BLOCK, LONGEST) is None


def test_nothing_is_foretold_of_rows_that_do_not_sample_or_fork() -> None:
    silent, forking = _decoding(6, [7, 3]), _decoding(6, [7, 3])
    silent.samples = False
    forking.pending_choices = (0, 1)
    assert foretell(_batch(silent), BLOCK, LONGEST) is None
    assert foretell(_batch(forking), BLOCK, LONGEST) is None


@pytest.mark.parametrize(
    "change",
    ["leaves", "joins", "order", "chunk", "token", "preempted", "no block", "copies", "position"],
)
def test_a_batch_that_differs_does_not_fit(change: str) -> None:
    first, second = _decoding(6, [7, 3]), _decoding(8, [5, 4])
    batch = _batch(first, second)
    forecast = _foretold(batch, _arrays())
    _advance(batch, [50, 51])
    if change != "no block":
        second.block_table += [1]
    assert forecast.fits(_batch(first, second), [50, 51]) == (change != "no block")
    following = _batch(first, second)
    sampled = [50, 51]
    match change:
        case "leaves":
            following = _batch(first)
        case "joins":
            following = _batch(first, second, _decoding(3, [8]))
        case "order":
            following = _batch(second, first)
        case "chunk":
            following.rows[1].num_scheduled_tokens = 2
        case "token":
            sampled = [50, 52]
        case "preempted":
            second.block_table = list(second.block_table)
        case "copies":
            following.block_copies.append((1, 2))
        case "position":
            first.num_computed_tokens -= 1
    assert not forecast.fits(following, sampled)
