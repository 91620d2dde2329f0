"""Exact answers of a whole cluster: alone, in company, over a handoff, drafted, after a decode worker's death, all the
same.
"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import httpx

from ..checkpoints import write_checkpoint
from .cluster import Cluster, serve, wait_until

FLAGS = ("--served-model-name", "tiny", "--dtype", "bfloat16", "--kv-cache-memory-bytes", "32MiB")
ALONE = ("--deterministic", "--prefill", "0")
# One token is a match: there is hardly a step without a draft.
DRAFTING = ("--decode", "2", "--speculative-config", '{"method": "ngram", "prompt_lookup_min": 1}')
NUM_DECODE = 2
_MAX_KILLS = 5
LENGTHS = (3, 100, 270, 400, 150, 33)
Choices = list[dict[str, object]]


def _body(index: int) -> dict[str, object]:
    """Every other answer has two words alone, so that drafts are often right."""
    return {
        "model": "tiny",
        "prompt": [(31 * i * i + 17 * i + 101 * index) % 500 + 4 for i in range(LENGTHS[index])],
        "max_tokens": 200,
        "ignore_eos": True,
        "n": 2,
        "seed": index,
        "temperature": 0.8 * (index % 3 > 0),
        "top_p": 0.95,
        "frequency_penalty": 0.1 * index,
        "logprobs": 3,
        "logit_bias": {"7": 60, "9": 60} if index % 2 else None,
    }


async def _together(cluster: Cluster, *, kill: bool) -> list[Choices]:
    """All requests at once; with `kill` a decode worker dies when the first stream has begun."""
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=120.0) as client:

        async def one(index: int) -> Choices:
            answer = await client.post("/v1/completions", json=_body(index))
            assert answer.status_code == 200, answer.text
            choices: Choices = answer.json()["choices"]
            return choices

        async def kill_one() -> None:
            body = _body(0) | {"stream": True, "max_tokens": 1000}
            async with client.stream("POST", "/v1/completions", json=body) as stream:
                await anext(stream.aiter_bytes())
                cluster.children('"role":"decode"')[0].send_signal(signal.SIGKILL)

        tasks = [asyncio.ensure_future(one(index)) for index in range(len(LENGTHS))]
        if kill:
            await kill_one()
        return list(await asyncio.gather(*tasks))


def test_answers_are_the_same_to_the_bit_though_tokens_are_drafted_and_a_decode_worker_dies(tmp_path: Path) -> None:
    model_dir = write_checkpoint(
        tmp_path / "tiny", dtype="bfloat16", num_qo_heads=6, head_dim=64, num_layers=4, max_model_len=2048
    )
    with serve(model_dir, tmp_path / "alone", *FLAGS, *ALONE) as cluster:
        alone = [cluster.post("/v1/completions", _body(index)) for index in range(len(LENGTHS))]
        assert all(str(answer["system_fingerprint"]).endswith("-exact") for answer in alone)
        expected = [answer["choices"] for answer in alone]
        assert cluster.metric("kvferry_draft_tokens_total") == 0
    with serve(model_dir, tmp_path / "log", *FLAGS, *DRAFTING) as cluster:
        assert asyncio.run(_together(cluster, kill=False)) == expected
        wait_until(lambda: cluster.metric("kvferry_accepted_draft_tokens_total") > 0, "a draft that was right")
        assert cluster.metric("kvferry_draft_tokens_total") > cluster.metric("kvferry_accepted_draft_tokens_total")
        for _ in range(_MAX_KILLS):  # until one died in the middle of a stream
            assert asyncio.run(_together(cluster, kill=True)) == expected
            wait_until(lambda: len(cluster.children('"role":"decode"')) == NUM_DECODE, "a new decode worker")
            if cluster.metric("kvferry_resumes_total") > 0:
                return
        raise AssertionError(f"{_MAX_KILLS} decode workers died, and no stream was resumed")
