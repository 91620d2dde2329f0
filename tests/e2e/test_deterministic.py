"""Exact answers of a whole cluster: alone, in company, over a handoff, drafted, after a decode worker's death, all the
same.
"""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import httpx
import pytest

from ..checkpoints import write_checkpoint
from .cluster import Cluster, serve, wait_until
from .exactness_models import write_exactness_model

FLAGS = ("--served-model-name", "tiny", "--dtype", "bfloat16", "--kv-cache-memory-bytes", "32MiB")
ALONE = ("--deterministic", "--prefill", "0")
# One token is a match: there is hardly a step without a draft.
DRAFTING = ("--decode", "2", "--speculative-config", '{"method": "ngram", "prompt_lookup_min": 1}')
REMEMBERING = ("--decode", "2", "--speculative-config", '{"method": "suffix", "prompt_lookup_min": 1}')
# Every prompt is computed by the prefill worker.
BY_MODEL = ("--no-local-prefill", "--decode", "2")
NUM_DECODE = 2
_MAX_KILLS = 5
_LINES_BEFORE = 24  # of a stream, two for each event: it flows from a decode worker by then
LENGTHS = (3, 100, 270, 400, 150, 33, 80, 40)
# The first tells log-probabilities, without which letters that must follow cost no step.
GUIDED = {6: {}, 7: {"logprobs": None}}
Choices = list[dict[str, object]]


def _body(index: int) -> dict[str, object]:
    """Every other answer has two words alone, so that drafts are often right."""
    return {
        "model": "tiny",
        "prompt": [(31 * i * i + 17 * i + 101 * index) % 500 + 4 for i in range(LENGTHS[index])],
        "max_tokens": 120,
        "ignore_eos": True,
        "n": 2,
        "seed": index,
        "temperature": 0.8 * (index % 3 > 0),
        "top_p": 0.95,
        "frequency_penalty": 0.1 * index,
        "logprobs": 3,
        "logit_bias": {"7": 60, "9": 60} if index % 2 and index not in GUIDED else None,
        **({"structured_outputs": {"regex": "(abc|acb|bcab){20,40}"}, **GUIDED[index]} if index in GUIDED else {}),
    }


async def _together(cluster: Cluster, *, kill: int | None = None) -> list[Choices]:
    """All requests at once; the decode worker `kill` dies when a stream beside them has told some tokens."""
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=240.0) as client:

        async def one(index: int) -> Choices:
            answer = await client.post("/v1/completions", json=_body(index))
            assert answer.status_code == 200, answer.text
            choices: Choices = answer.json()["choices"]
            return choices

        async def kill_one(number: int) -> None:
            body = _body(0) | {"stream": True, "max_tokens": 600}
            async with client.stream("POST", "/v1/completions", json=body) as stream:
                lines = stream.aiter_lines()
                for _ in range(_LINES_BEFORE):
                    await anext(lines)
                cluster.programs("d-")[number].send_signal(signal.SIGKILL)

        tasks = [asyncio.ensure_future(one(index)) for index in range(len(LENGTHS))]
        if kill is not None:
            await kill_one(kill)
        return list(await asyncio.gather(*tasks))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_checkpoint(
        folder / "tiny", dtype="bfloat16", num_qo_heads=6, head_dim=64, num_layers=4, max_model_len=2048
    )


@pytest.fixture(scope="module")
def expected(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    return _alone(model_dir, tmp_path_factory.mktemp("log"))


def _alone(model_dir: Path, folder: Path) -> list[object]:
    with serve(model_dir, folder / "alone", *FLAGS, *ALONE) as cluster:
        alone = [cluster.post("/v1/completions", _body(index)) for index in range(len(LENGTHS))]
        assert all(str(answer["system_fingerprint"]).endswith("-exact") for answer in alone)
        assert cluster.metric("kvferry_draft_tokens_total") == 0
    return [answer["choices"] for answer in alone]


def _die_until_one_resumes(cluster: Cluster, expected: list[object]) -> None:
    """Kill decode workers until one died in the middle of a stream."""
    for number in range(_MAX_KILLS):
        assert asyncio.run(_together(cluster, kill=number % NUM_DECODE)) == expected
        wait_until(lambda: len(cluster.programs("d-")) == NUM_DECODE, "a new decode worker")
        if cluster.metric("kvferry_resumes_total") > 0:
            return
    raise AssertionError(f"{_MAX_KILLS} decode workers died, and no stream was resumed")


def test_answers_are_the_same_to_the_bit_though_tokens_are_drafted_and_a_decode_worker_dies(
    model_dir: Path, expected: list[object], tmp_path: Path
) -> None:
    _draft_and_die(model_dir, expected, tmp_path)


def test_states_are_never_behind_what_was_drafted_and_is_wrong(tmp_path: Path) -> None:
    """Where layers keep states what is right of a draft is fed again, over handoffs, choices and deaths."""
    model_dir = tmp_path / "states"
    write_exactness_model(model_dir, "qwen3_5_text")
    _draft_and_die(model_dir, _alone(model_dir, tmp_path), tmp_path, REMEMBERING)


def test_drafts_go_through_layers_that_keep_nothing(tmp_path: Path) -> None:
    """Such layers are computed of wanted tokens alone: all that were drafted, of prompts the last."""
    model_dir = tmp_path / "borrowing"
    write_exactness_model(model_dir, "gemma4_borrowing")
    _draft_and_die(model_dir, _alone(model_dir, tmp_path), tmp_path)


def _draft_and_die(model_dir: Path, expected: list[object], folder: Path, drafting: tuple[str, ...] = DRAFTING) -> None:
    with serve(model_dir, folder / "log", *FLAGS, *drafting) as cluster:
        assert asyncio.run(_together(cluster)) == expected
        wait_until(lambda: cluster.metric("kvferry_accepted_draft_tokens_total") > 0, "a draft that was right")
        assert cluster.metric("kvferry_draft_tokens_total") > cluster.metric("kvferry_accepted_draft_tokens_total")
        _die_until_one_resumes(cluster, expected)


def test_a_draft_models_kv_comes_with_the_prompts_and_answers_are_the_same(
    model_dir: Path, expected: list[object], tmp_path: Path
) -> None:
    """The model drafts for itself: at temperature 0 what it says is right, if its keys and values are."""
    config = json.dumps({"method": "draft_model", "model": str(model_dir), "num_speculative_tokens": 3})
    with serve(model_dir, tmp_path / "log", *FLAGS, *BY_MODEL, "--speculative-config", config) as cluster:
        greedy = _body(1) | {"temperature": 0.0, "n": 1, "frequency_penalty": 0.0, "logit_bias": None}
        for _ in range(3):
            cluster.post("/v1/completions", greedy)
        counters = ("kvferry_draft_tokens_total", "kvferry_accepted_draft_tokens_total")
        wait_until(lambda: 0 < cluster.metric(counters[0]) == cluster.metric(counters[1]), "drafts that all were right")
        assert asyncio.run(_together(cluster)) == expected
        assert cluster.metric("kvferry_draft_prompt_tokens_total") == 0
        _die_until_one_resumes(cluster, expected)


def test_ranks_share_a_draft_model_whose_kv_they_hand_over_each_its_part(model_dir: Path, tmp_path: Path) -> None:
    config = json.dumps({"method": "draft_model", "model": str(model_dir), "num_speculative_tokens": 3})
    ranks = ("--tensor-parallel-size", "2")
    with serve(model_dir, tmp_path / "alone", *FLAGS, *ALONE, *ranks) as cluster:
        expected = asyncio.run(_together(cluster))
        greedy = _body(1) | {"temperature": 0.0, "n": 1, "frequency_penalty": 0.0, "logit_bias": None}
        tokens = cluster.post("/v1/completions", greedy)["choices"]
    drafting = ("--no-local-prefill", "--speculative-config", config)
    with serve(model_dir, tmp_path / "drafting", *FLAGS, *drafting, *ranks) as cluster:
        assert cluster.post("/v1/completions", greedy)["choices"] == tokens
        counters = ("kvferry_draft_tokens_total", "kvferry_accepted_draft_tokens_total")
        wait_until(lambda: 0 < cluster.metric(counters[0]) == cluster.metric(counters[1]), "drafts that all were right")
        assert asyncio.run(_together(cluster)) == expected
        assert cluster.metric("kvferry_draft_prompt_tokens_total") == 0
