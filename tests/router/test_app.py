"""The HTTP interface over a scripted dispatcher, in process: answers, errors, headers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvferry import __version__
from kvferry.common.errors import CapacityError, RequestError
from kvferry.common.router_config import SpecialTokens
from kvferry.models.pooling import EmbeddedTexts
from kvferry.router.catalogue.defaults import SamplingDefaults
from kvferry.router.catalogue.version import ServedModel

from .fakes import (
    EOS,
    MAX_MODEL_LEN,
    MODEL,
    PROMPT_RANK,
    VOCAB_SIZE,
    Script,
    Served,
    events,
    ids_of,
    listening,
    serve,
    texts,
    use_template,
)

CHAT = [{"role": "user", "content": "hi"}]


async def _complete(served: Served, **fields: Any) -> dict[str, Any]:
    async with served.client() as client:
        response = await client.post("/v1/completions", json={"model": MODEL, "prompt": "hi", **fields})
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


async def _chat(served: Served, **fields: Any) -> dict[str, Any]:
    async with served.client() as client:
        response = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": CHAT, **fields})
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


async def _stream(served: Served, path: str = "/v1/completions", **fields: Any) -> list[dict[str, Any]]:
    what = {"messages": CHAT} if "chat" in path else {"prompt": "hi"}
    async with served.client() as client:
        response = await client.post(path, json={**what, "stream": True, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    return events(response.text)


async def _refused(served: Served, status: int, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    what = {"messages": CHAT} if "chat" in path else {"prompt": "hi"}
    async with served.client() as client:
        response = await client.post(path, json={**what, **fields})
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# --- completions ------------------------------------------------------------------------------------------


async def test_a_completion_has_openais_shape() -> None:
    served = serve(Script("Hello"))
    answer = await _complete(served)
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion" and answer["model"] == MODEL
    assert answer["system_fingerprint"].startswith("kvferry-") and answer["system_fingerprint"].endswith("-fast")
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 6,  # the end token was computed too
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert served.request.prompt_token_ids == ids_of("hi")


async def test_exact_answers_say_that_they_are() -> None:
    model = ServedModel(MODEL, MAX_MODEL_LEN, VOCAB_SIZE, deterministic=True)
    served = serve(Script("Hello"), model=model)
    for answer in (await _complete(served), await _chat(served)):
        assert answer["system_fingerprint"].endswith("-exact")


async def test_a_completion_ends_after_16_tokens_by_default() -> None:
    answer = await _complete(serve(Script("x" * 50)))
    assert answer["choices"][0]["text"] == "x" * 16
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_the_default_is_cut_to_what_the_context_has_left() -> None:
    served = serve(Script("x" * 50))
    await _complete(served, prompt="y" * (MAX_MODEL_LEN - 5))
    assert served.request.sampling.max_tokens == 5


async def test_a_batch_of_prompts_numbers_its_choices_through() -> None:
    served = serve(Script(numbered=True, choose=lambda request: f"{len(request.prompt_token_ids)}-"))
    answer = await _complete(served, prompt=["a", "bb", "ccc"], n=2)
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [
        (0, "1-0"), (1, "1-1"), (2, "2-0"), (3, "2-1"), (4, "3-0"), (5, "3-1"),
    ]  # fmt: skip
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["completion_tokens"] == 6 * 4


@pytest.mark.parametrize("prompt", [[104, 105], [[104, 105]]])
async def test_a_prompt_may_be_token_ids(prompt: list[Any]) -> None:
    served = serve()
    await _complete(served, prompt=prompt)
    assert served.request.prompt_token_ids == [104, 105]


async def test_token_ids_must_be_in_the_vocabulary() -> None:
    for ids in ([VOCAB_SIZE], [-1, 4]):
        error = await _refused(serve(), 400, prompt=ids)
        assert "vocabulary of 260" in error["message"]


async def test_echo_puts_the_prompt_before_the_text() -> None:
    served = serve(Script("!"))
    assert (await _complete(served, echo=True))["choices"][0]["text"] == "hi!"
    assert (await _complete(served, echo=True, prompt=ids_of("ho")))["choices"][0]["text"] == "ho!"
    chunks = await _stream(served, echo=True)
    assert texts(chunks) == ["hi", "!", ""]


@pytest.mark.parametrize(("fields", "told"), [({}, "ho!"), ({"skip_special_tokens": False}, "h</s>o!")])
async def test_special_tokens_of_an_echoed_prompt_are_skipped_as_those_of_answers_are(
    fields: dict[str, Any], told: str
) -> None:
    served = serve(Script("!", ends_with_eos=False))
    fields = {"prompt": [*ids_of("h"), EOS, *ids_of("o")], "echo": True, "max_tokens": 1, "logprobs": 0, **fields}
    (choice,) = (await _complete(served, **fields))["choices"]
    assert choice["text"] == told and choice["logprobs"]["text_offset"][-1] == len(told) - 1
    assert "".join(chunk["choices"][0]["text"] for chunk in await _stream(served, **fields)) == told


async def test_echo_alone_computes_but_delivers_nothing() -> None:
    served = serve(Script("abc"))
    answer = await _complete(served, echo=True, max_tokens=0, logprobs=1)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
    assert choice["logprobs"]["tokens"] == ["h", "i"]
    assert answer["usage"]["completion_tokens"] == 0


async def test_completion_logprobs() -> None:
    answer = await _complete(serve(Script("ab")), logprobs=2)
    assert answer["choices"][0]["logprobs"] == {
        "text_offset": [0, 1, 2],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "tokens": ["a", "b", "</s>"],
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {"b": -0.5, "c": -1.5}, {"\x00": -0.5, "\x01": -1.5, "</s>": -0.5}],
    }


async def test_tokens_that_read_the_same_are_told_apart_by_their_ids() -> None:
    fields = {"logprobs": 20, "max_tokens": 1, "echo": True}
    script = Script("\x7f", ends_with_eos=False)  # 20 alternatives from 127 on: all but the first are no text alone
    by_text = (await _complete(serve(script), **fields))["choices"][0]["logprobs"]
    assert len(by_text["top_logprobs"][-1]) == 2
    answer = await _complete(serve(script), **fields, return_tokens_as_token_ids=True)
    by_id = answer["choices"][0]["logprobs"]
    assert by_id["tokens"] == ["token_id:104", "token_id:105", "token_id:127"]
    assert by_id["top_logprobs"][-1] == {f"token_id:{127 + rank}": -0.5 - rank for rank in range(20)}
    assert by_id["text_offset"] == by_text["text_offset"]
    chat = await _chat(serve(script), logprobs=True, top_logprobs=2, max_tokens=1, return_tokens_as_token_ids=True)
    (token,) = chat["choices"][0]["logprobs"]["content"]
    assert token["token"] == "token_id:127" and token["bytes"] == [127]
    assert [top["token"] for top in token["top_logprobs"]] == ["token_id:127", "token_id:128"]


async def test_echoed_logprobs_begin_with_null_and_count_offsets_through() -> None:
    served = serve(Script("a", ends_with_eos=False))
    for chunks in (
        [await _complete(served, echo=True, logprobs=0, max_tokens=1)],
        await _stream(served, echo=True, logprobs=0, max_tokens=1),
    ):
        found = [c["choices"][0]["logprobs"] for c in chunks]
        assert [token for part in found for token in part["tokens"]] == ["h", "i", "a"]
        assert [value for part in found for value in part["token_logprobs"]] == [None, -0.5, -0.5]
        assert [offset for part in found for offset in part["text_offset"]] == [0, 1, 2]


async def test_offsets_count_special_tokens_that_the_prompt_spells() -> None:
    served = serve(Script("a", ends_with_eos=False))
    for num_choices in (1, 2):
        chunks = await _stream(served, prompt="h</s>i", echo=True, logprobs=0, max_tokens=1, n=num_choices)
        first = next(chunk["choices"][0] for chunk in chunks)
        assert (first["text"], first["logprobs"]["text_offset"]) == ("h</s>i", [0, 1, 5])
        assert chunks[-1]["choices"][0]["logprobs"]["text_offset"] == [6]


async def test_a_long_prompts_names_are_looked_up_on_a_thread_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"prompt": "h" * 200, "echo": True, "logprobs": 0, "max_tokens": 2, "n": 3}
    inline = await _stream(serve(Script("ab")), **fields)
    threads: list[object] = []

    async def to_thread(function: Callable[..., bytes], *args: object) -> bytes:
        threads.append(function)
        return await asyncio.get_running_loop().run_in_executor(None, function, *args)

    monkeypatch.setattr("kvferry.router.api.reply._NAMED_INLINE", 500)
    monkeypatch.setattr("asyncio.to_thread", to_thread)
    aside = await _stream(serve(Script("ab")), **fields)
    assert [chunk["choices"] for chunk in aside] == [chunk["choices"] for chunk in inline]
    assert 1 <= len(threads) <= 3  # as choices begin, and not with every token


async def test_prompt_logprobs_in_vllms_form() -> None:
    answer = await _complete(serve(Script("a")), prompt_logprobs=1)
    first, second = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    assert second == {str(ord("i")): {"logprob": -0.5, "rank": 1, "decoded_token": "i"}}
    [_, alone] = (await _complete(serve(Script("a")), prompt_logprobs=0))["choices"][0]["prompt_logprobs"]
    assert alone == {str(ord("i")): {"logprob": -0.5, "rank": PROMPT_RANK, "decoded_token": "i"}}


async def test_token_ids_on_request() -> None:
    served = serve(Script("a"))
    choice = (await _complete(served, return_token_ids=True))["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids_of("hi"), [97, EOS])
    chunks = [chunk["choices"][0] for chunk in await _stream(served, return_token_ids=True)]
    assert chunks[0]["prompt_token_ids"] == ids_of("hi")
    assert [token_id for chunk in chunks[1:] for token_id in chunk["token_ids"]] == [97, EOS]


async def test_a_stop_string_cuts_the_text_and_ends_the_choice_at_the_workers() -> None:
    served = serve(Script("one two three", ends_with_eos=False))
    answer = await _complete(served, stop=["two", "x"], max_tokens=50)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one ", "stop", "two")
    assert answer["usage"]["completion_tokens"] == len("one two")
    assert served.dispatcher.finished_choices == [(served.request.request_id, 0)]


async def test_a_stop_string_is_kept_on_request_and_not_before_min_tokens() -> None:
    served = serve(Script("a.b.c", ends_with_eos=False))
    assert (await _complete(served, stop=".", include_stop_str_in_output=True))["choices"][0]["text"] == "a."
    assert (await _complete(served, stop=".", min_tokens=3))["choices"][0]["text"] == "a.b"


async def test_special_tokens_are_hidden_unless_asked_for() -> None:
    served = serve(Script("ab"))
    answer = await _complete(served, ignore_eos=True)
    assert answer["choices"][0]["text"] == "ab"
    answer = await _complete(served, skip_special_tokens=False, include_stop_str_in_output=True)
    assert answer["choices"][0]["text"] == "ab</s>"


async def test_a_seed_is_drawn_where_none_is_given() -> None:
    served = serve()
    await _complete(served)
    first = served.request.sampling.seed
    await _complete(served)
    assert served.request.sampling.seed != first
    await _complete(served, seed=42)
    assert served.request.sampling.seed == 42


async def test_scheduling_fields_reach_the_dispatcher() -> None:
    served = serve()
    await _complete(served, priority=-3, cache_salt="tenant", n=3)
    assert (served.request.priority, served.request.cache_salt, served.request.n) == (-3, b"tenant", 3)


async def test_the_models_defaults_apply() -> None:
    model = ServedModel(MODEL, MAX_MODEL_LEN, VOCAB_SIZE, SamplingDefaults(temperature=0.6))
    served = serve(model=model)
    await _complete(served)
    assert served.request.sampling.temperature == 0.6


async def test_cached_tokens_are_in_the_usage() -> None:
    answer = await _complete(serve(Script(num_cached_tokens=1)))
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


# --- chat -------------------------------------------------------------------------------------------------


async def test_a_chat_completion_has_openais_shape() -> None:
    served = serve(Script("Hello"))
    answer = await _chat(served)
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert served.request.prompt_token_ids == ids_of("<user>hi<assistant>")


async def test_a_chat_may_use_the_rest_of_the_context() -> None:
    served = serve()
    await _chat(served)
    assert served.request.sampling.max_tokens == MAX_MODEL_LEN - len("<user>hi<assistant>")


async def test_an_answer_takes_no_more_than_a_worker_holds() -> None:
    served = serve()
    served.dispatcher.room = 50
    room = 50 - len("<user>hi<assistant>")
    for asked, taken in ((None, room), (room + 30, room), (room - 1, room - 1)):
        await _chat(served, max_tokens=asked)
        assert served.request.sampling.max_tokens == taken
    await _complete(served, prompt="x" * 40, max_tokens=60)
    assert served.request.sampling.max_tokens == 10


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_a_chat_may_be_limited_by_either_name(field: str) -> None:
    answer = await _chat(serve(Script("Hello")), **{field: 2})
    assert answer["choices"][0]["message"]["content"] == "He"


@pytest.mark.parametrize("fields", [{"max_completion_tokens": 2}, {"max_tokens": 2, "max_completion_tokens": 2}])
async def test_a_completion_may_be_limited_by_a_chats_name_too(fields: dict[str, int]) -> None:
    served = serve(Script("Hello"))
    answer = await _complete(served, prompt="ab", **fields)
    assert answer["choices"][0]["text"] == "He" and served.request.sampling.max_tokens == 2


async def test_a_chats_template_takes_only_known_arguments() -> None:
    served = serve()
    await _chat(served, chat_template_kwargs={"enable_thinking": True})
    assert served.request.prompt_token_ids == ids_of("<user>hi<assistant><think>")
    for name in ("evil", "messages", "tools", "bos_token"):
        error = await _refused(served, 400, "/v1/chat/completions", chat_template_kwargs={name: "x"})
        assert error["param"] == "chat_template_kwargs" and name in str(error["message"])
    served = serve(unknown_fields="warn")
    await _chat(served, chat_template_kwargs={"evil": "x"}, documents=[{"text": "d"}])
    assert served.request.prompt_token_ids == ids_of("<user>hi<assistant>")


async def test_a_chats_template_is_told_of_what_it_looks_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_template(
        tmp_path,
        monkeypatch,
        "{% for each in documents or [] %}{{ each.title }}: {{ each.text }};{% endfor %}"
        "{% for name, value in (controls or {}).items() %}{{ name }}={{ value }};{% endfor %}"
        "{{ messages[-1].content }}",
    )
    served = serve()
    documents = [{"title": "A", "text": "b"}, {"title": "C"}]
    await _chat(served, documents=documents, chat_template_kwargs={"controls": {"length": "short"}})
    assert served.request.prompt_token_ids == ids_of("A: b;C: ;length=short;hi")
    error = await _refused(served, 400, "/v1/chat/completions", chat_template_kwargs={"control": "x"})
    assert "which has 'controls, documents'" in str(error["message"])


async def test_documents_that_the_template_has_no_place_for_are_refused() -> None:
    error = await _refused(serve(), 400, "/v1/chat/completions", documents=[{"text": "d"}])
    assert (error["param"], error["code"]) == ("documents", "unsupported_parameter")
    await _chat(serve(), documents=[])


async def test_bad_words_are_told_as_tokens_with_a_space_before_them_and_without() -> None:
    served = serve()
    await _complete(served, prompt="a", bad_words=["xy", " z"])
    assert served.request.sampling.bad_words == tuple(tuple(ids_of(text)) for text in ("xy", " xy", "z", " z"))
    error = await _refused(served, 400, "/v1/completions", prompt="a", bad_words=[" " * 3])
    assert error["param"] == "bad_words"


async def test_allowed_tokens_are_the_vocabularys_and_go_with_no_tools() -> None:
    served = serve()
    error = await _refused(served, 400, "/v1/completions", prompt="a", allowed_token_ids=[2**20 - 1])
    assert error["param"] == "allowed_token_ids"
    tools = [{"type": "function", "function": {"name": "f"}}]
    error = await _refused(served, 400, "/v1/chat/completions", allowed_token_ids=[1], tools=tools)
    assert error["param"] == "allowed_token_ids" and "tools" in str(error["message"])


async def test_a_final_message_is_continued_and_echoed() -> None:
    served = serve(Script(" world"))
    messages = [*CHAT, {"role": "assistant", "content": "Hello"}]
    answer = await _chat(served, messages=messages, continue_final_message=True, add_generation_prompt=False, echo=True)
    assert served.request.prompt_token_ids == ids_of("<user>hi<assistant>Hello")
    assert answer["choices"][0]["message"]["content"] == "Hello world"
    error = await _refused(served, 400, "/v1/chat/completions", continue_final_message=True)
    assert error["param"] == "continue_final_message"


TRIMMING = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"


@pytest.mark.parametrize("special_tokens", ["allow", "text"])
@pytest.mark.parametrize(("trimmed", "told"), [("m.content | trim", "<s>Hello"), ("m.content.lstrip()", "<s>Hello \n")])
async def test_the_echo_of_a_continued_message_is_what_the_template_has_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trimmed: str, told: str, special_tokens: SpecialTokens
) -> None:
    use_template(tmp_path, monkeypatch, TRIMMING.replace("m.content | trim", trimmed))
    model = ServedModel(MODEL, MAX_MODEL_LEN, VOCAB_SIZE, special_tokens=special_tokens)
    served = serve(Script(" world"), model=model)
    messages = [*CHAT, {"role": "assistant", "content": " <s>Hello \n"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False, "echo": True}
    answer = await _chat(served, messages=messages, **fields)
    assert served.request.prompt_token_ids[-5:] == ids_of(told)[-5:]
    assert answer["choices"][0]["message"]["content"] == f"{told} world"


async def test_a_template_that_takes_parts_is_told_what_the_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    use_template(tmp_path, monkeypatch, source)
    served = serve(Script("ok"), model=ServedModel(MODEL, MAX_MODEL_LEN, VOCAB_SIZE, special_tokens="text"))
    for content in ("a</s>", [{"type": "text", "text": "a</s>"}]):
        await _chat(served, messages=[{"role": "user", "content": content}])
        assert served.request.prompt_token_ids == ids_of("a</s>")


async def test_chat_logprobs() -> None:
    answer = await _chat(serve(Script("\u00e9", ends_with_eos=False)), logprobs=True, top_logprobs=1, max_tokens=2)
    first, second = answer["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "\ufffd",
        "logprob": -0.5,
        "bytes": [0xC3],
        "top_logprobs": [{"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3]}],
    }
    assert second["bytes"] == [0xA9]


async def test_a_chats_prompt_ids_and_logprobs_stand_beside_its_choices() -> None:
    answer = await _chat(serve(Script("a")), return_token_ids=True, prompt_logprobs=0)
    assert answer["prompt_token_ids"] == ids_of("<user>hi<assistant>")
    assert answer["choices"][0]["token_ids"] == [97, EOS]
    assert len(answer["prompt_logprobs"]) == len("<user>hi<assistant>")


# --- streams ----------------------------------------------------------------------------------------------


async def test_a_streamed_completion_adds_up_to_the_whole_one() -> None:
    served = serve(Script("Hello, w\u00f6rld"))
    chunks = await _stream(served)
    assert "".join(texts(chunks)) == "Hello, w\u00f6rld"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


async def test_a_streamed_chat_names_its_role_first() -> None:
    chunks = await _stream(serve(Script("Hi", numbered=True)), "/v1/chat/completions", n=2)
    for index in range(2):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == f"Hi{index}"
        assert mine[-1]["delta"] == {} and mine[-1]["finish_reason"] == "stop"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_usage_ends_a_stream_on_request(path: str) -> None:
    chunks = await _stream(serve(Script("ab")), path, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_usage_stands_in_every_chunk_on_request(path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await _stream(serve(Script("ab")), path, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 3


async def test_a_streamed_stop_string_never_shows_in_part() -> None:
    chunks = await _stream(serve(Script("one two three")), stop=" two", max_tokens=50)
    assert "".join(texts(chunks)) == "one"


async def test_a_streamed_batch_keeps_its_prompts_apart() -> None:
    served = serve(Script(numbered=True, choose=lambda request: "x" * len(request.prompt_token_ids)))
    chunks = await _stream(served, prompt=["a", "bb"], n=2)
    joined = ["".join(texts([c for c in chunks if c["choices"][0]["index"] == index])) for index in range(4)]
    assert joined == ["x0", "x1", "xx0", "xx1"]


async def test_updates_with_several_tokens_become_one_chunk() -> None:
    assert texts(await _stream(serve(Script("abcdef", tokens_per_update=4)))) == ["abcd", "ef"]


# --- failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_is_an_http_error(stream: bool) -> None:
    served = serve(Script(fail_after=0))
    async with served.client() as client:
        response = await client.post("/v1/completions", json={"prompt": "hi", "stream": stream})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "worker_lost"
    assert 1 <= int(response.headers["retry-after"]) <= 60


async def test_a_failure_after_it_is_an_event_without_done() -> None:
    async with serve(Script("abcdef", fail_after=2)).client() as client:
        response = await client.post("/v1/completions", json={"prompt": "hi", "stream": True})
    assert response.status_code == 200
    assert "[DONE]" not in response.text
    *chunks, last = events(response.text)
    assert texts(chunks) == ["a", "b"]
    assert last == {
        "error": {"message": "worker d-1 was lost", "type": "server_error", "param": None, "code": "worker_lost"}
    }


async def test_one_failing_prompt_fails_its_batch_and_aborts_the_others() -> None:
    served = serve(Script("abc", fail_after=1))
    error = await _refused(served, 503, prompt=["a", "b"])
    assert error["code"] == "worker_lost"
    assert all(request.is_finished for request in served.dispatcher.requests)


async def test_no_answer_ends_in_silence() -> None:
    served = serve(Script("abcdef", vanish_after=2))
    assert (await _refused(served, 500))["code"] == "internal_error"
    async with served.client() as client:
        response = await client.post("/v1/completions", json={"prompt": "hi", "stream": True})
    assert "[DONE]" not in response.text
    assert events(response.text)[-1]["error"]


async def test_no_room_is_429_with_a_bounded_retry_after() -> None:
    served = serve(Script(refuse=CapacityError("4096 requests wait", retry_after_s=1000)))
    async with served.client() as client:
        response = await client.post("/v1/completions", json={"prompt": "hi"})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "60"
    assert response.json()["error"] == {
        "message": "4096 requests wait", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded",
    }  # fmt: skip


async def test_what_can_never_fit_is_the_clients_error() -> None:
    served = serve(Script(refuse=RequestError("needs 99 blocks", code="context_length_exceeded")))
    assert (await _refused(served, 400))["code"] == "context_length_exceeded"


@pytest.mark.slow
async def test_a_bug_of_ours_is_a_500_that_tells_nothing_and_is_not_retried() -> None:
    async with serve(Script(refuse=ZeroDivisionError("secret"))).client() as client:
        response = await client.post("/v1/completions", json={"prompt": "hi"})
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    assert "secret" not in response.text


async def test_a_prompt_that_is_too_long_is_refused_with_the_numbers() -> None:
    error = await _refused(serve(), 400, prompt="x" * 500, max_tokens=MAX_MODEL_LEN + 1)
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"] and "500" in error["message"] and "513" in error["message"]
    error = await _refused(serve(), 400, prompt="x" * MAX_MODEL_LEN)
    assert "leaves no room" in error["message"]
    error = await _refused(serve(), 400, prompt="x" * 1_000_000)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("max_tokens", [13, MAX_MODEL_LEN])
async def test_a_limit_beyond_the_context_ends_with_it(max_tokens: int) -> None:
    """Agents ask for as many tokens each time, while their conversation grows."""
    served = serve(Script("y" * MAX_MODEL_LEN))
    answer = await _complete(served, prompt=["x" * 500, "x" * 505], max_tokens=max_tokens)
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2
    assert [len(choice["text"]) for choice in answer["choices"]] == [12, 7]
    assert answer["usage"]["total_tokens"] == 2 * MAX_MODEL_LEN
    assert all(request.takes_less for request in served.dispatcher.requests)


async def test_an_answer_is_not_shorter_than_its_least_where_the_context_ends() -> None:
    error = await _refused(serve(), 400, prompt="x" * 500, max_tokens=20, min_tokens=15)
    assert error["param"] == "min_tokens" and "12" in error["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize(("num_chars", "asked"), [(9, 9999), (MAX_MODEL_LEN, 1), (1_000_000, 1)])
async def test_a_full_context_is_told_in_words_that_clients_know(path: str, num_chars: int, asked: int) -> None:
    """litellm has no code to know it by: its fallbacks to models with more room, and aider, look for these words."""
    text = "x" * num_chars
    body: dict[str, object] = {"prompt": text, "max_tokens": asked}
    if path == "/v1/responses":
        body = {"input": text, "max_output_tokens": asked}
    elif path == "/v1/chat/completions":
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": asked}
    async with serve().client() as client:
        response = await client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert f"This model's maximum context length is {MAX_MODEL_LEN} tokens" in error["message"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 9}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/completions", {"prompt": "hi"}),
    ],
)
async def test_an_answer_may_be_cut_by_a_worker_that_comes_later(path: str, fields: dict[str, object]) -> None:
    served = serve()
    async with served.client() as client:
        assert (await client.post(path, json=fields)).status_code == 200
    assert served.request.takes_less


async def test_an_empty_prompt_is_refused() -> None:
    assert (await _refused(serve(), 400, prompt=""))["param"] == "prompt"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_an_unknown_model_is_404_and_says_what_there_is(path: str) -> None:
    error = await _refused(serve(), 404, path, model="gpt-x\r\n")
    assert error["code"] == "model_not_found" and error["param"] == "model"
    assert f"'{MODEL}'" in error["message"]


async def test_unknown_paths_and_methods_have_the_same_shape() -> None:
    async with serve().client() as client:
        for method, path, status in (
            ("GET", "/nope", 404), ("POST", "/v1/rerank", 404), ("GET", "/v1/completions", 405),
            ("DELETE", "/metrics", 405), ("GET", "/v1/completions/", 405), ("GET", "/docs", 404),
            ("POST", "/v1/responses/compact", 404),
        ):  # fmt: skip
            response = await client.request(method, path)
            assert response.status_code == status, (method, path)
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-should-retry"] == "false" and response.json()["error"]["code"] == "unknown_url"


async def test_a_path_may_end_with_a_slash() -> None:
    served = serve()
    async with served.client() as client:
        for path in ("/v1/models", f"/v1/models/{MODEL}", "/metrics", "/ping"):
            plain, slashed = [await client.get(each) for each in (path, f"{path}/")]
            assert (slashed.status_code, slashed.text[:40]) == (200, plain.text[:40])
        for path, fields in (
            ("/v1/completions/", {"prompt": "hi"}),
            ("/v1/chat/completions/", {"messages": [{"role": "user", "content": "hi"}]}),
        ):
            assert (await client.post(path, json=fields)).status_code == 200
            streamed = await client.post(path, json={**fields, "stream": True})
            assert streamed.text.endswith("data: [DONE]\n\n")
        assert (await client.get("/nope/")).status_code == 404


async def test_an_empty_name_of_a_model_is_none() -> None:
    assert (await _complete(serve(), model="", prompt="hi"))["model"] == MODEL


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/files", "GET, POST"),
        ("PUT", "/v1/files/file-1", "DELETE, GET"),
        ("DELETE", "/metrics", "GET, HEAD"),
        ("GET", "/v1/completions", "POST"),
        ("PUT", "/v1/batches/b/cancel", "POST"),
    ],
)
async def test_a_wrong_method_is_told_all_that_the_path_has(method: str, path: str, allowed: str) -> None:
    async with serve().client() as client:
        response = await client.request(method, path)
    assert response.status_code == 405 and response.headers.get_list("allow") == [allowed]


async def test_what_can_be_got_can_be_asked_for_by_its_head() -> None:
    served = serve()
    async with listening(served.app) as address, httpx.AsyncClient(base_url=f"http://{address}") as client:
        for path in ("/v1/models", f"/v1/models/{MODEL}", *sorted(OPEN), "/metrics", "/version"):
            got, head = await client.get(path), await client.head(path)
            assert (head.status_code, got.status_code, head.content) == (200, 200, b"") and got.content
            assert head.headers["content-type"] == got.headers["content-type"]


async def test_a_wrong_body_is_refused_with_its_position() -> None:
    async with serve(max_body_bytes=100).client() as client:
        headers = {"content-type": "application/json"}
        response = await client.post("/v1/completions", content=b'{"prompt": NaN}', headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
        response = await client.post("/v1/completions", content=b" " * 101, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
        assert response.headers["connection"] == "close"
        response = await client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
        assert response.status_code == 415


async def test_no_refused_call_reaches_the_dispatcher() -> None:
    served = serve()
    for fields in ({"n": 99}, {"model": "x"}, {"prompt": "x" * 600}, {"logit_bias": {"999": 1}}, {"min_tokens": 99}):
        await _refused(served, 404 if "model" in fields else 400, **fields)
    assert served.dispatcher.requests == []


# --- headers ----------------------------------------------------------------------------------------------


async def _headers(served: Served, sent: dict[str, str], **fields: Any) -> httpx.Headers:
    async with served.client() as client:
        response = await client.post("/v1/completions", json={"prompt": "hi", **fields}, headers=sent)
    return response.headers


async def test_a_clients_request_id_is_echoed_but_keys_nothing() -> None:
    served = serve()
    headers = await _headers(served, {"x-request-id": "abc-1"})
    assert headers["x-request-id"] == "abc-1"
    assert "abc-1" not in served.request.request_id
    await _headers(served, {"x-request-id": "abc-1"})
    assert len({request.request_id for request in served.dispatcher.requests}) == 2


async def test_a_request_id_is_cleaned_and_cut() -> None:
    headers = await _headers(serve(), {"x-request-id": "a b\x1b[31m<" + "c" * 200})
    assert headers["x-request-id"] == ("ab31m" + "c" * 200)[:128]


async def test_a_clients_own_time_limit_becomes_the_requests() -> None:
    served = serve()
    await _headers(served, {"x-request-timeout-s": "2.5"})
    assert served.request.timeout_s == served.request.allowed_s == 2.5
    await _headers(served, {})
    assert served.request.timeout_s is None


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf", "1e9"])
async def test_a_time_limit_that_is_none_is_refused(text: str) -> None:
    served = serve()
    async with served.client() as client:
        response = await client.post("/v1/completions", json={"prompt": "hi"}, headers={"x-request-timeout-s": text})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-request-timeout-s")
    assert not served.dispatcher.requests


async def test_a_request_id_is_minted_where_none_is_sent() -> None:
    served = serve()
    for sent in ({}, {"x-request-id": "<>"}):
        headers = await _headers(served, sent)
        assert served.request.request_id.startswith(headers["x-request-id"])


async def test_server_timing_tells_the_phases() -> None:
    headers = await _headers(serve(), {})
    timing = _timing(headers)
    assert float(timing["queue"]) == 10 and float(timing["prefill"]) == 20 and "decode" in timing
    assert headers["openai-processing-ms"].isdigit()
    assert float(_timing(await _headers(serve(), {}, stream=True))["ttft"]) == 30


def _timing(headers: httpx.Headers) -> dict[str, str]:
    return dict(part.split(";dur=") for part in headers["server-timing"].split(", "))


# --- keys -------------------------------------------------------------------------------------------------

OPEN = {"/live", "/ready", "/health", "/ping"}


async def test_every_route_but_the_probes_needs_a_key() -> None:
    served = serve(api_keys=("key-1", "key-2"))
    paths = {route.path for route in served.app.routes if hasattr(route, "methods")} | {"/nope"}  # type: ignore[attr-defined]
    assert {"/v1/completions", "/metrics", "/tokenize", "/openapi.json", *OPEN} <= paths
    async with served.client() as client:
        answers: dict[tuple[str, int], str] = {}
        for path in sorted(paths):
            for method in ("GET", "POST"):
                for sent in ({}, {"authorization": "Bearer key-3"}, {"authorization": "Basic key-1"}):
                    response = await client.request(method, path, headers=sent)
                    answers.setdefault((path, response.status_code), response.text)
    assert {path for path, status in answers if status != 401} == OPEN
    refused = {path: text for (path, status), text in answers.items() if status == 401}
    messages = {path: refused.pop(path) for path in ("/v1/messages", "/v1/messages/count_tokens")}
    (text,) = set(refused.values())
    for text_of_messages in messages.values():  # in Anthropic's shape
        assert json.loads(text_of_messages)["error"]["message"] == json.loads(text)["error"]["message"]


@pytest.mark.parametrize("key", ["key-1", "key-2"])
async def test_each_key_opens(key: str) -> None:
    async with serve(api_keys=("key-1", "key-2")).client(authorization=f"Bearer {key}") as client:
        assert (await client.get("/v1/models")).status_code == 200


async def test_a_wrong_key_is_refused_before_the_body_is_read() -> None:
    async with serve(api_keys=("key",)).client() as client:
        response = await client.post("/v1/completions", content=b"not json")
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


# --- the small endpoints ----------------------------------------------------------------------------------


async def test_models_lists_the_one_model() -> None:
    async with serve().client() as client:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get(f"/v1/models/{MODEL}")).json()
        other = await client.get("/v1/models/org/other")
    assert listed["object"] == "list" and listed["data"] == [one]
    assert (one["id"], one["object"], one["max_model_len"]) == (MODEL, "model", MAX_MODEL_LEN)
    assert one["kvferry"] == {"prefill_workers": 0, "decode_workers": 0}
    assert other.status_code == 404


async def test_models_have_anthropics_fields_too_for_its_clients() -> None:
    async with serve().client(**{"anthropic-version": "2023-06-01"}) as client:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get(f"/v1/models/{MODEL}")).json()
    assert listed["data"] == [one] and listed["has_more"] is False
    assert listed["first_id"] == listed["last_id"] == one["id"] == one["display_name"] == MODEL
    assert (one["lifecycle"], one["max_input_tokens"], one["max_tokens"]) == ("active", MAX_MODEL_LEN, MAX_MODEL_LEN)
    assert one["type"] == "model" and datetime.fromisoformat(one["created_at"]).timestamp() == one["created"]
    assert (one["object"], listed["object"]) == ("model", "list")


async def test_a_model_that_embeds_alone_has_no_longest_answer() -> None:
    model = ServedModel(MODEL, MAX_MODEL_LEN, VOCAB_SIZE, generates=False, embedded_texts=EmbeddedTexts(max_tokens=16))
    async with serve(model=model).client(**{"anthropic-version": "2023-06-01"}) as client:
        one = (await client.get(f"/v1/models/{MODEL}")).json()
        assert (one["max_input_tokens"], one["max_tokens"]) == (16, None)
        del client.headers["anthropic-version"]
        others = (await client.get(f"/v1/models/{MODEL}")).json()
    assert not {"lifecycle", "max_input_tokens", "max_tokens"} & others.keys()


async def test_tokenize_and_detokenize_undo_each_other() -> None:
    async with serve().client() as client:
        tokenized = (await client.post("/tokenize", json={"prompt": "h\u00e9", "return_token_strs": True})).json()
        assert tokenized["tokens"] == ids_of("h\u00e9") and tokenized["count"] == 3
        assert tokenized["max_model_len"] == MAX_MODEL_LEN
        assert tokenized["token_strs"] == ["h", "\u00c3", "\u00a9"], "halves of a character are told apart"
        back = await client.post("/detokenize", json={"tokens": tokenized["tokens"]})
        assert back.json() == {"prompt": "h\u00e9"}
        chat = (await client.post("/tokenize", json={"messages": CHAT, "add_generation_prompt": False})).json()
        assert chat["tokens"] == ids_of("<user>hi")
        for wrong in ([VOCAB_SIZE], [1] * 10_000):
            refused = await client.post("/detokenize", json={"tokens": wrong})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens")


async def test_long_texts_are_tokenized_off_the_loop_with_the_same_result() -> None:
    model = ServedModel(MODEL, 100_000, VOCAB_SIZE)
    served = serve(model=model)
    await _complete(served, prompt="x" * 20_000)
    assert served.request.prompt_token_ids == ids_of("x") * 20_000


async def test_readiness_tells_why_not() -> None:
    served = serve()
    async with served.client() as client:
        for method, path in (("GET", "/ready"), ("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
            assert (await client.request(method, path)).status_code == 200
        served.dispatcher.reasons = ["no decode worker is ready"]
        for method, path in (("GET", "/ready"), ("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
            response = await client.request(method, path)
            assert response.status_code == 503
            assert response.json()["reasons"] == ["no decode worker is ready"]
            assert response.headers["retry-after"] == "1"
        assert (await client.get("/live")).status_code == 200


async def test_a_server_that_closes_takes_nothing_new() -> None:
    served = serve()
    served.app.api.in_flight.is_closing = True
    assert (await _refused(served, 503))["code"] == "shutting_down"
    async with served.client() as client:
        assert (await client.get("/ready")).status_code == 503


async def test_version_and_openapi() -> None:
    async with serve().client() as client:
        assert (await client.get("/version")).json() == {"version": __version__}
        schema = (await client.get("/openapi.json")).json()
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "temperature", "min_p"} <= set(body["properties"])


async def test_metrics_count_answers_and_refusals() -> None:
    served = serve(Script("abc"))
    await _complete(served)
    await _refused(served, 400, n=99)
    async with served.client() as client:
        text = (await client.get("/metrics")).text
    assert 'kvferry_requests_total{code="200"} 1.0' in text
    assert 'kvferry_requests_total{code="400"} 1.0' in text
    assert 'vllm:generation_tokens_total{engine="router",model_name="toy"} 4.0' in text
    assert 'kvferry_request_success_total{finished_reason="stop"} 1.0' in text


async def test_the_log_line_has_numbers_and_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    served = serve(Script("answer-text"))
    await _complete(served, prompt="prompt-text")
    out = "".join(capsys.readouterr())
    assert "request_finished" in out and "completion_tokens=12" in out
    assert "prompt-text" not in out and "answer-text" not in out
    assert json.dumps(served.request.request_id[:32])[1:-1] in out
