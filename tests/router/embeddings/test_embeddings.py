"""/v1/embeddings over a scripted dispatcher, in process: OpenAI's shape, its bounds, its errors."""

from __future__ import annotations

import asyncio
import base64
from array import array
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from openai import AsyncOpenAI

from kvferry.common.request import Pooling
from kvferry.models.pooling import EmbeddedTexts
from kvferry.router.api.body import MAX_VECTOR_BYTES
from kvferry.router.catalogue.version import ServedModel
from kvferry.router.embeddings import reply
from kvferry.router.state.errors import StreamError
from kvferry.router.state.request import RequestStatus, RouterRequest
from kvferry.router.state.token_stream import TokenStream

from ..fakes import MAX_MODEL_LEN, MODEL, VOCAB_SIZE, FakeDispatcher, Script, Served, ids_of, listening, serve

HIDDEN = 4
SERVED = ServedModel(MODEL, MAX_MODEL_LEN, VOCAB_SIZE, hidden_size=HIDDEN)


def _vector(request: RouterRequest) -> list[float]:
    """A vector of length 1 whose direction tells the prompt's length."""
    return [0.5, 0.5, 0.5, 0.5] if len(request.prompt_token_ids) % 2 else [0.6, 0.0, 0.8, 0.0]


async def _play(self: FakeDispatcher, request: RouterRequest, stream: TokenStream) -> None:
    await self._maybe_hold(0)
    if request.is_finished:
        return
    if self.script.fail_after == 0:
        request.advance(RequestStatus.FAILED, self.clock.now())
        stream.fail(self.script.error)
        return
    request.timestamps["prefill_start"] = self.clock.now()
    request.end_embedded(array("f", _vector(request)).tobytes(), self.clock.now())
    request.advance(RequestStatus.FINISHED, self.clock.now())
    stream.wake()


@pytest.fixture(autouse=True)
def embedding_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDispatcher, "_play", _play)


def _serve(script: Script | None = None, model: ServedModel = SERVED, **options: object) -> Served:
    return serve(script, (), model=model, **options)


async def _embed(served: Served, **fields: Any) -> dict[str, Any]:
    async with served.client() as client:
        response = await client.post("/v1/embeddings", json={"model": MODEL, "input": "hi", **fields})
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


async def _refused(served: Served, status: int = 400, **fields: Any) -> dict[str, Any]:
    async with served.client() as client:
        response = await client.post("/v1/embeddings", json={"input": "hi", **fields})
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_an_embedding_has_openais_shape() -> None:
    served = _serve()
    assert await _embed(served) == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": pytest.approx([0.6, 0.0, 0.8, 0.0])}],
        "model": MODEL,
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
    }
    assert served.request.prompt_token_ids == ids_of("hi")
    assert served.request.pooling is Pooling.LAST and served.request.n == 1


async def test_base64_is_float32_in_little_endian_order() -> None:
    [item] = (await _embed(_serve(), encoding_format="base64"))["data"]
    assert array("f", base64.b64decode(item["embedding"])).tolist() == pytest.approx([0.6, 0.0, 0.8, 0.0])


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("hi", ["hi"]),
        (["a", "bb", "ccc"], ["a", "bb", "ccc"]),
        ([104, 105], ["hi"]),
        ([[104], [105, 105]], ["h", "ii"]),
    ],
)
async def test_every_form_of_input_is_as_many_requests(given: object, prompts: list[str]) -> None:
    served = _serve()
    answer = await _embed(served, input=given)
    assert [request.prompt_token_ids for request in served.dispatcher.requests] == list(map(ids_of, prompts))
    assert [item["index"] for item in answer["data"]] == list(range(len(prompts)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    for item, request in zip(answer["data"], served.dispatcher.requests, strict=True):
        assert item["embedding"] == pytest.approx(_vector(request))


@pytest.mark.parametrize(("dimensions", "expected"), [(1, [1.0]), (2, [1.0, 0.0]), (4, [0.6, 0.0, 0.8, 0.0])])
async def test_dimensions_cut_and_scale(dimensions: int, expected: list[float]) -> None:
    [item] = (await _embed(_serve(), dimensions=dimensions))["data"]
    assert item["embedding"] == pytest.approx(expected)


async def test_the_models_pooling_goes_to_the_workers() -> None:
    served = _serve(model=replace(SERVED, pooling=Pooling.MEAN))
    await _embed(served)
    assert served.request.pooling is Pooling.MEAN


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": ""}, "input", "input is empty"),
        ({"input": ["a", ""]}, "input[1]", "input[1] is empty"),
        ({"input": [[1], []]}, "input[1]", "not be empty, got an array of 0"),
        ({"input": [[1], [2, "a"], []]}, "input[1]", "a list of token-id lists"),
        ({"input": [None, "a"]}, "input[0]", "must be a string"),
        ({"input": ["a", "x" * 513, "b"]}, "input[1]", "input[1] has 513 tokens, more than the context of 512"),
        ({"input": ["a", "x" * 99_999]}, "input[1]", "input[1]: the prompt has at least"),
        ({"input": [[5] * 513]}, "input[0]", "input[0] has 513 tokens"),
        ({"input": [[5] * 513]}, "input[0]", "This model's maximum context length is 512 tokens"),
        ({"input": [[5], [6, VOCAB_SIZE]]}, "input[1]", f"input[1]: token id {VOCAB_SIZE} is not in the vocabulary"),
        ({"input": [5, -1]}, "input", "input: token id -1"),
        ({"input": ["a"] * 2049}, "input", "at most 2048 inputs in one call, got 2049"),
        ({"input": ["a", 5]}, "input[1]", "'input[1]': 'input' must be a string"),
        ({"input": [5, 6, True]}, "input[2]", "got True"),
        ({"input": []}, "input", "not be empty"),
        ({"dimensions": 5}, "dimensions", "less than or equal to 4, the length of this model's vectors, got 5"),
        ({"dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"temperature": 1}, "temperature", "unknown field"),
        ({"truncate_prompt_tokens": 513}, "truncate_prompt_tokens", "513 is more than the context of 512 tokens"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1, or -1 for the context, got 0"),
        ({"truncate_prompt_tokens": 5, "truncation_side": "middle"}, "truncation_side", "'left' or 'right'"),
        ({"input": ["a", ""], "truncate_prompt_tokens": 5}, "input[1]", "input[1] is empty"),
    ],
)
async def test_what_is_wrong_is_named(fields: dict[str, Any], param: str, words: str) -> None:
    served = _serve()
    error = await _refused(served, **fields)
    assert error["param"] == param and words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not served.dispatcher.requests


async def test_another_model_is_not_found() -> None:
    assert (await _refused(_serve(), 404, model="gpt"))["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("given", "fields", "kept"),
    [
        ("abcdef", {"truncate_prompt_tokens": 4}, ["abcd"]),
        (["abcdef", "ab"], {"truncate_prompt_tokens": 4, "truncation_side": "left"}, ["cdef", "ab"]),
        (ids_of("abcdef"), {"truncate_prompt_tokens": 4}, ["abcd"]),
        ([ids_of("abcdef")], {"truncate_prompt_tokens": 4.0, "truncation_side": "left"}, ["cdef"]),
        ("a" + "b" * 99_999, {"truncate_prompt_tokens": -1}, ["a" + "b" * 511]),
        ("a" * 99_999 + "b", {"truncate_prompt_tokens": -1, "truncation_side": "left"}, ["a" * 511 + "b"]),
    ],
)
async def test_inputs_are_cut_to_what_is_asked_for(given: object, fields: dict[str, Any], kept: list[str]) -> None:
    served = _serve()
    answer = await _embed(served, input=given, **fields)
    assert [bytes(request.prompt_token_ids).decode() for request in served.dispatcher.requests] == kept
    assert answer["usage"]["prompt_tokens"] == sum(map(len, kept))


async def test_labels_have_no_effect_and_unknown_fields_may_be_told() -> None:
    await _embed(_serve(), user="u-1", metadata={"a": "b"}, input_type="query", dimensions=4.0)
    served = _serve(unknown_fields="warn")
    async with served.client() as client:
        response = await client.post("/v1/embeddings", json={"input": "hi", "task_type": "query"})
    assert response.status_code == 200 and response.headers["x-kvferry-ignored"] == "task_type"


async def test_a_failure_is_an_error_of_the_call() -> None:
    script = Script(fail_after=0, error=StreamError("worker p-1 was lost", "worker_lost", 503))
    assert (await _refused(_serve(script), 503, input=["a", "b"]))["code"] == "worker_lost"


async def test_a_call_is_logged_counted_and_charged() -> None:
    served = _serve()
    await _embed(served, input=["a", "bb"])
    text = served.metrics.scrape([], num_in_flight=0)()[0].decode()
    assert "kvferry_prompt_tokens_total 3.0" in text and "kvferry_generation_tokens_total 0.0" in text
    assert 'kvferry_request_success_total{finished_reason="stop"} 2.0' in text
    for request in served.dispatcher.requests:
        served.metrics.on_finished(request)
    assert "kvferry_embeddings_total 2.0" in served.metrics.scrape([], num_in_flight=0)()[0].decode()


async def test_a_client_that_leaves_aborts_all_of_its_inputs() -> None:
    served = _serve(Script(hold_at=0))
    async with served.client() as client:
        call = asyncio.create_task(client.post("/v1/embeddings", json={"input": ["a", "b", "c"]}))
        await served.dispatcher.held.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(served.dispatcher.requests) == 3
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    assert len(served.dispatcher.aborted) == 3


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
async def test_large_vectors_are_told_one_by_one_and_as_small_ones_are(
    monkeypatch: pytest.MonkeyPatch, encoding_format: str
) -> None:
    encode, most = msgspec.json.encode, 0

    def noting(value: Any) -> bytes:
        nonlocal most
        encoded: bytes = encode(value)
        most = max(most, len(encoded))
        return encoded

    fields = {"input": ["a"] * 100, "encoding_format": encoding_format}
    expected = await _embed(_serve(), **fields)
    monkeypatch.setattr(reply, "_BYTES_INLINE", 100)
    monkeypatch.setattr(reply, "_GROUP_BYTES", 1000)
    monkeypatch.setattr(msgspec.json, "encode", noting)
    async with _serve().client() as client:
        response = await client.post("/v1/embeddings", json={"model": MODEL, **fields})
    monkeypatch.undo()
    assert response.status_code == 200 and response.json() == expected
    assert "content-length" not in response.headers and response.headers["content-type"] == "application/json"
    assert most < 1000 < len(response.content), "one call encoded more than a vector"


async def test_the_vectors_of_all_calls_have_a_bound() -> None:
    served = _serve(Script(hold_at=0), model=replace(SERVED, hidden_size=MAX_VECTOR_BYTES // 4 // 3))
    async with served.client() as client:
        first = asyncio.create_task(client.post("/v1/embeddings", json={"input": ["a", "b"]}))
        await served.dispatcher.held.wait()
        refused = await client.post("/v1/embeddings", json={"input": ["c", "d"]})
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert "the vectors under way have" in refused.json()["error"]["message"]
        assert len(served.dispatcher.requests) == 2
        served.dispatcher.go.set()
        assert (await first).status_code == 200
        assert (await client.post("/v1/embeddings", json={"input": ["e", "f", "g"]})).status_code == 200


async def test_vectors_give_back_their_room_when_an_answer_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    served, groups = _serve(), iter([b"[", b""])
    room = served.app.api.vector_room

    def next_group(_: object) -> bytes:
        assert room.num_bytes == 2 * HIDDEN * 4
        if group := next(groups):
            return group
        raise OSError("no thread is free")

    monkeypatch.setattr(reply, "_BYTES_INLINE", 0)
    monkeypatch.setattr(reply, "_next_group", next_group)
    async with served.client() as client:
        with pytest.raises(OSError, match="no thread"):  # the head is out: the connection is broken off
            await client.post("/v1/embeddings", json={"input": ["a", "b"]})
    assert room.num_bytes == 0 and len(served.app.api.in_flight) == 0


async def test_texts_are_as_long_and_as_small_as_the_model_has_learnt() -> None:
    served = _serve(model=replace(SERVED, embedded_texts=EmbeddedTexts(max_tokens=4, are_lower_case=True)))
    answer = await _embed(served, input=["H\u00c4", "ABCD"])
    assert [bytes(request.prompt_token_ids).decode() for request in served.dispatcher.requests] == ["h\u00e4", "abcd"]
    assert answer["usage"]["prompt_tokens"] == 7
    for given in (["ABCDE"], [ids_of("abcde")]):
        error = await _refused(served, input=given)
        assert "input[0] has 5 tokens" in error["message"] and error["code"] == "context_length_exceeded"
        assert "maximum context length is 4 tokens" in error["message"]
    assert (await _embed(served, input="ABCDE", truncate_prompt_tokens=-1))["usage"]["prompt_tokens"] == 4
    async with served.client() as client:
        chat = await client.post("/v1/completions", json={"prompt": "ABCDE", "max_tokens": 1})
    assert bytes(served.dispatcher.requests[-1].prompt_token_ids) == b"ABCDE", chat.text


def _openai(address: str) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="none", base_url=f"http://{address}/v1", max_retries=0)


async def test_openais_client_reads_it() -> None:
    served = _serve()
    async with listening(served.app) as address, _openai(address) as client:
        answer = await client.embeddings.create(model=MODEL, input=["hi", "a"], dimensions=2)  # base64, by its default
        assert [item.embedding for item in answer.data] == [pytest.approx([1.0, 0.0]), pytest.approx([0.5**0.5] * 2)]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == 3
