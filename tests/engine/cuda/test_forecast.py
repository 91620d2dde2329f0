"""The forecast of decode steps against the scheduler that makes them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.decode.scheduler import DecodeScheduler
from kvferry.engine.cuda.rows import BlockTables, Forecast, StepArrays, fill, foretell, rows_of
from kvferry.kvcache.blocks import BlockPool

BLOCK, SPARE, LONGEST = 4, 999, 200
SPEC = KVCacheSpec(model="m", num_layers=1, num_kv_heads=1, head_dim=8, block_size=BLOCK, dtype="float32")


def _arrays() -> StepArrays:
    def zeros(size: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.zeros(size, np.int32)

    return StepArrays(np.zeros(32, np.int64), zeros(32), zeros(33), zeros(32), zeros(32 * LONGEST // BLOCK), zeros(32))


def _adopted(scheduler: DecodeScheduler, pool: BlockPool, arrival: int, num_tokens: int, max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens)
    seq = Sequence(RequestId(f"r{arrival}"), 0, 0, list(range(num_tokens)), num_tokens, params, arrival=arrival)
    seq.block_table = pool.allocate(-(-num_tokens // BLOCK))
    seq.num_computed_tokens = num_tokens
    seq.num_published_blocks = num_tokens // BLOCK
    seq.token_ids.append(7)
    scheduler.adopt(seq)


class _Loop:
    """Steps of a decode worker, each compared with what was foretold of it."""

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, BLOCK, enable_prefix_caching=False)
        self.scheduler = DecodeScheduler(self.pool, SPEC, max_num_batched_tokens=64, max_num_seqs=32)
        self.num_steps = self.num_foretold = 0
        self._forecast: Forecast | None = None
        self._prepared, self._tables = _arrays(), BlockTables()
        self._sampled: list[int] = []

    def step(self, token_id: int) -> None:
        batch = self.scheduler.schedule()
        if batch is None:
            return
        forecast, self._forecast = self._forecast, None
        rows = rows_of(batch, BLOCK)
        if forecast is not None and rows is not None and forecast.fits(batch, self._sampled):
            self.num_foretold += 1
            forecast.put_new_pages(self._prepared)
            direct = _arrays()
            num_pages, missing = fill(direct, rows, 32, BlockTables(), block_size=BLOCK, spare_block=SPARE)
            assert not missing
            assert np.array_equal(self._prepared.paged_kv_indices[:num_pages], direct.paged_kv_indices[:num_pages])
            for name in ("positions", "paged_kv_indptr", "paged_kv_last_page_len"):
                assert np.array_equal(getattr(self._prepared, name), getattr(direct, name)), name
        self.num_steps += 1
        if rows is not None and (following := foretell(batch, BLOCK, LONGEST)) is not None:
            self._forecast = following
            _, following.missing = fill(
                self._prepared, following.rows, 32, self._tables, block_size=BLOCK, spare_block=SPARE
            )
        self._sampled = [token_id] * len(batch.rows)
        for row, alive in zip(batch.rows, self.scheduler.complete(batch), strict=True):
            if alive and row.seq.num_uncomputed_tokens == 0:
                row.seq.token_ids.append(token_id)
                if row.seq.num_output_tokens >= row.seq.sampling.max_tokens:
                    self.scheduler.remove(row.seq)


def test_steps_of_a_steady_batch_are_all_foretold() -> None:
    loop = _Loop(num_blocks=1000)
    for arrival in range(20):
        _adopted(loop.scheduler, loop.pool, arrival, 5 + 3 * arrival, max_tokens=20 + arrival)
    for _ in range(45):
        loop.step(9)
    assert loop.num_steps == 38 and loop.num_foretold == 37
    loop.pool.check()
    assert loop.pool.num_free_blocks == 1000


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=12),
    num_blocks=st.integers(20, 60),
)
def test_a_forecast_that_fits_is_right_whatever_comes_and_is_preempted(
    arrivals: list[tuple[int, int, int]], num_blocks: int
) -> None:
    loop = _Loop(num_blocks)
    waiting = sorted(arrivals)
    for step in range(120):
        while waiting and waiting[0][0] <= step and loop.pool.num_free_blocks > waiting[0][1] // BLOCK + 1:
            _, num_tokens, max_tokens = waiting.pop(0)
            _adopted(loop.scheduler, loop.pool, len(waiting), num_tokens, max_tokens + 1)
        loop.step(9 + step % 3)
        loop.pool.check()
