"""Answers under pressure equal those without it: a real engine, a pool that is too small, KV in host memory or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.common.request import SamplingParams

from ..checkpoints import write_checkpoint
from ..engine_driver import engine_config, prompts
from .engine_worker import Answers, EngineWorker

BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # layers, K and V, heads, tokens, head_dim, float32
SAMPLING = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    "seeded": SamplingParams(temperature=0.9, top_p=0.9, seed=3, max_tokens=40, ignore_eos=True),
    "penalised": SamplingParams(temperature=0.0, repetition_penalty=1.2, max_tokens=40, ignore_eos=True),
}
LENGTHS = [20, 33, 7, 48, 16, 31]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "llama", tokenizer=False)


def _worker(model_dir: Path, num_blocks: int, num_swap_blocks: int, **fields: object) -> EngineWorker:
    config = engine_config(model_dir, swap_space=num_swap_blocks * BLOCK_BYTES, **fields)
    worker = EngineWorker(config, num_blocks)
    assert worker.engine.num_swap_blocks == num_swap_blocks
    return worker


def _run(worker: EngineWorker) -> Answers:
    return worker.run(prompts(LENGTHS), list(SAMPLING.values()))


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> Answers:
    worker = _worker(model_dir, num_blocks=128, num_swap_blocks=0)
    answers = _run(worker)
    assert worker.role.scheduler.num_preemptions == 0
    assert len(answers) == 8 and {len(answer) for answer in answers.values()} == {40}
    return answers


@pytest.mark.parametrize("num_swap_blocks", [0, 3, 40])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_answers_under_pressure_are_the_same(
    model_dir: Path, expected: Answers, num_swap_blocks: int, enable_prefix_caching: bool
) -> None:
    worker = _worker(
        model_dir, num_blocks=10, num_swap_blocks=num_swap_blocks, enable_prefix_caching=enable_prefix_caching
    )
    assert _run(worker) == expected
    assert worker.role.scheduler.num_preemptions > 3
    swap = worker.role.scheduler.blocks.swap
    assert (swap.num_saved_blocks > 0) == (num_swap_blocks > 0)
    if num_swap_blocks == 40:
        assert swap.num_loaded_blocks > 0
