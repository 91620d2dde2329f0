"""Bodies that are large, strange or forbidden: answered by name, and kept away from the event loop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Mapping

import pytest

from kvferry.common.errors import CapacityError, RequestError
from kvferry.router.helpers.json_parser import INLINE_BYTES, JsonParser

from ..router.fakes import MODEL, Script, events, serve

CHAT = [{"role": "user", "content": "hi"}]


async def _refused(body: Mapping[str, object] | bytes, status: int, path: str = "/v1/completions") -> dict[str, object]:
    served = serve()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with served.client() as client:
        response = await client.post(path, content=data, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert served.dispatcher.requests == []
    served.app.api.close()
    error: dict[str, object] = response.json()["error"]
    return error


# --- what the API does not do -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data/"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "http://localhost/"}},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "text", "text": "a", "url": "http://localhost/"},
    ],
)
async def test_nothing_is_ever_fetched_for_a_client(part: dict[str, object]) -> None:
    body = {"messages": [{"role": "user", "content": [part]}]}
    error = await _refused(body, 400, "/v1/chat/completions")
    assert error["code"] in ("unsupported_content", "unknown_parameter")
    assert str(error["param"]).startswith("messages[0].content[0]")


@pytest.mark.parametrize(
    "name", ["kv_transfer_params", "do_remote_prefill", "remote_block_ids", "remote_host", "bootstrap_host",
             "bootstrap_room", "vllm_xargs", "prompt_embeds", "grant", "chat_template"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_no_field_of_a_client_reaches_the_handoff_or_runs_code(name: str, path: str) -> None:
    what: dict[str, object] = {"messages": CHAT} if "chat" in path else {"prompt": "hi"}
    error = await _refused({**what, name: {"remote_engine_id": "x", "remote_host": "10.0.0.1"}}, 400, path)
    assert error["param"] == name and error["code"] in ("unknown_parameter", "unsupported_parameter")


@pytest.mark.parametrize(
    "fields",
    [{"n": 17}, {"n": 0}, {"best_of": 17}, {"logprobs": 21}, {"prompt_logprobs": 21}, {"stop": ["x"] * 65},
     {"stop": "x" * 257}, {"stop": [""]}, {"logit_bias": {str(i): 1 for i in range(301)}}, {"max_tokens": 10**12},
     {"min_tokens": 10**12}, {"stop_token_ids": list(range(65))}, {"cache_salt": "s" * 257}, {"top_k": 2**31},
     {"priority": 2**31}, {"seed": 2**63}, {"prompt": ["a"] * 257}, {"temperature": -1e300}],
)  # fmt: skip
async def test_every_knob_has_an_end(fields: dict[str, object]) -> None:
    error = await _refused({"prompt": "hi", **fields}, 400)
    assert len(str(error["message"])) < 500


@pytest.mark.parametrize(
    "value", [10**7, -(10**7), "x" * 20_000, [10**7], {"a": {"x" * 20_000: 1}}, [[[[[[[[[1]]]]]]]]]]
)
async def test_template_arguments_are_small(value: object) -> None:
    body = {"messages": CHAT, "chat_template_kwargs": {"thinking_budget": value}}
    assert "thinking_budget" in str((await _refused(body, 400, "/v1/chat/completions"))["message"])


# --- large ones -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["n", "stop", "seed", "model", "messages", "logit_bias", "temperature"])
async def test_a_wrong_value_of_a_megabyte_is_not_repeated(field: str) -> None:
    error = await _refused(b'{"prompt": "a", "%s": [%s1]}' % (field.encode(), b"[]," * 300_000), 400)
    assert len(str(error["message"])) < 500


async def test_objects_without_end_are_refused_by_their_number() -> None:
    error = await _refused(b'{"prompt": "a", "metadata": [' + b"{}," * 60_000 + b"{}]}", 413)
    assert "more than 50000 objects" in str(error["message"])


async def test_a_large_prompt_is_refused_by_its_size() -> None:
    assert (await _refused({"prompt": "a" * 8_000_000}, 400))["code"] == "context_length_exceeded"
    messages = [{"role": "user", "content": "a" * 10_000}] * 100
    assert (await _refused({"messages": messages}, 400, "/v1/chat/completions"))["code"] == "context_length_exceeded"
    assert (await _refused({"prompt": [5] * 200_000}, 400))["code"] == "context_length_exceeded"
    assert (await _refused({"tokens": [5] * 200_000}, 400, "/detokenize"))["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "tail",
    [b'"b": NaN}', b'"a": 1}', b'"b": "\\ud800"}', b'"b": "\xff"}', b'"b": ' + b"[" * 50 + b"]" * 50 + b"}", b'"b": }',
     b'"b": 1e999}'],
)  # fmt: skip
async def test_a_large_body_is_as_strictly_read_as_a_small_one(tail: bytes) -> None:
    parser = JsonParser()
    try:
        for size in (10, INLINE_BYTES):
            with pytest.raises(RequestError) as caught:
                await parser.parse(b'{"a": "' + b"x" * size + b'", ' + tail)
            assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    finally:
        parser.close()


async def test_a_large_body_says_what_a_small_one_says() -> None:
    parser = JsonParser()
    value = {"text": "ä\U0001f600" * INLINE_BYTES, "list": [1, -2.5, None, True, {"k": []}], "n": 2**63}
    try:
        for _ in range(2):  # by the same child
            assert await parser.parse(json.dumps(value).encode()) == value
    finally:
        parser.close()


@pytest.mark.parametrize("num_kills", [1, 2])
async def test_a_parser_that_died_is_replaced(num_kills: int) -> None:
    """Its body is parsed by the next one, unless that dies, too."""
    parser = JsonParser()
    body = json.dumps({"a": "x" * INLINE_BYTES}).encode()
    try:
        await parser.parse(body)
        pid = parser.helper.pid or 0
        os.kill(pid, signal.SIGSTOP)
        parsing = asyncio.create_task(parser.parse(body))
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        if num_kills == 1:
            assert await parsing == json.loads(body)
            return
        while parser.helper.pid in (None, pid):  # noqa: ASYNC110
            await asyncio.sleep(0)
        os.kill(parser.helper.pid or 0, signal.SIGKILL)
        with pytest.raises(CapacityError) as caught:
            await parsing
        assert caught.value.status == 503
        assert await parser.parse(body)
    finally:
        parser.close()


# --- others meanwhile -------------------------------------------------------------------------------------


async def test_a_batch_gives_way_to_others_while_it_is_submitted() -> None:
    served = serve(Script("ab"))
    async with served.client() as client:
        many = asyncio.create_task(client.post("/v1/completions", json={"prompt": ["a"] * 256, "max_tokens": 1}))
        while not served.dispatcher.requests:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert len(served.dispatcher.requests) < 256
        assert (await client.get("/live")).status_code == 200
        answer = (await many).json()
    assert len(answer["choices"]) == 256 and len(served.dispatcher.requests) == 256


@pytest.mark.parametrize("stream", [True, False])
async def test_what_piled_up_for_a_slow_reader_comes_whole_and_in_order(stream: bool) -> None:
    text = "".join(chr(97 + index % 26) for index in range(400))
    served = serve(Script(text, tokens_per_update=400))
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 450, "logprobs": 20, "n": 2, "stream": stream}
    async with served.client() as client:
        response = await client.post("/v1/completions", json=body)
    if not stream:
        assert [choice["text"] for choice in response.json()["choices"]] == [text, text]
        return
    assert response.text.endswith("data: [DONE]\n\n")
    pieces: dict[int, list[str]] = {0: [], 1: []}
    for event in events(response.text):
        choice = event["choices"][0]  # type: ignore[index]
        pieces[choice["index"]].append(choice["text"])
    assert ["".join(each) for each in pieces.values()] == [text, text]
    assert max(map(len, pieces[0])) <= 64
