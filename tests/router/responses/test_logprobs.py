"""Log probabilities in /v1/responses: of an answer's text, token by token, whole or streamed."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from kvferry.router.catalogue.version import ServedModel
from kvferry.router.responses.form import ResponseForm

from ..fakes import MODEL, VOCAB_SIZE, Script, Served, serve, typed_events
from .backgrounds import begin, call, ended, router, shown

TOOLS = [{"type": "function", "name": "search", "parameters": {"type": "object", "properties": {}}, "strict": False}]
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>'
INCLUDE = ["message.output_text.logprobs"]
THOUGHTS = "<think>Hm, a<b.</think>\n\n"
TEXTS = [
    ("Hello", ["Hello"]),
    ("ü→😀", ["ü→😀"]),
    (f"{THOUGHTS}So: a <tool or 1 < 2.\n{CALL}", ["So: a <tool or 1 < 2."]),
    (f"{THOUGHTS}{CALL}", []),
    (f"One.\n{CALL}\nTwo.", ["One.", "\nTwo."]),
    ("It is a <tool_", ["It is a <tool_"]),
]


async def _post(text: str, tokens_per_update: int = 3, **fields: Any) -> Any:
    model = ServedModel(MODEL, 4096, VOCAB_SIZE, reasoning_parser="think")
    served: Served = serve(Script(text, tokens_per_update=tokens_per_update), model=model)
    async with served.client() as client:
        response = await client.post("/v1/responses", json={"model": MODEL, "input": "hi", "tools": TOOLS, **fields})
    assert response.status_code == 200, response.text
    return response


def _said(response: dict[str, Any]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [item["content"][0] for item in response["output"] if item["type"] == "message"]
    return parts


@pytest.mark.parametrize(("text", "said"), TEXTS)
async def test_the_tokens_of_the_text_are_told_and_no_others(text: str, said: list[str]) -> None:
    parts = _said((await _post(text, include=INCLUDE, top_logprobs=2)).json())
    assert [part["text"] for part in parts] == said
    for part in parts:
        spelled = bytes(byte for each in part["logprobs"] for byte in each["bytes"])
        assert spelled.decode() in (part["text"], f"{part['text']}\n")  # white space before a call is its form's
        assert all(each["logprob"] == -0.5 and len(each["top_logprobs"]) == 2 for each in part["logprobs"])
        assert part["logprobs"][0].keys() == {"token", "bytes", "logprob", "top_logprobs"}


@pytest.mark.parametrize(("text", "said"), TEXTS)
@pytest.mark.parametrize("tokens_per_update", [1, 5, 1000])
async def test_a_stream_tells_the_same_with_its_deltas(text: str, said: list[str], tokens_per_update: int) -> None:
    whole = _said((await _post(text, include=INCLUDE)).json())
    events = typed_events((await _post(text, tokens_per_update, include=INCLUDE, stream=True)).text)
    parts = _said(events[-1]["response"])
    assert parts == whole and [part["text"] for part in parts] == said
    told: dict[str, list[Any]] = {}
    for event in events:
        if event["type"] == "response.output_text.delta":
            told.setdefault(event["item_id"], []).extend(event["logprobs"])
    done = [event for event in events if event["type"] == "response.output_text.done"]
    ended = [event["part"] for event in events if event["type"] == "response.content_part.done"]
    assert [event["logprobs"] for event in done] == list(told.values()) == [part["logprobs"] for part in parts]
    assert [part for part in ended if part["type"] == "output_text"] == parts


async def test_a_number_alone_asks_for_them_and_nothing_asks_for_none() -> None:
    (part,) = _said((await _post("Hello", top_logprobs=1)).json())
    assert [len(each["top_logprobs"]) for each in part["logprobs"]] == [1] * 5
    for fields in ({}, {"top_logprobs": 0}, {"top_logprobs": None}):
        (part,) = _said((await _post("Hello", **fields)).json())
        assert part["logprobs"] == []


MANY: dict[str, Any] = {"include": INCLUDE, "top_logprobs": 20, "max_output_tokens": 150}  # written on a thread


@pytest.mark.parametrize("background", [False, True])
async def test_an_answer_with_thousands_of_them_is_kept(tmp_path: Path, background: bool) -> None:
    served = router(tmp_path, "x" * 150, model=ServedModel(MODEL, 4096, VOCAB_SIZE))
    if background:
        response = await ended(served, await begin(served, **MANY))
    else:
        answered = await call(served, "POST", json={"input": "hi", **MANY})
        assert answered.status_code == 200, answered.text
        response = await shown(served, answered.json())
        assert response == answered.json()
    assert response["status"] == "incomplete" and len(_said(response)[0]["logprobs"]) == 150
    more = await call(served, "POST", json={"input": "more", "previous_response_id": response["id"]})
    assert more.status_code == 200, more.text


async def test_what_was_cancelled_while_it_was_written_stays_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = router(tmp_path, "x" * 150, model=ServedModel(MODEL, 4096, VOCAB_SIZE))
    is_written, may_end, has_ended = threading.Event(), threading.Event(), threading.Event()
    written = ResponseForm.whole

    def whole(form: ResponseForm, pieces: Any) -> Any:
        is_written.set()
        may_end.wait(30)
        try:
            return written(form, pieces)
        finally:
            has_ended.set()

    monkeypatch.setattr(ResponseForm, "whole", whole)
    state = await begin(served, **MANY)
    await asyncio.to_thread(is_written.wait, 30)
    cancelled = await call(served, "POST", f"/{state['id']}/cancel")
    may_end.set()
    await asyncio.to_thread(has_ended.wait, 30)
    assert cancelled.json()["status"] == (await shown(served, state))["status"] == "cancelled"
