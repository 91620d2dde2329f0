"""Answers drafted by a model are the same ones: a real engine, chunks, choices, a pool that is too small, prefix hits.

A target that drafts for itself shows where a draft's keys and values are wrong: they must be its own ones, to the bit,
in every block that is full, and all that it drafts at temperature 0 is right.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvferry.common.config import SpeculativeConfig
from kvferry.common.request import SamplingParams
from kvferry.decode.speculation import StepCosts

from ..checkpoints import Shape, write_checkpoint
from ..engine_driver import engine_config, prompts
from .engine_worker import Answers, EngineWorker

BLOCK_SIZE = 8
TARGET = Shape(num_layers=3, num_qo_heads=4, num_kv_heads=2, head_dim=32)
SMALL = Shape(num_layers=1, num_qo_heads=2, num_kv_heads=1, head_dim=16, seed=5)
SAMPLING = (
    SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.7, top_p=0.9, seed=3, max_tokens=40, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=1.2, seed=4, frequency_penalty=0.4, max_tokens=40, stop_token_ids=(77, 78, 79)),
    SamplingParams(temperature=0.0, repetition_penalty=1.2, min_tokens=9, max_tokens=40),
)
LENGTHS = [20, 33, 7, 48, 16, 1, 24]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "target": write_checkpoint(folder / "target", shape=TARGET),
        "small": write_checkpoint(folder / "small", shape=SMALL),
    }


@pytest.fixture(autouse=True)
def _costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are cheap, whatever this machine says."""

    def cheap(self: StepCosts, batch: object, output: object) -> None:
        self.plain_s = dict.fromkeys(range(1, 100), 1.0)
        self.share = self.depth_share = 0.01

    monkeypatch.setattr(StepCosts, "observe", cheap)


class Worker(EngineWorker):
    """Its model may have a draft model."""

    def __init__(
        self, models: dict[str, Path], draft: str | None, kind: str, num_blocks: int = 128, **fields: object
    ) -> None:
        speculative = SpeculativeConfig(method="draft_model", model=models[draft]) if draft else None
        config = engine_config(
            models["target"],
            dtype="bfloat16" if kind == "native" else "float32",
            block_size=BLOCK_SIZE,
            deterministic=True,
            speculative_config=speculative,
            **fields,
        )
        super().__init__(config, num_blocks, eos_token_ids=frozenset({1, 3}), max_num_seqs=9)
        if kind == "native" and type(self.engine.runner).__name__ != "NativeRunner":
            pytest.skip("no native code on this machine")

    def answer(self, name: str = "r", kinds: tuple[SamplingParams, ...] = SAMPLING) -> Answers:
        return self.run(prompts(LENGTHS, 500), kinds, name)

    def check_pages(self) -> int:
        """Compare what a target wrote as its own draft with what it wrote for itself, in all cached blocks."""
        cached = [block for block in range(self.pool.num_blocks) if self.pool.is_published(block)]
        target, draft = self.engine.kv_pages[: TARGET.num_layers], self.engine.kv_pages[TARGET.num_layers :]
        for block in cached:
            assert torch.equal(target[:, block], draft[:, block]), block
        return len(cached)


@pytest.fixture(scope="module", params=["native", "tiled"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(models: dict[str, Path], kind: str) -> Answers:
    worker = Worker(models, None, kind)
    answers = worker.answer()
    assert worker.role.scheduler.num_preemptions == 0
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["target", "small"])
@pytest.mark.parametrize(("num_blocks", "swap_space"), [(128, 0), (18, 0), (18, 1 << 20)])
def test_answers_are_the_same_with_room_and_without(
    models: dict[str, Path], kind: str, expected: Answers, draft: str, num_blocks: int, swap_space: int
) -> None:
    worker = Worker(models, draft, kind, num_blocks, swap_space=swap_space)
    assert worker.answer() == expected
    scheduler = worker.role.scheduler
    counters = scheduler.draft_counters
    assert (scheduler.num_preemptions > 0) == (num_blocks == 18)
    assert (scheduler.blocks.swap.num_loaded_blocks > 0) == (swap_space > 0)
    assert 0 < counters.accepted_tokens < counters.draft_tokens
    assert counters.draft_prompt_tokens >= sum(LENGTHS)
    if draft == "target":
        assert worker.check_pages() > 10
    assert worker.answer("s") == expected  # the beginnings are cached now
    assert worker.role.scheduler.speculation is not None
    assert not worker.role.scheduler.speculation._tracks


def test_a_target_drafts_for_itself_without_a_fault(models: dict[str, Path], kind: str) -> None:
    greedy = (SAMPLING[0],)
    plain, worker = Worker(models, None, kind), Worker(models, "target", kind)
    assert worker.answer(kinds=greedy) == plain.answer(kinds=greedy)
    counters = worker.role.scheduler.draft_counters
    assert counters.accepted_tokens == counters.draft_tokens > 200
    assert worker.answer("s", kinds=greedy) == plain.answer("s", kinds=greedy)
    assert counters.accepted_tokens == counters.draft_tokens
