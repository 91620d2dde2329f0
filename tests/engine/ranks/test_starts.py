"""A rank that does not start: rank 0 says why, and waits for it no longer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvferry.common.config import EngineConfig
from kvferry.common.errors import WorkerLost
from kvferry.engine.engine import Engine
from kvferry.engine.ranks import group as rank_group
from kvferry.engine.ranks.group import RankGroup

from ...checkpoints import write_checkpoint
from ...engine_driver import engine_config
from ...forks import Forks


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return engine_config(write_checkpoint(tmp_path, tokenizer=False), tensor_parallel_size=2)


@pytest.mark.slow
def test_a_process_that_ends_at_its_start_is_told(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = RankGroup._spawn

    def killed(self: RankGroup, *others: Any) -> None:
        spawn(self, *others)
        self._processes[-1].kill()

    monkeypatch.setattr(RankGroup, "_spawn", killed)
    with pytest.raises(WorkerLost, match=r"rank 1 did not start: ended by SIGKILL$"):
        RankGroup.start(config)


@pytest.mark.slow
def test_a_rank_that_cannot_make_its_engine_says_why(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, rank_forks: Forks
) -> None:
    """Here one that has other settings, in place of one that has no device: it never joins the collectives."""
    spawn = RankGroup._spawn

    def with_longer_prompts(self: RankGroup, rank: int, config: EngineConfig, *others: Any) -> None:
        spawn(self, rank, config.model_copy(update={"max_model_len": 10**6}), *others)

    monkeypatch.setattr(RankGroup, "_spawn", with_longer_prompts)
    monkeypatch.setattr(rank_group, "subprocess", rank_forks)
    group = RankGroup.start(config)
    try:
        with pytest.raises(WorkerLost, match="rank 1: max_model_len: 1000000 is more than the model's"):
            Engine(config, tp_size=2, num_blocks=64, group=group)
    finally:
        group.close()
