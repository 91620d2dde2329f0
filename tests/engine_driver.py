"""Runs sequences through an Engine as a scheduler would, with the plainest block allocation there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from kvferry.common.adapter import HeldAdapter
from kvferry.common.batch import Batch, BatchRow, StepOutput
from kvferry.common.config import EngineConfig
from kvferry.common.request import RequestId, SampledToken, SamplingParams, Sequence
from kvferry.engine.engine import Engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def engine_config(model_dir: Path, **fields: object) -> EngineConfig:
    return EngineConfig.model_validate(
        {"model_dir": model_dir, "served_model_name": "tiny", "num_threads": 1, "device": "cpu"} | fields
    )


def make_engine(model_dir: Path, num_blocks: int = 128, **fields: object) -> Engine:
    return Engine(engine_config(model_dir, **fields), num_blocks=num_blocks)


class Driver:
    """Blocks are handed out in a scattered order, so that nothing works by pages being adjacent."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._free = sorted(range(engine.num_blocks), key=lambda block: block * 37 % 101)
        self.outputs: list[StepOutput] = []

    def add(
        self, prompt: Iterable[int], sampling: SamplingParams = GREEDY, *, name: str = "r", choice: int = 0
    ) -> Sequence:
        ids = list(prompt)
        return Sequence(RequestId(name), 0, choice, ids, len(ids), sampling)

    def grow(self, seq: Sequence, num_tokens: int) -> None:
        """Give `seq` the blocks that its first `num_tokens` tokens need."""
        while len(seq.block_table) * self.engine.spec.block_size < num_tokens:
            seq.block_table.append(self._free.pop())

    def release(self, seq: Sequence) -> None:
        """Take back a sequence's blocks."""
        self._free += seq.block_table
        seq.block_table = []

    def step_fork(self, first: Sequence) -> int:
        """One step of a sequence that goes on from all but the last token of `first`: its first block is shared, its
        second one copied. The token that it yields.
        """
        end = first.num_tokens - 1
        fork = self.add(first.token_ids[:end])
        fork.token_ids.append(first.token_ids[end])
        fork.num_computed_tokens = end
        fork.block_table = [first.block_table[0]]
        self.grow(fork, end + 1)
        copies = [(first.block_table[1], fork.block_table[1])]
        return self.engine.step(Batch([BatchRow(fork, 1)], copies)).rows[0].runs[0][0].token_id

    def step(
        self, rows: list[tuple[Sequence, int]], on_layer: Callable[[int], None] | None = None
    ) -> list[tuple[SampledToken, ...]]:
        """One engine step over (sequence, tokens to feed); appends the first choice's token where a row samples."""
        batch = Batch([BatchRow(seq, count) for seq, count in sorted(rows, key=lambda row: row[1] != 1)])
        for row in batch.rows:
            self.grow(row.seq, row.end)
        output = self.engine.step(batch, on_layer)
        self.outputs.append(output)
        by_seq: dict[int, tuple[SampledToken, ...]] = {}
        for row, result in zip(batch.rows, output.rows, strict=True):
            row.seq.num_computed_tokens += row.num_scheduled_tokens
            if result.runs:
                row.seq.token_ids.append(result.runs[0][0].token_id)
            by_seq[id(row.seq)] = tuple(run[0] for run in result.runs)
        return [by_seq[id(seq)] for seq, _ in rows]

    def verify(self, rows: list[tuple[Sequence, list[int]]]) -> list[tuple[SampledToken, ...]]:
        """Run one step over (sequence, draft), those without one first; append what is accepted, and return it."""
        ordered = sorted(rows, key=lambda row: bool(row[1]))
        batch = Batch([BatchRow(seq, 1 + len(draft), tuple(draft)) for seq, draft in ordered])
        for row in batch.rows:
            self.grow(row.seq, row.end)
        output = self.engine.step(batch)
        self.outputs.append(output)
        runs: dict[int, tuple[SampledToken, ...]] = {}
        for row, result in zip(batch.rows, output.rows, strict=True):
            [run] = result.runs
            row.seq.num_computed_tokens += len(run)
            row.seq.token_ids += [token.token_id for token in run]
            runs[id(row.seq)] = run
        return [runs[id(seq)] for seq, _ in rows]

    def generate(self, seqs: list[Sequence], *, chunk: int = 10**9) -> list[list[int]]:
        """All of them together, `chunk` prompt tokens a step each, until each has its max_tokens."""
        self.sample(seqs, chunk=chunk)
        return [seq.output_token_ids for seq in seqs]

    def sample(self, seqs: list[Sequence], *, chunk: int = 10**9) -> list[list[SampledToken]]:
        """Do as `generate`, and return what is known of each token."""
        tokens: dict[int, list[SampledToken]] = {id(seq): [] for seq in seqs}
        while running := [seq for seq in seqs if seq.num_output_tokens < seq.sampling.max_tokens]:
            new = self.step([(seq, min(chunk, seq.num_uncomputed_tokens)) for seq in running])
            for seq, of_row in zip(running, new, strict=True):
                tokens[id(seq)] += of_row
        return [tokens[id(seq)] for seq in seqs]


def each_of(names: Iterable[str]) -> object:
    """Make a fixture that is one of these names after the other: what is made of one serves all tests of a module."""

    @pytest.fixture(scope="module", params=names)
    def each(request: pytest.FixtureRequest) -> str:
        name: str = request.param
        return name

    return each


def prompts(lengths: list[int], vocab_size: int = 512) -> list[list[int]]:
    """Prompts of these lengths that have no two tokens in a row in common."""
    return [[(31 * i * i + 17 * i + 101 * n) % vocab_size for i in range(length)] for n, length in enumerate(lengths)]


def prompt_logprobs(engine: Engine, prompt: list[int], adapter: HeldAdapter | None = None) -> Tensor:
    """Return the log-probabilities of a prompt's tokens behind the first, computed in one step."""
    driver, sampling = Driver(engine), msgspec.structs.replace(GREEDY, max_tokens=1, prompt_logprobs=0)
    driver.grow(seq := driver.add(prompt, sampling), len(prompt))
    seq.held_adapter = adapter
    [row] = engine.step(Batch([BatchRow(seq, len(prompt))])).rows
    return torch.tensor([token.logprob for token in row.prompt_logprobs])


def assert_told_of_pages(engine: Engine) -> None:
    """Every page of a block is told of once in a step of many tokens, and in one of a token, in their order."""
    driver, told = Driver(engine), list[int]()
    seq = driver.add(prompts([40])[0])
    for count in (40, 1):
        told.clear()
        driver.step([(seq, count)], told.append)
        assert told == list(range(engine.spec.num_layers)) and len(told) > 1
