"""Models whose logits are not finite: each request gets one error of its own, workers serve on.

`leaking`: a token whose embedding is NaN, as in a checkpoint with rows that were never trained; who uses it gets an
error. NaN in the head: nobody gets a token.
"""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..checkpoints import put_nan, write_checkpoint
from .cluster import Cluster, serve, wait_until

BAD_TOKEN = 300
FLAGS = ("--served-model-name", "tiny", "--dtype", "float32", "--kv-cache-memory-bytes", "16MiB")
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
SAMPLED: dict[str, Any] = {"temperature": 1.2, "seed": 5, "max_tokens": 12, "ignore_eos": True}
SOUND: dict[str, Any] = {"logit_bias": {str(BAD_TOKEN): -100}}


def _broken_model(path: Path, tensor: str, row: int) -> Path:
    return put_nan(write_checkpoint(path, vocab_size=416), tensor, row)


@pytest.fixture(scope="module")
def leaking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("leaking")
    with serve(_broken_model(root / "model", "model.embed_tokens.weight", BAD_TOKEN), root / "log", *FLAGS) as cluster:
        yield cluster


def _failure(cluster: Cluster, path: str = "/v1/completions", **body: object) -> str:
    """The one error that the request gets, whole or as the last event of its stream."""
    answer = cluster.client.post(path, json={"model": "tiny", **body})
    if body.get("stream"):
        assert answer.status_code in (200, 500)
        assert "[DONE]" not in answer.text
        error = json.loads(answer.text.strip().rpartition("data: ")[2])["error"]
    else:
        assert answer.status_code == 500 and answer.headers["x-should-retry"] == "false"
        error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("nonfinite_logits", "server_error")
    assert "NaN" not in answer.text.replace("are NaN or infinite", "")
    return str(error["message"])


def _assert_quiet(cluster: Cluster, pids: list[int], num_failed: int) -> None:
    """Every block is back, nobody ended, nothing was tried again or held against a worker."""
    for state in ("active", "granted", "quarantined"):
        wait_until(lambda state=state: cluster.metric("kvferry_blocks", f'state="{state}"') == 0, f"no block {state}")
    assert [process.pid for process in cluster.children("kvferry.worker")] == pids
    assert cluster.metric("kvferry_retries_total") == cluster.metric("kvferry_poisoned_total") == 0
    wait_until(lambda: cluster.metric("kvferry_nonfinite_rows_total") == num_failed, "every row is counted")


def test_who_uses_a_broken_token_gets_an_error_and_nobody_else(leaking: Cluster) -> None:
    pids = [process.pid for process in leaking.children("kvferry.worker")]
    sound = [[(7 * i * i + 13 * n) % 290 + 4 for i in range(20 + 7 * n)] for n in range(6)]

    def say(prompt: list[int]) -> list[object]:
        kinds: list[dict[str, Any]] = [GREEDY, {**SAMPLED, "logprobs": 3}]
        return [leaking.post("/v1/completions", {"prompt": prompt, **kind, **SOUND}) for kind in kinds]

    def text(answers: list[object]) -> list[str]:
        return [answer["choices"][0]["text"] for answer in answers]  # type: ignore[index]

    expected = [text(say(prompt)) for prompt in sound]
    bad = [
        {"prompt": [5, 6, BAD_TOKEN, 7], **GREEDY},  # on the prefill worker
        {"prompt": [5, 6, BAD_TOKEN, 7], **SAMPLED, "n": 3, "stream": True},
        {"prompt": [*sound[0][:18], BAD_TOKEN], **SAMPLED, "logprobs": 2},
        {"prompt": [*sound[0][:18], BAD_TOKEN, *sound[1]], **GREEDY, "prompt_logprobs": 2},
        {"prompt": [BAD_TOKEN, *sound[2]], "max_tokens": 0, "echo": True, "logprobs": 1},
        {"prompt": sound[3], **GREEDY, "logit_bias": {str(BAD_TOKEN): 100}},  # chosen, then fed on the decode worker
        {"prompt": sound[4], **GREEDY, "logit_bias": {str(BAD_TOKEN): 100}, "stream": True, "n": 2},
        {"prompt": [sound[5], [BAD_TOKEN, 9]], **GREEDY},
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        failures = [pool.submit(_failure, leaking, **body) for body in bad * 2]
        answers = [pool.submit(say, prompt) for prompt in sound * 2]
        assert all("NaN or infinite" in failure.result() for failure in failures)
        assert [text(answer.result()) for answer in answers] == expected * 2
    assert [text(say(prompt)) for prompt in sound] == expected, "what they left in caches and blocks is of no effect"
    num_rows = len(bad) * 2 + 2  # one body streams two choices, whose rows fail in one step
    _assert_quiet(leaking, pids, num_rows)
    assert leaking.metric("kvferry_nonfinite_rows_total", 'pool="prefill"') == 12
    assert leaking.metric("kvferry_nonfinite_rows_total", 'pool="decode"') == 6


def test_extreme_temperatures_and_penalties_are_answered(leaking: Cluster) -> None:
    """In a well-formed body nothing may end a worker: these did."""
    pids = [process.pid for process in leaking.children("kvferry.worker")]
    prompt = [5, 6, 7, 8]
    greedy = leaking.post("/v1/completions", {"prompt": prompt, **GREEDY, **SOUND})["choices"]
    for extreme in (
        {"temperature": 5e-324},
        {"temperature": 1e-38},
        {"temperature": 9e-6},
        {"temperature": 1e-30, "repetition_penalty": 1e-10},
        {"temperature": 0.5, "repetition_penalty": 1e-39},
    ):
        answer = leaking.post("/v1/completions", {"prompt": prompt, **SAMPLED, **SOUND, "logprobs": 1, **extreme})
        choices: Any = answer["choices"]
        assert choices[0]["finish_reason"] == "length"
        if "repetition_penalty" not in extreme:
            assert choices[0]["text"] == greedy[0]["text"]  # type: ignore[index]
    assert [process.pid for process in leaking.children("kvferry.worker")] == pids


@pytest.mark.parametrize("prefill", [0, 1])
def test_a_model_that_gives_nobody_a_token_ends_no_worker(tmp_path: Path, prefill: int) -> None:
    model = _broken_model(tmp_path / "model", "lm_head.weight", 17)
    flags = (*FLAGS, "--prefill", str(prefill), "--deterministic")
    with serve(model, tmp_path / "log", *flags) as cluster:
        pids = [process.pid for process in cluster.children("kvferry.worker")]
        messages = [{"role": "user", "content": "hi"}]
        bodies: list[tuple[str, dict[str, Any]]] = [
            ("/v1/completions", {"prompt": [5, 6, 7], **GREEDY}),
            ("/v1/completions", {"prompt": [5, 6, 7], **SAMPLED, "stream": True}),
            ("/v1/chat/completions", {"messages": messages, **GREEDY}),
            ("/v1/chat/completions", {"messages": messages, **SAMPLED, "logprobs": True, "top_logprobs": 2, "n": 2}),
        ]
        for path, body in bodies:
            _failure(cluster, path, **body)
        _assert_quiet(cluster, pids, len(bodies))
