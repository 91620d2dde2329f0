"""A worker measures itself before it serves: a few steps of prompts and of answers, short and long.

Blocks of the pool are borrowed and given back unpublished. Each kind of step runs once for warmth, then is measured.
Where time runs out, or something does not fit, it is left out: the router goes on learning from real steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import structlog

from ..common.batch import Batch, BatchRow
from ..common.request import BlockId, RequestId, SamplingParams, Sequence
from ..kvcache.blocks import BlockPool
from ..wire.workers import StepSample
from .engine import Engine
from .samples import MAX_SAMPLES, step_sample

_CONTEXT_TOKENS = 1024  # of what is called long
_NUM_MEASURED = 2  # runs of each kind of step, after one for warmth
_LONG_S = 0.05  # a step that takes longer is measured once, and at once if it takes what was expected
_SLACK = 1.5  # times what was expected: within it a long first run counts as warm
_POOL_SHARE = 0.5  # of the pool at most: a small one is not for long contexts
_MAX_CHUNK_TOKENS = 2048  # of the longest chunk that is measured

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Probe:
    """A step: a chunk of a prompt behind a context, and rows of answers with a context each."""

    chunk: int = 0
    chunk_context: int = 0
    rows: int = 0
    row_context: int = 0

    @property
    def num_tokens(self) -> int:
        return self.chunk + self.rows


def probes(max_num_batched_tokens: int, max_num_seqs: int) -> list[Probe]:
    """List the steps to measure, those that say most first: the last ones are left out where time runs out."""
    short, long = 32, _CONTEXT_TOKENS
    largest = min(max_num_batched_tokens, _MAX_CHUNK_TOKENS)
    wanted = [
        Probe(rows=1, row_context=short),
        Probe(chunk=64),
        Probe(rows=4, row_context=long // 2),
        Probe(rows=16, row_context=short),
        Probe(chunk=16),
        Probe(chunk=64, chunk_context=long),
        Probe(chunk=64, rows=4, row_context=long // 2),
        Probe(chunk=256),
        Probe(rows=16, row_context=long // 8),
        Probe(rows=1, row_context=long),
        Probe(rows=4, row_context=short),
        Probe(chunk=256, chunk_context=long),
        Probe(chunk=largest),
    ]
    fitting = [probe for probe in wanted if probe.num_tokens <= max_num_batched_tokens and probe.rows <= max_num_seqs]
    return list(dict.fromkeys(fitting))


def calibrate(engine: Engine, pool: BlockPool, limit_s: float) -> tuple[StepSample, ...]:
    """Measure steps and return them in the order in which they ran. The pool is as before.

    `limit_s`: of the whole; a step that would probably take longer than what is left is not begun. A longer
    calibration gives the router a better first guess and makes every start longer; real steps teach it anyway.
    """
    began = time.perf_counter()
    config = engine.config
    bench = _Bench(engine, pool)
    samples: list[StepSample] = []
    for probe in probes(config.max_num_batched_tokens, config.max_num_seqs):
        left_s = limit_s - (time.perf_counter() - began)
        if bench.fits(probe) and bench.expected_s(probe) < left_s:
            with engine.measuring():
                samples += bench.measure(probe)
    bench.close()
    log.info("calibrated", steps=len(samples), seconds=round(time.perf_counter() - began, 3))
    return tuple(samples[:MAX_SAMPLES])


class _Bench:
    """Borrowed blocks, and rows over them."""

    def __init__(self, engine: Engine, pool: BlockPool) -> None:
        self._engine = engine
        self._pool = pool
        self._blocks: list[BlockId] = []
        self._token_s = 0.0  # of the last chunk, by the token
        self._vocab_size = engine.model_config.vocab_size

    def _num_blocks(self, probe: Probe) -> int:
        size = self._pool.block_size
        rows = probe.rows * -(-(probe.row_context + _NUM_MEASURED + 1) // size)
        return rows + -(-(probe.chunk_context + probe.chunk) // size)

    def fits(self, probe: Probe) -> bool:
        longest = max(probe.chunk_context + probe.chunk, probe.row_context + _NUM_MEASURED + 1)
        return longest < self._engine.max_model_len and self._num_blocks(probe) <= _POOL_SHARE * self._pool.num_blocks

    def expected_s(self, probe: Probe) -> float:
        """Return how long one run will take; 0: nothing is known."""
        return self._token_s * probe.chunk

    def measure(self, probe: Probe) -> Iterator[StepSample]:
        """Run the step and yield what was measured: no first run, unless it is long and not longer than expected."""
        self._borrow(self._num_blocks(probe))
        rows = self._answers(probe)
        for run in range(_NUM_MEASURED + 1):
            batch = Batch([*rows, *self._chunk(probe)])
            output = self._engine.step(batch)
            is_long = output.step_s > _LONG_S
            if run > 0 or (is_long and output.step_s < _SLACK * self.expected_s(probe)):
                yield step_sample(batch, output.step_s)
                if is_long:
                    break
            for row in rows:  # any token will do, and a model whose logits are not finite yields none
                row.seq.num_computed_tokens += 1
                row.seq.token_ids.append(row.seq.num_tokens % self._vocab_size)
        if probe.chunk:
            self._token_s = output.step_s / probe.chunk

    def _borrow(self, count: int) -> None:
        """Borrow more blocks and write to them: memory that was never written is read faster than any other."""
        fresh = self._pool.allocate(max(0, count - len(self._blocks)))
        if not self._engine.kv_pages.is_cuda:
            for block in fresh:
                self._engine.kv_pages[:, block].fill_(0.5)
        self._blocks += fresh

    def _answers(self, probe: Probe) -> list[BatchRow]:
        each = -(-(probe.row_context + _NUM_MEASURED + 1) // self._pool.block_size)
        tables = [self._blocks[row * each : (row + 1) * each] for row in range(probe.rows)]
        rows = [BatchRow(self._sequence(probe.row_context + 1, probe.row_context, table), 1) for table in tables]
        for row in rows:
            row.draft_span = (0, 0)  # a draft model need not keep up with answers
        return rows

    def _chunk(self, probe: Probe) -> list[BatchRow]:
        if not probe.chunk:
            return []
        num_blocks = -(-(probe.chunk_context + probe.chunk) // self._pool.block_size)
        table = self._blocks[self._num_blocks(probe) - num_blocks : self._num_blocks(probe)]
        sequence = self._sequence(probe.chunk_context + probe.chunk, probe.chunk_context, table)
        return [BatchRow(sequence, probe.chunk)]

    def _sequence(self, num_tokens: int, num_computed: int, table: list[BlockId]) -> Sequence:
        return Sequence(
            request_id=RequestId("calibration"),
            attempt=0,
            choice=0,
            token_ids=[index % self._vocab_size for index in range(num_tokens)],
            num_prompt_tokens=num_tokens,
            sampling=SamplingParams(temperature=0.0, ignore_eos=True),
            num_computed_tokens=num_computed,
            block_table=list(table),
        )

    def close(self) -> None:
        self._pool.free(self._blocks)
