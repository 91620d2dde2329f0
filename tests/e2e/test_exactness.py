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
from .cluster import Cluster, serve

NUM_TOKENS = 24
MAX_MODEL_LEN = 4096
# Around the borders of blocks (16) and chunks (512), and in between.
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 300, 400, 511, 512, 513]
LENGTHS += [700, 1000, 1023, 1025, 1500, 2048, 2500, 3000]
BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # layers, K and V, heads, head_dim, tokens, float32
SMALL_POOL = str(260 * BLOCK_BYTES)  # the longest prompt fits, not much else


@dataclass(frozen=True)
class Model:
    path: Path
    references: list[reference.Reference]


def _prompts() -> list[list[int]]:
    """No two prompts share a block, so that only a repeated prompt is a prefix hit."""
    return [
        [(7 * i * i + 13 * i * n + 31 * n + 5) % 500 + 4 for i in range(length)] for n, length in enumerate(LENGTHS, 1)
    ]


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    family: Family = request.param
    window = 300 if family == "mistral" else None
    path = write_checkpoint(
        tmp_path_factory.mktemp("models") / family, family, max_model_len=MAX_MODEL_LEN, sliding_window=window
    )
    return Model(path, reference.greedy(path, _prompts(), NUM_TOKENS))


async def _complete(cluster: Cluster, prompts: list[list[int]], repeat: int = 1) -> list[list[list[int]]]:
    """All prompts at once, `repeat` rounds one after another: the answers' token ids by round."""
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=300.0) as client:

        async def one(prompt: list[int]) -> list[int]:
            body = {
                "model": "tiny",
                "prompt": prompt,
                "max_tokens": NUM_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            tokens: list[int] = answer.json()["choices"][0]["token_ids"]
            return tokens

        return [list(await asyncio.gather(*map(one, prompts))) for _ in range(repeat)]


def _check(cluster: Cluster, model: Model, mode: str, repeat: int = 1) -> None:
    prompts = [r.prompt for r in model.references]
    for number, answers in enumerate(asyncio.run(_complete(cluster, prompts, repeat))):
        reference.assert_equal(answers, model.references, f"{mode}, round {number}")


COMMON = ("--served-model-name", "tiny", "--dtype", "float32", "--log-level", "warning")


def test_disaggregated_and_prefix_hits_on_the_prefill_side(model: Model, tmp_path: Path) -> None:
    env = {"KVFERRY_DECODE_ENABLE_PREFIX_CACHING": "false"}
    with serve(model.path, tmp_path / "log", *COMMON, "--kv-cache-memory-bytes", "64MiB", env=env) as cluster:
        _check(cluster, model, "disaggregated", repeat=2)
        assert cluster.metric("kvferry_prefix_cache_hits_total", 'worker="p-0"') > sum(LENGTHS) / 2
        assert cluster.metric("kvferry_prefix_cache_hits_total", 'worker="d-0"') == 0
        assert cluster.metric("kvferry_fallback_total") == 0


def test_prefix_hits_on_the_decode_side_and_a_decode_pool_that_preempts(model: Model, tmp_path: Path) -> None:
    env = {"KVFERRY_PREFILL_ENABLE_PREFIX_CACHING": "false"}
    with serve(model.path, tmp_path / "log", *COMMON, "--kv-cache-memory-bytes", "64MiB", env=env) as cluster:
        _check(cluster, model, "decode-side hits", repeat=2)
        assert cluster.metric("kvferry_prefix_cache_hits_total", 'worker="d-0"') > sum(LENGTHS) / 2
        assert cluster.metric("kvferry_prefix_cache_hits_total", 'worker="p-0"') == 0


def test_colocated_with_preemptions(model: Model, tmp_path: Path) -> None:
    flags = ("--prefill", "0", "--kv-cache-memory-bytes", SMALL_POOL)
    with serve(model.path, tmp_path / "log", *COMMON, *flags) as cluster:
        _check(cluster, model, "colocated and preempted")
        assert cluster.metric("kvferry_preemptions_total") > 0


@pytest.mark.parametrize(("prefill_ranks", "decode_ranks"), [(2, 2), (1, 2), (2, 1)])
def test_tensor_parallel(model: Model, tmp_path: Path, prefill_ranks: int, decode_ranks: int) -> None:
    env = {
        "KVFERRY_PREFILL_TENSOR_PARALLEL_SIZE": str(prefill_ranks),
        "KVFERRY_DECODE_TENSOR_PARALLEL_SIZE": str(decode_ranks),
    }
    with serve(model.path, tmp_path / "log", *COMMON, "--kv-cache-memory-bytes", "64MiB", env=env) as cluster:
        _check(cluster, model, f"tensor parallel {prefill_ranks} to {decode_ranks}")
        assert cluster.metric("kvferry_fallback_total") == 0
