"""Experts between workers that split them, or exchange their tokens, otherwise: the tokens of `transformers`, for 32
prompts of up to 3,000. A rank that dies while tokens are exchanged takes its worker with it, and no stream.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from kvferry.models.parts.expert_plan import ExpertPlan, read_plan
from kvferry.tools.load.tiny_model import write_tiny_model

from . import reference
from .cluster import serve, wait_until
from .drill import Drill, LocalDrill
from .exactness_models import HEADS_BLOCK_BYTES, ExactnessModel
from .test_exactness import LENGTHS, NUM_TOKENS, Fleet, Kind, _complete, open_fleet

_VOCABULARY = 420  # ids from 4 on that the model has in any case
PROMPTS = [
    [(7 * i * i + 13 * i * n + 31 * n) % _VOCABULARY + 4 for i in range(size)] for n, size in enumerate(LENGTHS, 1)
]
# A prefill worker of each kind, and decode workers that split experts, or exchange their tokens, otherwise.
WORKERS = {
    "p-0": Kind(role="prefill"),
    "p-shared": Kind(role="prefill", ranks=2),
    "p-whole": Kind(role="prefill", ranks=2, has_whole_experts=True),
    "d-0": Kind(role="decode"),
    "d-exchange": Kind(role="decode", ranks=2, has_whole_experts=True, exchange="all_to_all"),
}
# Three of eight experts on both ranks in the first layer, all of them in the second.
PLAN = ExpertPlan(8, 2, {0: ((0, 1, 2, 4, 6), (1, 3, 4, 5, 6, 7)), 1: (tuple(range(8)),) * 2})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", num_experts=8)


def test_replicas_on_a_prefill_worker_change_nothing(model_dir: Path, tmp_path: Path) -> None:
    prompts = PROMPTS[::3]
    (tmp_path / "plan.json").write_text(PLAN.text())
    whole = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "expert_plan": str(tmp_path / "plan.json")}
    (tmp_path / "settings.yaml").write_text(json.dumps({"prefill": {"workers": 1} | whole, "decode": {"workers": 1}}))
    flags = ["--served-model-name", "tiny", "--device", "cpu", "--dtype", "float32", "--no-local-prefill"]
    flags += ["--admin-port", "0", "--config", str(tmp_path / "settings.yaml")]
    with serve(model_dir, tmp_path / "log", *flags) as cluster:
        answers = asyncio.run(_complete(cluster, prompts, NUM_TOKENS, "a salt"))
        assert cluster.metric("kvferry_fallback_total") == 0
        num_prompt_tokens, again = sum(map(len, prompts)), tmp_path / "again.json"
        wait_until(
            lambda: cluster.metric("kvferry_expert_choices_total", 'pool="prefill"') >= 2 * num_prompt_tokens,
            "a report of experts",
        )
        assert 1 <= cluster.metric("kvferry_expert_rank_imbalance", 'pool="prefill"') < 2
        assert 1 <= cluster.status()["experts"]["rank_imbalance"] < 2
        [admin] = cluster.admin_urls
        words = ["experts", "plan", str(again), "--replicas", "4", "--pool", "prefill", "--admin", admin]
        subprocess.run([sys.executable, "-m", "kvferry", *words], check=True, timeout=240.0)
    assert sorted(read_plan(again, num_ranks=2, num_experts=8, sparse_layers=range(2)).layers) == [0, 1]
    reference.Teacher(model_dir).assert_greedy(prompts, answers, "replicas to one rank")


@pytest.fixture(scope="module")
def fleet(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    model = ExactnessModel(model_dir, HEADS_BLOCK_BYTES, is_sparse=True)
    with open_fleet(tmp_path_factory.mktemp("fleet"), model, WORKERS) as opened:
        yield opened


@pytest.mark.parametrize("workers", ["p-shared d-exchange", "p-0 d-exchange", "p-whole d-exchange", "p-whole d-0"])
def test_pools_may_split_experts_otherwise(fleet: Fleet, workers: str) -> None:
    before = fleet.num_fallbacks()
    fleet.check(workers, workers, salt=workers, prompts=PROMPTS)
    assert fleet.num_fallbacks() == before


@pytest.mark.slow
def test_a_rank_that_dies_takes_its_worker_with_it_and_no_stream(model_dir: Path, tmp_path: Path) -> None:
    """To the byte: exact steps stay exact, and go on at the other worker. It may die while nothing is computed."""
    flags = ["--served-model-name", "tiny", "--device", "cpu", "--deterministic", "--prefill", "0", "--decode", "2"]
    flags += ["--tensor-parallel-size", "2", "--enable-expert-parallel", "--expert-exchange", "all_to_all"]
    env = Drill.environment(tmp_path / "failpoints")
    with serve(model_dir, tmp_path / "log", *flags, "--kv-cache-memory-bytes", "8MiB", env=env) as cluster:
        drill = LocalDrill(tmp_path / "failpoints", 2, cluster=cluster)
        drill.settle()
        drill.learn()
        drill.check(drill.stream(when_flowing=partial(_kill_second_rank, drill, "d-0")))
        assert drill.killed
        drill.settle(quarantine_ends=False)
        _kill_second_rank(drill, "d-1")
        wait_until(lambda: not drill.killed["d-1"].is_running(), "the end of a worker that computed nothing")
        drill.settle(quarantine_ends=False)


def _kill_second_rank(drill: LocalDrill, name: str) -> None:
    [leader] = drill.cluster.programs(name)
    [rank] = [child for child in leader.children(recursive=True) if "follower_process" in " ".join(child.cmdline())]
    rank.kill()
    drill.killed[name] = leader  # which follows it
