"""Greedy answers equal `transformers` token for token, however and wherever they are computed.

Three families, 32 requests at once of 1 to 3,000 tokens, over HTTP and real workers that hand KV over by NIXL:
disaggregated, prefix hits on either side, colocated, preempted, and tensor parallel on either side or both. One fleet
of each family has a worker of every kind; a test says which of them serve it (pinned_router.py), and its prompts are
unknown to every cache by a salt of its own.
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import pytest

from kvferry.common.config import SECRET_VARIABLE, EngineConfig, ExpertExchange, TransferConfig, WorkerConfig
from kvferry.common.router_config import RouterConfig
from kvferry.tools.load.server_process import free_port

from . import reference
from .cluster import Cluster, run_all, wait_until
from .exactness_models import ExactnessModel, write_exactness_model
from .pinned_router import PIN_VARIABLE

# Each takes a minute. These have what differs between workers: biases, a window, norms of heads, two kinds of layers.
# The others, as by FAMILIES="qwen2 qwen3 gemma2 granite granitemoehybrid olmo2 olmo3 phi3 smollm3 seed_oss mistral3
# ministral3 glm glm4 qwen2_5_vl qwen3_vl ernie4_5 exaone4 cwm qwen3_moe qwen2_moe mixtral olmoe glm4_moe minimax_m2
# ernie4_5_moe exaone_moe dots1 solar_open gpt_oss deepseek_v2 deepseek_v3 glm4_moe_lite youtu qwen3_5_text qwen3_next
# qwen3_5_moe_text qwen3_vl_moe granitemoe hunyuan_v1_dense hunyuan_v1_moe cohere2 lfm2 lfm2_moe granite4 granite4_moe
# nemotron_h nemotron_h_moe arcee falcon_h1 mistral4 llama4 gemma4 gemma4_borrowing gemma4_moe",
# are of parts that these have or that tests/engine tests.
FAMILIES = os.environ.get("FAMILIES", "llama mistral gemma3_text").split()
NUM_TOKENS = 24
# Around the borders of blocks (16) and chunks (512), and in between.
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 300, 400, 511, 512, 513]
LENGTHS += [700, 1000, 1023, 1025, 1500, 2048, 2500, 3000]
NUM_HITS = sum((length - 1) // 16 * 16 for length in LENGTHS)  # when all are known; the last token is computed anew
GROWING_LENGTHS = [200 + n for n in range(8)]
# Three answers at once need more than SMALL_POOL, however slowly the prompts come.
NUM_GROWING_TOKENS = 400
SMALL_POOL = 80  # blocks
PINNED_ROUTER, FORKED_WORKERS = (Path(__file__).with_name(f"{name}.py") for name in ("pinned_router", "forked_workers"))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a worker of the fleet is."""

    role: Literal["prefill", "decode"]
    ranks: int = 1
    has_whole_experts: bool = False  # on each rank, where the model has any: shared out else
    exchange: ExpertExchange = "sum"  # of whole experts' tokens
    num_blocks: int = 16384  # the prompts of several tests at once


WORKERS = {
    "p-0": Kind(role="prefill"),
    "d-0": Kind(role="decode"),
    "p-wide": Kind(role="prefill", ranks=2),
    "d-wide": Kind(role="decode", ranks=2, has_whole_experts=True),
    "d-small": Kind(role="decode", num_blocks=SMALL_POOL),
}
EXCHANGING = {"d-exchange": Kind(role="decode", ranks=2, has_whole_experts=True, exchange="all_to_all")}


def prompts_of(lengths: list[int]) -> list[list[int]]:
    """No two prompts share a block, so that only a repeated prompt is a prefix hit."""
    return [
        [(7 * i * i + 13 * i * n + 31 * n + 5) % 500 + 4 for i in range(length)] for n, length in enumerate(lengths, 1)
    ]


PROMPTS, GROWING = prompts_of(LENGTHS), prompts_of(GROWING_LENGTHS)


@dataclass(frozen=True)
class Fleet:
    """The workers of one family's checkpoint behind a router."""

    cluster: Cluster
    pins: Path
    teacher: reference.Teacher
    is_sparse: bool

    def check(
        self,
        mode: str,
        workers: str,
        salt: str,
        prompts: list[list[int]] = PROMPTS,
        num_tokens: int = NUM_TOKENS,
    ) -> None:
        """Put all prompts at once to these workers, and judge what they say."""
        self.pins.write_text(workers)
        answers = asyncio.run(_complete(self.cluster, prompts, num_tokens, salt))
        self.teacher.assert_greedy(prompts, answers, mode)

    def num_hits(self, worker: str) -> float:
        return self.cluster.metric("kvferry_prefix_cache_hits_total", f'worker="{worker}"')

    def check_hits(self, mode: str, workers: str, salt: str, *, on: str) -> None:
        """Put prompts that worker `on` alone remembers: each of its blocks is used, and none of the other's."""
        before = {name: self.num_hits(name) for name in workers.split()}
        self.check(mode, workers, salt)
        # A later heartbeat tells of the last ones, so that no other test counts them.
        wait_until(lambda: self.num_hits(on) == before[on] + NUM_HITS, f"all prefix hits on {on}")
        assert {name for name in before if self.num_hits(name) > before[name]} == {on}

    def num_fallbacks(self) -> float:
        return self.cluster.metric("kvferry_fallback_total")


@pytest.fixture(scope="module", params=FAMILIES)
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp(request.param)
    model = write_exactness_model(folder / "model", request.param)
    workers = WORKERS | (EXCHANGING if model.is_sparse else {})
    with open_fleet(folder, model, workers) as opened:
        yield opened


@contextmanager
def open_fleet(folder: Path, model: ExactnessModel, workers: Mapping[str, Kind]) -> Iterator[Fleet]:
    """Run these workers of a checkpoint behind a router."""
    http, control, pins = free_port(), free_port(), folder / "pins"
    router = RouterConfig(
        port=http, control_port=control, model_dir=model.path, served_model_name="tiny", log_level="warning"
    )
    pins.write_text("p-0 d-0")
    commands = [[sys.executable, str(PINNED_ROUTER), "--config-json", router.model_dump_json()]]
    configs = [_worker_config(name, kind, model, control) for name, kind in workers.items()]
    commands.append([sys.executable, str(FORKED_WORKERS), *(config.model_dump_json() for config in configs)])
    env = {PIN_VARIABLE: str(pins), SECRET_VARIABLE: "a secret for these tests", "OMP_NUM_THREADS": "1"}
    with run_all(commands, folder / "log", f"http://127.0.0.1:{http}", env=env) as cluster:
        is_ready = 'state="ready"'
        wait_until(lambda: cluster.metric("kvferry_worker_state", is_ready) == len(workers), "every worker")
        yield Fleet(cluster, pins, reference.Teacher(model.path), model.is_sparse)


def _worker_config(name: str, kind: Kind, model: ExactnessModel, control: int) -> WorkerConfig:
    engine = EngineConfig(
        model_dir=model.path,
        served_model_name="tiny",
        dtype="float32",
        num_threads=1,
        tensor_parallel_size=kind.ranks,
        block_size=16,
        kv_cache_memory_bytes=kind.num_blocks * model.block_bytes,
        enable_expert_parallel=kind.has_whole_experts and model.is_sparse,
        expert_exchange=kind.exchange,
    )
    routers = (f"127.0.0.1:{control}",)
    return WorkerConfig(
        worker_id=name,
        role=kind.role,
        engine=engine,
        transfer=TransferConfig(open_within_s=60.0, lease_s=60.0),  # none lapses in a busy machine's first steps
        routers=routers,
        log_level="warning",
        calibration_s=0.0,
    )


@pytest.fixture
def salt() -> str:
    """Makes every prompt a new one."""
    return uuid.uuid4().hex


async def _complete(cluster: Cluster, prompts: list[list[int]], num_tokens: int, salt: str) -> list[list[int]]:
    """All prompts at once: the answers' token ids."""
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=300.0) as client:

        async def one(prompt: list[int]) -> list[int]:
            body = {
                "model": "tiny",
                "prompt": prompt,
                "max_tokens": num_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
                "cache_salt": salt,
            }
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            tokens: list[int] = answer.json()["choices"][0]["token_ids"]
            assert len(tokens) == num_tokens
            return tokens

        return list(await asyncio.gather(*map(one, prompts)))


def test_disaggregated(fleet: Fleet, salt: str) -> None:
    before = fleet.num_fallbacks()
    fleet.check("disaggregated", "p-0 d-0", salt)
    assert fleet.num_fallbacks() == before


def test_tensor_parallel_decode_then_prefix_hits_on_the_prefill_side(fleet: Fleet, salt: str) -> None:
    before = fleet.num_fallbacks()
    fleet.check("one rank to two", "p-0 d-wide", salt)
    fleet.check_hits("prefill-side hits", "p-0 d-0", salt, on="p-0")
    assert fleet.num_fallbacks() == before


def test_tensor_parallel_prefill_then_prefix_hits_on_the_decode_side(fleet: Fleet, salt: str) -> None:
    before = fleet.num_fallbacks()
    fleet.check("two ranks to one", "p-wide d-0", salt)
    fleet.check_hits("decode-side hits", "p-0 d-0", salt, on="d-0")
    assert fleet.num_fallbacks() == before


def test_tensor_parallel_on_both_sides(fleet: Fleet, salt: str) -> None:
    before = fleet.num_fallbacks()
    fleet.check("two ranks to two", "p-wide d-wide", salt)
    if fleet.is_sparse:
        fleet.check("two ranks to two that exchange tokens", "p-wide d-exchange", salt + "2")
        fleet.check("one rank to two that exchange tokens", "p-0 d-exchange", salt + "1")
    assert fleet.num_fallbacks() == before


def test_colocated(fleet: Fleet, salt: str) -> None:
    fleet.check("colocated", "d-0", salt)
    fleet.check_hits("colocated hits", "d-0", salt, on="d-0")


@pytest.mark.parametrize("workers", ["d-small", "p-0 d-small"])
def test_preempted(fleet: Fleet, salt: str, workers: str) -> None:
    def metric(name: str, *labels: str) -> float:
        return fleet.cluster.metric(f"kvferry_{name}", 'worker="d-small"', *labels)

    before = metric("preemptions_total")
    fleet.check(f"preempted on {workers}", workers, salt, GROWING, NUM_GROWING_TOKENS)
    wait_until(lambda: metric("preemptions_total") > before, "a preemption")
    wait_until(lambda: fleet.cluster.metric("kvferry_blocks", 'state="active"') == 0, "every block given back")
