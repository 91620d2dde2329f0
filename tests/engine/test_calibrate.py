"""A worker that measures itself: kinds of steps, and a pool that is as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from kvferry.common.batch import Batch, BatchRow
from kvferry.common.config import EngineConfig
from kvferry.engine.calibrate import calibrate, probes
from kvferry.engine.engine import Engine
from kvferry.engine.nn.states import ForeignStateError
from kvferry.engine.samples import MAX_SAMPLES
from kvferry.kvcache.blocks import BlockPool

from ..checkpoints import write_checkpoint
from ..engine_driver import Driver
from ..transformers_checkpoints import SMALL, STATES, write_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", max_model_len=4096)


def _engine(model_dir: Path, num_blocks: int, **fields: int) -> Engine:
    config = EngineConfig(model_dir=model_dir, served_model_name="m", device="cpu", num_threads=1, **fields)
    return Engine(config, num_blocks=num_blocks)


def test_prompts_and_answers_are_measured_and_nothing_is_left_in_the_pool(model_dir: Path) -> None:
    engine = _engine(model_dir, 512)
    pool = BlockPool(512, engine.spec.block_size)
    samples = calibrate(engine, pool, 1.2)
    pool.check()
    assert pool.num_free_blocks == 512 and pool.num_cached_blocks == 0
    assert 0 < len(samples) <= MAX_SAMPLES and all(0 < sample.step_s < 60 for sample in samples)
    assert {sample.decode_rows for sample in samples if not sample.prefill_tokens} >= {1, 4}
    assert {sample.prefill_tokens for sample in samples} >= {0, 64}


def test_states_that_no_step_left_are_measured_with_and_told_from_others_afterwards(tmp_path: Path) -> None:
    write_model(tmp_path, transformers.Qwen3_5TextConfig(**SMALL | STATES))
    engine = _engine(tmp_path, 512, block_size=16)
    assert any(sample.decode_rows for sample in calibrate(engine, BlockPool(512, 16), 1.2))
    seq = Driver(engine).add(range(4, 24))
    seq.block_table, seq.num_computed_tokens = [0, 1], 19
    with pytest.raises(ForeignStateError):
        engine.step(Batch([BatchRow(seq, 1)]))


def test_what_does_not_fit_is_left_out(model_dir: Path) -> None:
    engine = _engine(model_dir, 16, max_num_seqs=2, max_num_batched_tokens=32)
    pool = BlockPool(16, engine.spec.block_size)
    samples = calibrate(engine, pool, 1.2)
    assert samples and all(sample.decode_rows <= 2 and sample.prefill_tokens <= 32 for sample in samples)
    assert pool.num_free_blocks == 16


def test_in_no_time_at_all_nothing_is_measured(model_dir: Path) -> None:
    engine = _engine(model_dir, 64)
    assert calibrate(engine, BlockPool(64, engine.spec.block_size), 0.0) == ()


def test_each_probe_is_within_a_step() -> None:
    for budget, rows in ((512, 64), (16, 4), (8192, 256)):
        for probe in probes(budget, rows):
            assert probe.num_tokens <= budget and probe.rows <= rows
