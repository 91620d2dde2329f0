"""Decode steps and prompts on a bare engine, and times in turns: no scheduler, and blocks handed out by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from kvferry.common.batch import Batch, BatchRow
from kvferry.common.request import RequestId, SampledToken, SamplingParams, Sequence

if TYPE_CHECKING:
    from kvferry.engine.engine import Engine  # which imports torch


def num_blocks_of(cases: Iterable[tuple[int, int]], block_size: int) -> int:
    """Count the blocks that an engine needs for the largest of these (rows, tokens)."""
    return max(rows * (tokens // block_size + 1) for rows, tokens in cases)


def least_ms(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Run all in every round, in an order that turns; return the least that each told, made of seconds. The first round
    warms and does not count.
    """
    names, times = list(runs), {name: list[float]() for name in runs}
    for number in range(-1, rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            took_s = runs[name]()
            if number >= 0:
                times[name].append(took_s)
    return {name: min(seconds) * 1e3 for name, seconds in times.items()}


def timed(run: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Return `run` as what tells how long it took by the clock (s)."""

    def timed_run() -> float:
        began = clock()
        run()
        return clock() - began

    return timed_run


def cpu_timed(run: Callable[[], None]) -> Callable[[], float]:
    """Return `run` as what tells its CPU time, over all threads (s)."""
    return timed(run, time.process_time)


def decoding(engine: Engine, num_rows: int, context: int) -> Callable[[], None]:
    """Return one step of `num_rows` rows, each at `context` tokens; the same one each time."""
    rows = [sequence(engine, row, context) for row in range(num_rows)]
    for seq in rows:
        seq.num_computed_tokens = context - 1

    def run() -> None:
        engine.step(Batch([BatchRow(seq, 1) for seq in rows]))

    return run


def prefilling(engine: Engine, tokens: int, context: int = 0) -> Callable[[], None]:
    """Return a whole prompt in a worker's chunks, or what follows the `context` first tokens of one."""

    def run() -> None:
        seq = sequence(engine, 0, context + tokens)
        seq.num_computed_tokens = context
        feed(engine, seq, engine.config.max_num_batched_tokens)

    return run


def feed(engine: Engine, seq: Sequence, chunk: int) -> list[SampledToken]:
    """Compute a prompt; return its tokens as the model judges them, where that is asked for."""
    judged: list[SampledToken] = []
    while seq.num_uncomputed_tokens:
        count = min(chunk, seq.num_uncomputed_tokens)
        judged += engine.step(Batch([BatchRow(seq, count)])).rows[0].prompt_logprobs
        seq.num_computed_tokens += count
    return judged


def sequence(engine: Engine, row: int, tokens: int, *, prompt_logprobs: int | None = None) -> Sequence:
    """Make a sequence of `tokens` tokens in blocks of its own."""
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, prompt_logprobs=prompt_logprobs)
    vocab_size = engine.model_config.vocab_size
    ids = [(31 * i * i + 17 * i + 101 * row) % vocab_size for i in range(tokens)]
    seq = Sequence(RequestId(f"r{row}"), 0, 0, ids, tokens, sampling)
    num_blocks = engine.spec.num_blocks_for(tokens)
    seq.block_table = list(range(row * num_blocks, (row + 1) * num_blocks))
    return seq
