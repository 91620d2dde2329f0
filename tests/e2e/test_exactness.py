"""Greedy answers equal `transformers` token for token, however and wherever they are computed.

Four families, 32 requests at once of 1 to 3,000 tokens, over HTTP and real workers that hand KV over by NIXL:
disaggregated, prefix hits on either side, colocated, preempted, and tensor parallel on either side or both.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from ..checkpoints import Family, write_checkpoint
from . import reference
from .cluster import Cluster, serve, wait_until

NUM_TOKENS = 24
MAX_MODEL_LEN = 4096
# Around the borders of blocks (16) and chunks (512), and in between.
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 300, 400, 511, 512, 513]
LENGTHS += [700, 1000, 1023, 1025, 1500, 2048, 2500, 3000]
BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # layers, K and V, heads, head_dim, tokens, float32
GROWING_LENGTHS = [200 + n for n in range(8)]  # with answers that need twice the blocks of SMALL_POOL
NUM_GROWING_TOKENS = 192
SMALL_POOL = str(115 * BLOCK_BYTES)


@dataclass(frozen=True)
class Model:
    path: Path
    teacher: reference.Teacher


def _prompts(lengths: list[int]) -> list[list[int]]:
    """No two prompts share a block, so that only a repeated prompt is a prefix hit."""
    return [
        [(7 * i * i + 13 * i * n + 31 * n + 5) % 500 + 4 for i in range(length)] for n, length in enumerate(lengths, 1)
    ]


PROMPTS, GROWING = _prompts(LENGTHS), _prompts(GROWING_LENGTHS)


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    family: Family = request.param
    window = 300 if family == "mistral" else None
    path = write_checkpoint(
        tmp_path_factory.mktemp("models") / family, family, max_model_len=MAX_MODEL_LEN, sliding_window=window
    )
    return Model(path, reference.Teacher(path))


async def _complete(cluster: Cluster, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
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
            }
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            tokens: list[int] = answer.json()["choices"][0]["token_ids"]
            assert len(tokens) == num_tokens
            return tokens

        return list(await asyncio.gather(*map(one, prompts)))


def _check(
    cluster: Cluster, model: Model, mode: str, prompts: list[list[int]] = PROMPTS, num: int = NUM_TOKENS
) -> None:
    model.teacher.assert_greedy(prompts, asyncio.run(_complete(cluster, prompts, num)), mode)


def _wait_for_hits(cluster: Cluster, worker: str) -> None:
    """The worker's next heartbeat tells that most of the repeated prompts were found."""
    name, label = "kvferry_prefix_cache_hits_total", f'worker="{worker}"'
    wait_until(lambda: cluster.metric(name, label) > sum(LENGTHS) / 2, f"prefix hits on {worker}")


COMMON = ("--served-model-name", "tiny", "--dtype", "float32", "--log-level", "warning")


def test_disaggregated_and_prefix_hits_on_the_prefill_side(model: Model, tmp_path: Path) -> None:
    env = {"KVFERRY_DECODE_ENABLE_PREFIX_CACHING": "false"}
    with serve(model.path, tmp_path / "log", *COMMON, "--kv-cache-memory-bytes", "64MiB", env=env) as cluster:
        _check(cluster, model, "disaggregated")
        _check(cluster, model, "prefill-side hits")
        _wait_for_hits(cluster, "p-0")
        assert cluster.metric("kvferry_prefix_cache_hits_total", 'worker="d-0"') == 0
        assert cluster.metric("kvferry_fallback_total") == 0


def test_prefix_hits_on_the_decode_side(model: Model, tmp_path: Path) -> None:
    env = {"KVFERRY_PREFILL_ENABLE_PREFIX_CACHING": "false"}
    with serve(model.path, tmp_path / "log", *COMMON, "--kv-cache-memory-bytes", "64MiB", env=env) as cluster:
        _check(cluster, model, "disaggregated")
        _check(cluster, model, "decode-side hits")
        _wait_for_hits(cluster, "d-0")
        assert cluster.metric("kvferry_prefix_cache_hits_total", 'worker="p-0"') == 0


def test_colocated(model: Model, tmp_path: Path) -> None:
    flags = ("--prefill", "0", "--kv-cache-memory-bytes", "64MiB")
    with serve(model.path, tmp_path / "log", *COMMON, *flags) as cluster:
        _check(cluster, model, "colocated")
        _check(cluster, model, "colocated hits")


@pytest.mark.parametrize("num_prefill", ["0", "1"])
def test_preempted(model: Model, tmp_path: Path, num_prefill: str) -> None:
    flags = ("--prefill", num_prefill, "--kv-cache-memory-bytes", "64MiB")
    env = {"KVFERRY_DECODE_KV_CACHE_MEMORY_BYTES": SMALL_POOL}
    with serve(model.path, tmp_path / "log", *COMMON, *flags, env=env) as cluster:
        _check(cluster, model, f"preempted, {num_prefill} prefill workers", GROWING, NUM_GROWING_TOKENS)
        wait_until(lambda: cluster.metric("kvferry_preemptions_total") > 0, "a preemption")
        wait_until(lambda: cluster.metric("kvferry_blocks", 'state="active"') == 0, "every block given back")


@pytest.mark.parametrize(("prefill_ranks", "decode_ranks"), [(2, 2), (1, 2), (2, 1)])
def test_tensor_parallel(model: Model, tmp_path: Path, prefill_ranks: int, decode_ranks: int) -> None:
    env = {
        "KVFERRY_PREFILL_TENSOR_PARALLEL_SIZE": str(prefill_ranks),
        "KVFERRY_DECODE_TENSOR_PARALLEL_SIZE": str(decode_ranks),
    }
    with serve(model.path, tmp_path / "log", *COMMON, "--kv-cache-memory-bytes", "64MiB", env=env) as cluster:
        _check(cluster, model, f"tensor parallel {prefill_ranks} to {decode_ranks}")
        assert cluster.metric("kvferry_fallback_total") == 0
