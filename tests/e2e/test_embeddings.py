"""Embeddings over HTTP and real workers equal those of `transformers`: in chunks, side by side, beside answers, from a
prefix cache, on prefill workers and on workers of both phases, and where a worker is killed in the middle.
"""

from __future__ import annotations

import asyncio
import base64
import json
from array import array
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from torch import Tensor

from ..checkpoints import write_checkpoint, write_embedding_model
from .cluster import Cluster, serve, wait_until

FLAGS = ("--served-model-name", "tiny", "--device", "cpu", "--dtype", "float32", "--max-num-batched-tokens", "256")
LENGTHS = [1, 2, 15, 16, 17, 100, 255, 256, 257, 700, 1500, 2048]
LEAST_COSINE = 1 - 1e-5
NUM_CALLS, MAX_KILLS = 12, 5


def _prompts(lengths: list[int], salt: int = 0) -> list[list[int]]:
    return [[(7 * i * i + 13 * i * n + 31 * n + salt) % 500 + 4 for i in range(m)] for n, m in enumerate(lengths, 1)]


@cache
def _model(model_dir: Path) -> torch.nn.Module:
    import transformers

    model = transformers.AutoModel.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa")
    assert isinstance(model, torch.nn.Module)
    return model


def _expected(model_dir: Path, prompt: list[int], *, mean: bool = False) -> Tensor:
    with torch.inference_mode():
        states = _model(model_dir)(torch.tensor([prompt])).last_hidden_state[0]
    return torch.nn.functional.normalize(states.mean(0) if mean else states[-1], dim=0)


def _vectors(answer: dict[str, Any]) -> list[Tensor]:
    return [torch.tensor(array("f", base64.b64decode(item["embedding"]))) for item in answer["data"]]


def _check(model_dir: Path, prompts: list[list[int]], answer: dict[str, Any], *, mean: bool = False) -> None:
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    for prompt, vector in zip(prompts, _vectors(answer), strict=True):
        cosine = float(vector @ _expected(model_dir, prompt, mean=mean))
        assert cosine >= LEAST_COSINE, f"{len(prompt)} tokens: {cosine}"


def _embed(cluster: Cluster, prompts: list[list[int]], **fields: object) -> dict[str, Any]:
    return cluster.post("/v1/embeddings", {"input": prompts, "encoding_format": "base64", **fields})


def test_prefill_workers_embed_whatever_comes_and_whoever_dies(tmp_path: Path) -> None:
    model_dir, log = write_checkpoint(tmp_path / "model", "qwen3"), tmp_path / "log"
    with serve(model_dir, log, *FLAGS, "--prefill", "2", "--decode", "1", "--no-local-prefill") as cluster:
        prompts = _prompts(LENGTHS)
        first = _embed(cluster, prompts)
        _check(model_dir, prompts, first)
        _check(model_dir, prompts, _embed(cluster, prompts))
        before = cluster.metric("kvferry_cached_prompt_tokens_total")
        for _ in range(3):  # by itself it goes to the same worker, whose prefix cache has all but the last tokens
            _check(model_dir, prompts[-1:], _embed(cluster, prompts[-1:]))
        assert cluster.metric("kvferry_cached_prompt_tokens_total") - before >= 2 * (LENGTHS[-1] - 16)
        assert cluster.metric("kvferry_embeddings_total") == 2 * len(LENGTHS) + 3
        assert cluster.metric("kvferry_placements_total", 'reason="embedding"') == 2 * len(LENGTHS) + 3
        for salt in range(1, 1 + MAX_KILLS):
            asyncio.run(_embed_and_kill(cluster, model_dir, salt))
            if cluster.metric("kvferry_retries_total", 'reason="worker_lost"') > 0:
                return
            wait_until(lambda: len(cluster.programs("p-")) == 2, "a new prefill worker")
        raise AssertionError("no worker died while it computed")


async def _embed_and_kill(cluster: Cluster, model_dir: Path, salt: int) -> None:
    """Every call is answered, with the right vectors, although a worker is killed while they are computed."""
    before = cluster.metric("kvferry_embeddings_total")
    [victim, _] = cluster.programs("p-")
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=240.0) as client:
        prompts = [_prompts([1900, 900], 17 * salt + number) for number in range(NUM_CALLS)]
        bodies = [{"input": inputs, "encoding_format": "base64"} for inputs in prompts]
        calls = [asyncio.create_task(client.post("/v1/embeddings", json=body)) for body in bodies]
        await asyncio.to_thread(
            wait_until, lambda: cluster.metric("kvferry_embeddings_total") >= before + 2, "the first vectors"
        )
        psutil.Process(victim.pid).kill()
        for inputs, answer in zip(prompts, await asyncio.gather(*calls), strict=True):
            assert answer.status_code == 200, answer.text
            _check(model_dir, inputs, answer.json())


def test_an_answer_finds_the_prefix_of_an_embedding(tmp_path: Path) -> None:
    """On the only prefill worker: of several, the one with the prefix need not be the one that answers first."""
    model_dir = write_checkpoint(tmp_path / "model", "qwen3")
    with serve(model_dir, tmp_path / "log", *FLAGS, "--prefill", "1", "--decode", "1", "--no-local-prefill") as cluster:
        prompts = _prompts([257, 700, 1500])
        _check(model_dir, prompts, _embed(cluster, prompts))
        fields = {"max_tokens": 2, "temperature": 0}
        answers: list[Any] = [cluster.post("/v1/completions", {"prompt": p, **fields}) for p in prompts]
        cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
        assert all(cached), "answers find the prefixes of embeddings"


def test_workers_of_both_phases_embed_means(tmp_path: Path) -> None:
    model_dir = write_checkpoint(tmp_path / "model")
    (model_dir / "1_Pooling").mkdir()
    (model_dir / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    with serve(model_dir, tmp_path / "log", *FLAGS, "--prefill", "0", "--decode", "1") as cluster:
        prompts = _prompts(LENGTHS)
        stream = asyncio.run(_beside_an_answer(cluster, prompts))
        _check(model_dir, prompts, stream, mean=True)
        again = _embed(cluster, prompts)
        _check(model_dir, prompts, again, mean=True)
        assert cluster.metric("kvferry_cached_prompt_tokens_total") == 0
        [short] = _vectors(_embed(cluster, prompts[-1:], dimensions=8))
        expected = torch.nn.functional.normalize(_expected(model_dir, prompts[-1], mean=True)[:8], dim=0)
        assert float(short @ expected) >= LEAST_COSINE


def test_an_embedding_model_has_no_head_and_gives_no_answers(tmp_path: Path) -> None:
    """As Qwen3-Embedding-8B is stored: config.json ties no head, the weights have none, their names lack a prefix."""
    model_dir = write_embedding_model(tmp_path / "model")
    with serve(model_dir, tmp_path / "log", *FLAGS, "--prefill", "1", "--decode", "1") as cluster:
        prompts = _prompts([1, 17, 300])
        _check(model_dir, prompts, _embed(cluster, prompts))
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        bodies: dict[str, dict[str, object]] = {"completions": {"prompt": "a"}, "responses": {"input": "a"}}
        bodies |= {"chat/completions": chat, "messages": chat}
        for path, body in bodies.items():
            answer = httpx.post(f"{cluster.base_url}/v1/{path}", json={"model": "tiny", **body})
            assert answer.status_code == 400, answer.text
            assert "makes embeddings alone (/v1/embeddings)" in answer.json()["error"]["message"]


async def _beside_an_answer(cluster: Cluster, prompts: list[list[int]]) -> dict[str, Any]:
    """Embed while answers stream, whose tokens are as they are alone."""
    body = {"prompt": [5, 6, 7], "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    alone = cluster.post("/v1/completions", body)["choices"]
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=240.0) as client:
        answers = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(3)]
        embedded = await client.post("/v1/embeddings", json={"input": prompts, "encoding_format": "base64"})
        assert embedded.status_code == 200, embedded.text
        assert all(answer.json()["choices"] == alone for answer in await asyncio.gather(*answers))
    result: dict[str, Any] = embedded.json()
    return result
