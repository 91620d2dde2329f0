"""Decode steps that are prepared ahead: the same tokens as the engine's, whatever comes and goes.

The device is a CPU that does everything as late as a GPU might: what is uploaded leaves the host's arrays only when
it must.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kvferry.common.batch import Batch, StepOutput
from kvferry.common.request import SamplingParams
from kvferry.engine.cuda.kernels import TorchKernels
from kvferry.engine.cuda.pipeline import DecodeRunner
from kvferry.engine.cuda.rows import StepArrays, graph_sizes
from kvferry.engine.cuda.sampling import DeviceSampler
from kvferry.engine.engine import Engine
from kvferry.engine.nn.attention.base import AttentionMetadata
from kvferry.engine.nn.attention.paged_torch import CPUAttention

from ...checkpoints import put_nan, write_checkpoint
from ...engine_driver import GREEDY, Driver, engine_config, make_engine, prompts

MAX_ROWS, NUM_BLOCKS, SPARE = 8, 128, 127
RANDOM = SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.3, top_p=0.95, seed=7, logprobs=2)
LONG = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


class LateDevice:
    """Implements `DecodeDevice` with the engine's own decoder; padding rows are computed like any others."""

    def __init__(self, engine: Engine) -> None:
        model, pages = engine.model_config, engine.kv_pages
        self.sizes = graph_sizes(MAX_ROWS)
        self.arrays = _arrays(MAX_ROWS * -(-model.max_model_len // pages.shape[4]))
        self.sizes_run: list[tuple[int, int]] = []
        self._decoder = engine._decoder
        self._attention = CPUAttention(pages, model.num_qo_heads, model.sliding_windows)
        self._block_size = pages.shape[4]
        self._on_device = _arrays(len(self.arrays.paged_kv_indices))
        self._pending: list[Callable[[], None]] = []

    def reuse_arrays(self) -> None:
        for copy in self._pending:
            copy()
        self._pending.clear()

    def _copy_later(self, name: str, count: int) -> None:
        def copy() -> None:
            getattr(self._on_device, name)[:count] = getattr(self.arrays, name)[:count]

        self._pending.append(copy)

    def upload(self, size: int, num_pages: int) -> None:
        self.upload_pages(num_pages)
        self._copy_later("positions", size)
        self._copy_later("paged_kv_indptr", size + 1)
        self._copy_later("paged_kv_last_page_len", size)

    def upload_pages(self, num_pages: int) -> None:
        self._copy_later("paged_kv_indices", num_pages)

    def upload_token_ids(self, size: int) -> None:
        self._copy_later("input_ids", size)

    def feed(self, token_ids: Tensor, sources: Sequence[int]) -> None:
        self._pending.append(lambda: self._feed(token_ids, sources))

    def _feed(self, token_ids: Tensor, sources: Sequence[int]) -> None:
        self._on_device.input_ids[: len(sources)] = token_ids[list(sources), 0].numpy()

    def launch(self, size: int, num_rows: int) -> Tensor:
        self.reuse_arrays()
        self.sizes_run.append((size, num_rows))
        device = self._on_device
        self._attention.plan(self._metadata(size))
        ids = torch.from_numpy(device.input_ids[:size].copy())
        positions = torch.from_numpy(device.positions[:size].astype(np.int64))
        hidden = self._decoder.forward(ids, positions, self._attention)
        return self._decoder.logits(hidden)[:num_rows]

    def _metadata(self, size: int) -> AttentionMetadata:
        device, block = self._on_device, self._block_size
        indptr, last = device.paged_kv_indptr[: size + 1], device.paged_kv_last_page_len[:size]
        pages = device.paged_kv_indices[: indptr[-1]]
        slots = pages[indptr[1:] - 1].astype(np.int64) * block + device.positions[:size] % block
        return AttentionMetadata(
            num_decode_rows=size,
            qo_indptr=torch.arange(size + 1, dtype=torch.int32),
            paged_kv_indptr=torch.from_numpy(indptr.copy()),
            paged_kv_indices=torch.from_numpy(pages.copy()),
            paged_kv_last_page_len=torch.from_numpy(last.copy()),
            kv_lens=tuple((np.diff(indptr) * block - block + last).tolist()),
            slot_mapping=torch.from_numpy(slots),
        )

    def wait(self, queue_more: Callable[[], None]) -> None:
        queue_more()


def _arrays(num_pages: int) -> StepArrays:
    return StepArrays(
        input_ids=np.zeros(MAX_ROWS, np.int64),
        positions=np.zeros(MAX_ROWS, np.int32),
        paged_kv_indptr=np.zeros(MAX_ROWS + 1, np.int32),
        paged_kv_last_page_len=np.zeros(MAX_ROWS, np.int32),
        paged_kv_indices=np.zeros(num_pages, np.int32),
    )


class LookingAhead(Engine):
    """An engine whose decode steps take the runner. Its pool has one block less than its pages."""

    def __init__(self, model_dir: Path) -> None:
        super().__init__(engine_config(model_dir), num_blocks=NUM_BLOCKS)
        self.device = LateDevice(self)
        sampler = DeviceSampler(torch.device("cpu"), TorchKernels(), self.model_config.eos_token_ids)
        self.runner = DecodeRunner(
            self.device, sampler, self.kv_pages, spare_block=SPARE, max_model_len=self.model_config.max_model_len
        )
        self.num_blocks = SPARE

    @torch.inference_mode()
    def step(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepOutput:
        rows = self.runner.step(batch, on_layer)
        return super().step(batch, on_layer) if rows is None else StepOutput(rows, 0.0, batch.num_tokens)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), tokenizer=False)


def _generate(engine: Engine, sampling: list[SamplingParams]) -> list[list[int]]:
    """Prompts of unlike lengths, so that their answers begin new blocks at different steps."""
    driver = Driver(engine)
    lengths = [5, 16, 31, 33, 64, 14, 40, 9][: len(sampling)]
    return driver.generate([driver.add(p, s) for p, s in zip(prompts(lengths), sampling, strict=True)])


@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("sampling", [LONG, RANDOM], ids=["greedy", "random"])
def test_tokens_are_the_engines_and_steps_run_as_foretold(
    model_dir: Path, num_rows: int, sampling: SamplingParams
) -> None:
    engine = LookingAhead(model_dir)
    assert _generate(engine, [sampling] * num_rows) == _generate(make_engine(model_dir), [sampling] * num_rows)
    assert (engine.runner.num_steps, engine.runner.num_forecasts) == (23, 22)


def test_answers_that_end_by_length_leave_without_a_step_prepared_in_vain(model_dir: Path) -> None:
    sampling = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (24, 3, 9, 24, 2)]
    engine = LookingAhead(model_dir)
    assert _generate(engine, sampling) == _generate(make_engine(model_dir), sampling)
    assert (engine.runner.num_steps, engine.runner.num_forecasts) == (23, 22)
    assert {rows for _, rows in engine.device.sizes_run} == {5, 4, 3, 2}


def _with_comings_and_goings(engine: Engine) -> list[list[int]]:
    """Joins, a chunk beside decode rows, an early end, a table moved to other blocks."""
    driver = Driver(engine)
    first, second, third = (driver.add(p, LONG) for p in prompts([15, 30, 12]))
    driver.step([(first, 15)])
    for _ in range(3):
        driver.step([(first, 1)])
    driver.step([(first, 1), (second, 30)])
    for _ in range(2):
        driver.step([(first, 1), (second, 1)])
    driver.step([(third, 12)])  # the others wait
    driver.step([(first, 1), (second, 1), (third, 1)])
    driver.step([(first, 1), (third, 1)])  # the second one leaves
    moved = [driver._free.pop() for _ in first.block_table]
    for source, target in zip(first.block_table, moved, strict=True):
        engine.kv_pages[:, target] = engine.kv_pages[:, source]
        engine.kv_pages[:, source] = 0
    first.block_table = moved
    for _ in range(4):
        driver.step([(first, 1), (third, 1)])
    driver.step([(second, 1), (third, 1)])
    return [seq.output_token_ids for seq in (first, second, third)]


def test_what_was_not_foretold_is_prepared_anew(model_dir: Path) -> None:
    engine = LookingAhead(model_dir)
    assert _with_comings_and_goings(engine) == _with_comings_and_goings(make_engine(model_dir))
    assert 0 < engine.runner.num_forecasts < engine.runner.num_steps


def test_blocks_are_copied_before_the_step(model_dir: Path) -> None:
    def fork(engine: Engine) -> tuple[int, int]:
        driver = Driver(engine)
        first = driver.add(prompts([21])[0])
        driver.step([(first, 21)])
        forked = driver.step_fork(first)
        driver.step([(first, 1)])
        return forked, first.token_ids[22]

    child_token, parent_token = fork(LookingAhead(model_dir))
    assert child_token == parent_token == fork(make_engine(model_dir))[0]


def test_every_pending_choice_gets_its_token_and_nothing_is_foretold_of_it(model_dir: Path) -> None:
    def last_prompt_token(engine: Engine) -> list[int]:
        driver = Driver(engine)
        seq = driver.add(prompts([12])[0], SamplingParams(temperature=5.0, seed=3))
        seq.samples = False
        driver.step([(seq, 11)])
        seq.samples, seq.pending_choices = True, (0, 1, 4)
        ((*tokens,),) = driver.step([(seq, 1)])
        return [token.token_id for token in tokens]

    engine = LookingAhead(model_dir)
    tokens = last_prompt_token(engine)
    assert len(tokens) == 3 and tokens == last_prompt_token(make_engine(model_dir))
    assert engine.runner.num_steps == 1 and engine.runner._forecast is None


def test_layers_are_told_of_and_rows_without_a_sample_yield_nothing(model_dir: Path) -> None:
    engine = LookingAhead(model_dir)
    driver = Driver(engine)
    silent, seq = (driver.add(p) for p in prompts([12, 12]))
    silent.samples = False
    layers: list[int] = []
    driver.step([(silent, 10), (seq, 12)])
    tokens = driver.step([(silent, 1), (seq, 1)], layers.append)
    assert layers == [0, 1] and tokens[0] == () and len(tokens[1]) == 1
    assert engine.runner.num_steps == 1


def test_too_many_rows_and_chunks_are_left_to_the_engine(model_dir: Path) -> None:
    engine = LookingAhead(model_dir)
    answers = Driver(engine)
    seqs = [answers.add(prompt) for prompt in prompts([6] * (MAX_ROWS + 1))]
    expected = Driver(make_engine(model_dir))
    assert answers.generate(seqs) == expected.generate([expected.add(seq.token_ids[:6], GREEDY) for seq in seqs])
    assert engine.runner.num_steps == 0


def test_a_row_whose_logits_are_no_distribution_leaves_and_the_others_go_on(tmp_path: Path) -> None:
    broken = put_nan(write_checkpoint(tmp_path, tokenizer=False), "model.embed_tokens.weight", 500)
    engine = LookingAhead(broken)
    driver = Driver(engine)
    first, bad, second = (driver.add(prompt, RANDOM) for prompt in prompts([5, 16, 31], 480))
    for seq in (first, bad, second):
        driver.step([(seq, seq.num_tokens)])
    bad.token_ids[-1] = 500
    steps = [driver.step([(seq, 1) for seq in seqs]) for seqs in ((first, bad, second), (first, second))]
    assert [[bool(tokens) for tokens in step] for step in steps] == [[True, False, True], [True, True]]
    assert not driver.outputs[-2].rows[1].is_finite
    other = Driver(make_engine(broken))
    alone = other.generate([other.add(prompt, RANDOM) for prompt in prompts([5, 16, 31], 480)[::2]])
    assert [first.output_token_ids, second.output_token_ids] == [tokens[:3] for tokens in alone]
