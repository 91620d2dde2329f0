"""Signals that reach all processes of a deployment: rank 0 decides what they mean, the other ranks end with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvferry.engine.engine import Engine
from kvferry.engine.ranks import group as rank_group
from kvferry.engine.ranks.group import RankGroup

from ...checkpoints import write_checkpoint
from ...engine_driver import Driver, engine_config, prompts
from ...forks import Forks


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank_forks: Forks) -> Iterator[tuple[RankGroup, Engine]]:
    monkeypatch.setattr(rank_group, "subprocess", rank_forks)
    config = engine_config(write_checkpoint(tmp_path, tokenizer=False), tensor_parallel_size=2)
    group = RankGroup.start(config, num_blocks=64)
    try:
        yield group, Engine(config, tp_size=2, num_blocks=64, group=group)
    finally:
        group.close()


@pytest.mark.slow
def test_a_rank_goes_on_while_its_worker_drains(pair: tuple[RankGroup, Engine]) -> None:
    group, engine = pair
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(group.pids[0], number)
    driver = Driver(engine)
    [answer] = driver.generate([driver.add(prompts([5])[0])])
    assert len(answer) == 8
