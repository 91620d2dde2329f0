"""Answers that follow grammars on a whole cluster: valid, the same wherever they are computed, and after a death."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from openai import OpenAI

from ..checkpoints import write_checkpoint
from .cluster import Cluster, serve, wait_until

FLAGS = ("--served-model-name", "tiny", "--dtype", "bfloat16", "--deterministic", "--decode", "2")
NUM_DECODE = 2
_MAX_KILLS = 5
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 12},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 7, None]}, "minItems": 1, "maxItems": 5},
        "size": {"anyOf": [{"type": "integer", "minimum": 5, "maximum": 5000}, {"type": "boolean"}]},
    },
    "required": ["name", "tags", "size"],
    "additionalProperties": False,
}
LONG = "([a-z]{1,6} ){40,60}end"  # some hundred tokens


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("grammars")
    model_dir = write_checkpoint(
        folder / "tiny", dtype="bfloat16", num_qo_heads=6, head_dim=64, num_layers=4, max_model_len=2048
    )
    with serve(model_dir, folder / "log", *FLAGS, "--kv-cache-memory-bytes", "32MiB") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> OpenAI:
    return OpenAI(base_url=f"{cluster.base_url}/v1", api_key="none", max_retries=0)


def _ask(client: OpenAI, text: str = "go", **fields: Any) -> list[tuple[str, str]]:
    """Return (finish reason, text) of each choice."""
    body = {"max_tokens": 400, "temperature": 1.0, "seed": 1, **fields}
    answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], **body)
    return [(str(choice.finish_reason), choice.message.content or "") for choice in answer.choices]


def test_answers_validate_over_handoffs_and_for_every_choice(cluster: Cluster, client: OpenAI) -> None:
    before = cluster.metric("kvferry_kv_transfer_bytes_count")
    strict = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}
    for seed in range(6):
        choices = _ask(client, f"prompt {seed}", response_format=strict, seed=seed, n=1 + seed % 3)
        assert len(choices) == 1 + seed % 3
        for finish, text in choices:
            assert finish == "stop"
            jsonschema.validate(json.loads(text), SCHEMA)
    assert cluster.metric("kvferry_kv_transfer_bytes_count") > before, "KV was handed over"


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"guided_choice": ["yes", "perhaps not"]}, "yes|perhaps not"),
        ({"guided_regex": "[0-9]{3}-[a-f]{2,4}"}, "[0-9]{3}-[a-f]{2,4}"),
        ({"guided_grammar": 'root ::= "<" [xy]+ ">"', "logit_bias": {}}, "<[xy]+>"),
        ({"structured_outputs": {"json": {"enum": ["é", 1.5]}}}, '"é"|1.5'),
        (
            {"structured_outputs": {"json": {"const": {"a": [1, "b c"]}}, "disable_any_whitespace": True}},
            re.escape('{"a":[1,"b c"]}'),
        ),
        ({"guided_regex": "[ab]{4}", "bad_words": ["a"]}, "b{4}"),
        ({"guided_regex": "[ab]{4}", "bad_words": ["a", "b"]}, "[ab]{4}"),
        ({"guided_regex": "[ab]{4}", "ignore_eos": True}, "[ab]{4}"),
        ({"guided_regex": "[ab]{4}", "min_tokens": 60}, "[ab]{4}"),
        ({"guided_regex": "[ab]{4}", "repetition_penalty": 1.5, "top_k": 3, "top_p": 0.5}, "[ab]{4}"),
    ],
)
def test_other_forms_are_followed_beside_other_rules(client: OpenAI, fields: dict[str, Any], wanted: str) -> None:
    for seed in range(3):
        [(finish, text)] = _ask(client, extra_body=fields, seed=seed)
        assert re.fullmatch(wanted, text) and finish == "stop"


def test_what_may_go_on_does_until_the_fewest_tokens_or_for_ever(client: OpenAI) -> None:
    [(finish, text)] = _ask(client, extra_body={"guided_regex": "[ab]+", "min_tokens": 20}, max_tokens=60)
    assert len(text) >= 20 and set(text) <= set("ab") and finish in ("stop", "length")
    [(finish, text)] = _ask(client, extra_body={"guided_regex": "[ab]+", "ignore_eos": True}, max_tokens=30)
    assert finish == "length" and set(text) <= set("ab")


def test_every_token_is_an_allowed_one(client: OpenAI) -> None:
    for seed in range(3):
        fields: dict[str, Any] = {"allowed_token_ids": [40, 41, 70], "return_token_ids": True}
        body: dict[str, Any] = {"model": "tiny", "prompt": "go", "max_tokens": 30, "seed": seed, "extra_body": fields}
        found: Any = client.completions.create(**body).choices[0]
        assert set(found.token_ids) == {40, 41, 70} and found.finish_reason == "length"
    fields["allowed_token_ids"].append(1)  # an end
    answers: Any = [client.completions.create(**{**body, "seed": seed}).choices[0] for seed in range(8)]
    assert {choice.finish_reason for choice in answers} >= {"stop"}
    assert all(set(choice.token_ids) <= {40, 41, 70, 1} for choice in answers)
    fields["ignore_eos"] = True
    answers = [client.completions.create(**{**body, "seed": seed}).choices[0] for seed in range(8)]
    assert {choice.finish_reason for choice in answers} == {"length"}
    assert any(1 in choice.token_ids[:-1] for choice in answers), "an end is a token like the others"
    fields["allowed_token_ids"] = [40, 5000]
    with pytest.raises(openai.BadRequestError, match="has id 5000, which is not below the vocabulary's"):
        client.completions.create(**body)


def test_bad_words_never_come(cluster: Cluster, client: OpenAI) -> None:
    fields: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
    body: dict[str, Any] = {"model": "tiny", "prompt": "go", "max_tokens": 40, "seed": 5}
    free: Any = client.completions.create(**body, extra_body=fields).choices[0]
    runs = [free.token_ids[:1], free.token_ids[3:5]]
    words = [str(cluster.post("/detokenize", {"tokens": run})["prompt"]) for run in runs]
    bound: Any = client.completions.create(**body, extra_body={**fields, "bad_words": words}).choices[0]
    found = ",".join(map(str, bound.token_ids))
    for word in words:
        for text in (word.lstrip(), f" {word.lstrip()}"):
            run = cluster.post("/tokenize", {"prompt": text})["tokens"]
            assert isinstance(run, list) and f",{','.join(map(str, run))}," not in f",{found},"


def test_an_answer_that_is_cut_says_so(client: OpenAI) -> None:
    [(finish, text)] = _ask(client, response_format={"type": "json_object"}, max_tokens=2)
    assert finish == "length" and text.startswith("{")


def test_a_stream_is_the_answer_and_log_probabilities_are_the_models(cluster: Cluster, client: OpenAI) -> None:
    fields: dict[str, Any] = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    }
    [(_, whole)] = _ask(client, seed=9, **fields)
    chunks = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "go"}],
        max_tokens=400,
        temperature=1.0,
        seed=9,
        stream=True,
        **fields,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    body = {"model": "tiny", "prompt": [9, 8, 7], "max_tokens": 1, "temperature": 0, "logprobs": 3}
    free = cluster.post("/v1/completions", body)["choices"]
    bound = cluster.post("/v1/completions", {**body, "guided_choice": ["z"]})["choices"]
    assert isinstance(free, list) and isinstance(bound, list) and bound[0]["text"] == "z"
    best, found = (choice["logprobs"]["top_logprobs"][0] for choice in (free[0], bound[0]))
    assert found.items() >= best.items() and found.keys() - best.keys() <= {"z"}, "the chosen one is reported besides"
    assert bound[0]["logprobs"]["token_logprobs"][0] <= free[0]["logprobs"]["token_logprobs"][0]


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"p{i}": {"type": "string"} for i in range(5000)}},
        {"enum": [f"{i}" for i in range(20_000)]},
        {"properties": {"a": {"not": {"pattern": "x"}}}},
        {"type": "string", "pattern": "(x{9000}y?){9000}"},
    ],
)
def test_a_hostile_schema_is_refused_while_others_are_served(client: OpenAI, schema: dict[str, Any]) -> None:
    began = time.monotonic()
    with pytest.raises(openai.BadRequestError) as caught:
        _ask(client, response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
    assert time.monotonic() - began < 30  # hung, whatever the machine does besides
    assert caught.value.code == "unsupported_grammar"
    assert str(caught.value.param).startswith("response_format.json_schema.schema")
    assert _ask(client, extra_body={"guided_choice": ["y"]}) == [("stop", "y")]


def _body(index: int) -> dict[str, object]:
    grammar: dict[str, object] = {"guided_json": SCHEMA} if index % 3 == 2 else {"guided_regex": LONG}
    return {
        "model": "tiny",
        "prompt": [(31 * i * i + 17 * i + 101 * index) % 500 + 4 for i in range(40 + 30 * index)],
        "max_tokens": 300,
        "n": 1 + index % 2,
        "seed": index,
        "temperature": 0.9,
        "frequency_penalty": 0.1 * index,
        "logprobs": 2,
        **grammar,
    }


async def _together(cluster: Cluster, *, kill: bool) -> list[object]:
    """All requests at once; with `kill` a decode worker dies when the first stream has begun."""
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=240.0) as client:

        async def one(index: int) -> object:
            answer = await client.post("/v1/completions", json=_body(index))
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"]

        async def kill_one() -> None:
            async with client.stream("POST", "/v1/completions", json=_body(0) | {"stream": True}) as stream:
                await anext(stream.aiter_bytes())
                cluster.programs("d-")[0].send_signal(signal.SIGKILL)

        tasks = [asyncio.ensure_future(one(index)) for index in range(6)]
        if kill:
            await kill_one()
        return list(await asyncio.gather(*tasks))


def test_answers_are_the_same_to_the_bit_though_a_decode_worker_dies(cluster: Cluster) -> None:
    expected = [cluster.post("/v1/completions", _body(index))["choices"] for index in range(6)]
    for index, choices in enumerate(expected):
        assert isinstance(choices, list)
        for choice in choices:
            if choice["finish_reason"] == "stop" and index % 3 != 2:
                assert re.fullmatch(LONG, choice["text"])
    assert asyncio.run(_together(cluster, kill=False)) == expected
    for _ in range(_MAX_KILLS):  # until one died in the middle of a stream
        before = cluster.metric("kvferry_resumes_total")
        assert asyncio.run(_together(cluster, kill=True)) == expected
        wait_until(lambda: len(cluster.programs("d-")) == NUM_DECODE, "a new decode worker")
        if cluster.metric("kvferry_resumes_total") > before:
            return
    raise AssertionError(f"{_MAX_KILLS} decode workers died, and no stream was resumed")
