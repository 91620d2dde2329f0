"""A batch goes on where it was when its router is killed: unmodified openai client, real workers, SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Batch

from ..checkpoints import write_checkpoint
from .cluster import Cluster, serve

MODEL = "tiny"
NUM_LINES, NUM_TOKENS = 200, 48
FLAGS = ("--served-model-name", MODEL, "--dtype", "float32", "--kv-cache-memory-bytes", "16MiB")
LIMIT_S = 240.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("batches")
    flags = (*FLAGS, "--max-batch-requests", "4", "--data-dir", str(folder / "data"))
    with serve(write_checkpoint(folder / MODEL), folder / "log", *flags) as found:
        yield found


def body(number: int) -> dict[str, Any]:
    prompt = f"{'A batch has a day. ' * (number % 4)}{number}"
    return {"model": MODEL, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}


def until(client: OpenAI, batch_id: str, num_done: int) -> Batch:
    """Ask until so many lines are done, or the batch has ended; a router may be away meanwhile."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        try:
            batch = client.batches.retrieve(batch_id)
        except openai.APIConnectionError:
            continue
        counts = batch.request_counts
        if batch.status not in ("validating", "in_progress", "finalizing") or (counts and counts.completed >= num_done):
            return batch
        time.sleep(0.05)
    raise AssertionError(f"batch {batch_id} did not get so far")


@pytest.mark.slow
def test_a_killed_router_answers_each_line_of_a_batch_once(cluster: Cluster) -> None:
    with OpenAI(base_url=f"{cluster.base_url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S) as client:
        lines = [
            {"custom_id": f"n-{number}", "method": "POST", "url": "/v1/completions", "body": body(number)}
            for number in range(NUM_LINES)
        ]
        data = b"".join(json.dumps(each).encode() + b"\n" for each in lines)
        uploaded = client.files.create(file=("in.jsonl", data), purpose="batch")
        batch = client.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h", metadata={"job": "x"}
        )
        at_kill = until(client, batch.id, 1)
        assert at_kill.status == "in_progress"
        [router] = cluster.programs("router")
        os.kill(router.pid, signal.SIGKILL)
        ended = until(client, batch.id, 1 << 30)
        assert ended.status == "completed" and ended.request_counts is not None and ended.error_file_id is None
        assert (ended.request_counts.completed, ended.metadata) == (NUM_LINES, {"job": "x"})
        assert ended.output_file_id is not None
        answers = [json.loads(each) for each in client.files.content(ended.output_file_id).text.splitlines()]
        assert [each["custom_id"] for each in answers] == [each["custom_id"] for each in lines]
        assert client.files.content(uploaded.id).content == data
        assert [each.id for each in client.batches.list()] == [batch.id]
        for number in (0, NUM_LINES // 2, NUM_LINES - 1):
            direct = cluster.post("/v1/completions", body(number))
            assert answers[number]["response"]["body"]["choices"] == direct["choices"]


@pytest.mark.slow
def test_others_are_served_while_a_batch_waits(cluster: Cluster) -> None:
    with OpenAI(base_url=f"{cluster.base_url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S) as client:
        long = {**body(1), "max_tokens": 200}
        lines = [
            {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": long}
            for number in range(400)
        ]
        uploaded = client.files.create(file=b"\n".join(map(str.encode, map(json.dumps, lines))), purpose="batch")
        batch = client.batches.create(input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h")
        until(client, batch.id, 1)
        direct = cluster.post("/v1/completions", body(2))
        assert direct["usage"]["completion_tokens"] == NUM_TOKENS  # type: ignore[index]
        client.batches.cancel(batch.id)
        ended = until(client, batch.id, 1 << 30)
        while ended.status == "cancelling":
            ended = client.batches.retrieve(batch.id)
        counts = ended.request_counts
        assert ended.status == "cancelled" and counts is not None and counts.completed + counts.failed == 400


@pytest.mark.slow
def test_embeddings_are_batched_too(cluster: Cluster) -> None:
    with OpenAI(base_url=f"{cluster.base_url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S) as client:
        lines = [
            {"custom_id": text, "method": "POST", "url": "/v1/embeddings", "body": {"model": MODEL, "input": text}}
            for text in ("one", "two")
        ]
        uploaded = client.files.create(file=b"\n".join(map(str.encode, map(json.dumps, lines))), purpose="batch")
        batch = client.batches.create(input_file_id=uploaded.id, endpoint="/v1/embeddings", completion_window="24h")
        ended = until(client, batch.id, 1 << 30)
        assert ended.status == "completed" and ended.output_file_id is not None
        answers = [json.loads(each) for each in client.files.content(ended.output_file_id).text.splitlines()]
        assert [each["custom_id"] for each in answers] == ["one", "two"]
        assert all(each["response"]["body"]["data"][0]["embedding"] for each in answers)
