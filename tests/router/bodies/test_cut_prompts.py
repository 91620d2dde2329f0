"""truncate_prompt_tokens, as vLLM has it: prompts that are too long are cut to their end, or to their beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from kvferry.models.tokenizer import Tokenizer
from kvferry.router.bodies.values import Cut

from ..fakes import MAX_MODEL_LEN, MODEL, Script, Served, events, ids_of, serve

CHAT = [{"role": "user", "content": "hello"}]


async def _post(path: str, **fields: Any) -> tuple[Served, Any]:
    served = serve(Script("ab"))
    async with served.client() as client:
        return served, await client.post(path, json={"model": MODEL, **fields})


def _prompts(served: Served) -> list[str]:
    return [bytes(request.prompt_token_ids).decode() for request in served.dispatcher.requests]


@pytest.mark.parametrize(
    ("prompt", "fields", "kept"),
    [
        ("abcdef", {"truncate_prompt_tokens": 4}, ["cdef"]),
        ("abcdef", {"truncate_prompt_tokens": 4.0, "truncation_side": "right"}, ["abcd"]),
        ("abcdef", {"truncate_prompt_tokens": 6}, ["abcdef"]),
        (["abcdef", "ab"], {"truncate_prompt_tokens": 4}, ["cdef", "ab"]),
        (ids_of("abcdef"), {"truncate_prompt_tokens": 4}, ["cdef"]),
        ([ids_of("abcdef")], {"truncate_prompt_tokens": 1}, ["f"]),
        ("a" * 99_999 + "b" * 500, {"truncate_prompt_tokens": -1, "max_tokens": 10}, ["a" * 2 + "b" * 500]),
        ("a" * 600, {"truncate_prompt_tokens": -1}, ["a" * (MAX_MODEL_LEN - 16)]),
        ([97] * 600, {"truncate_prompt_tokens": -1, "max_tokens": MAX_MODEL_LEN - 1}, ["a"]),
    ],
)
async def test_a_completions_prompts_are_cut(prompt: object, fields: dict[str, Any], kept: list[str]) -> None:
    served, response = await _post("/v1/completions", prompt=prompt, **fields)
    assert response.status_code == 200, response.text
    assert _prompts(served) == kept
    assert response.json()["usage"]["prompt_tokens"] == sum(map(len, kept))


async def test_what_is_kept_is_echoed() -> None:
    fields = {"prompt": "abcdef", "truncate_prompt_tokens": 3, "echo": True, "logprobs": 0, "return_token_ids": True}
    choice = (await _post("/v1/completions", **fields))[1].json()["choices"][0]
    assert choice["text"] == "defab" and choice["prompt_token_ids"] == ids_of("def")
    assert choice["logprobs"]["text_offset"][:5] == [0, 1, 2, 3, 4]
    told = events((await _post("/v1/completions", **fields, stream=True))[1].text)
    assert cast(Any, told[0])["choices"][0]["text"] == "def"


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 14}, "llo<assistant>"),
        ({"truncate_prompt_tokens": 8, "truncation_side": "right"}, "<user>he"),
        ({"truncate_prompt_tokens": -1}, "<user>hello<assistant>"),
        ({"truncate_prompt_tokens": -1, "max_tokens": MAX_MODEL_LEN - 14}, "llo<assistant>"),
    ],
)
async def test_a_chat_keeps_tokens_of_its_rendered_prompt(fields: dict[str, Any], kept: str) -> None:
    served, response = await _post("/v1/chat/completions", messages=CHAT, **fields)
    assert response.status_code == 200, response.text
    assert _prompts(served) == [kept]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_prompt_is_not_cut_to_nothing_for_its_answer(path: str) -> None:
    fields = {"messages": CHAT} if "chat" in path else {"prompt": "a" * 600}
    _, response = await _post(path, **fields, truncate_prompt_tokens=-1, max_tokens=MAX_MODEL_LEN)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "max_tokens")


async def test_tokenizing_cuts_as_answering_does() -> None:
    _, response = await _post("/tokenize", prompt="abcdef", truncate_prompt_tokens=4)
    assert (response.json()["tokens"], response.json()["count"]) == (ids_of("cdef"), 4)
    _, response = await _post("/tokenize", messages=CHAT, truncate_prompt_tokens=5)
    assert response.json()["tokens"] == ids_of("tant>")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"truncate_prompt_tokens": MAX_MODEL_LEN + 1}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": True}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 5, "truncation_side": "both"}, "truncation_side"),
    ],
)
async def test_what_is_wrong_is_named(path: str, fields: dict[str, Any], param: str) -> None:
    asked = {"messages": CHAT} if "chat" in path else {"prompt": "hi"}
    served, response = await _post(path, **asked, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert not served.dispatcher.requests


async def test_a_cut_prompt_leaves_no_more_room_than_there_is() -> None:
    fields = {"prompt": "a" * 600, "truncate_prompt_tokens": 500, "max_tokens": 20}
    served, response = await _post("/v1/completions", **fields)
    assert response.status_code == 200 and served.request.sampling.max_tokens == MAX_MODEL_LEN - 500


class _Framing:
    """A tokenizer of characters that puts a token before a text, and two behind it."""

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [[1, *map(ord, text), 2, 3] if add_special_tokens else list(map(ord, text)) for text in texts]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.encode_all([text], add_special_tokens)[0]


@pytest.mark.parametrize(
    ("most", "adds", "left", "right"),
    [
        (6, True, [1, 100, 101, 102, 2, 3], [1, 97, 98, 99, 2, 3]),
        (9, True, [1, *range(97, 103), 2, 3], [1, *range(97, 103), 2, 3]),
        (3, True, [102, 2, 3], [1, 97, 98]),  # they alone would be all of it
        (2, False, [101, 102], [97, 98]),
    ],
)
def test_what_stands_around_every_text_is_kept(most: int, adds: bool, left: list[int], right: list[int]) -> None:
    tokenizer = cast(Tokenizer, _Framing())
    assert Cut(most, "left").encode_all(tokenizer, ["abcdef"], adds) == [left]
    assert Cut(most, "right").encode_all(tokenizer, ["abcdef"], adds) == [right]
