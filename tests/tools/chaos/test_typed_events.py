"""What /v1/responses and /v1/messages tell becomes the events of a history, and what is out of order is an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kvferry.router.catalogue.version import ServedModel
from kvferry.tests.router.fakes import MODEL, VOCAB_SIZE, Script, serve
from kvferry.tools.chaos.chunks import Chunks
from kvferry.tools.chaos.events import Delta, Done, Failed, RequestEvent, Sent, Usage
from kvferry.tools.chaos.history import judge
from kvferry.tools.chaos.load import collect
from kvferry.tools.chaos.requests import FOLLOWING, plan_asks
from kvferry.tools.chaos.typed_events import surface_of

CALL = '<tool_call>{"name": "f", "arguments": {"a": "bc"}}</tool_call>'
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/responses": {
        "input": "hi",
        "max_output_tokens": 90,
        "tools": [{"type": "function", "name": "f", "parameters": PARAMETERS, "strict": False}],
    },
    "/v1/messages": {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 90,
        "tools": [{"name": "f", "input_schema": PARAMETERS}],
    },
}
PATHS = list(BODIES)


async def answer(path: str, text: str, *, fail_after: int | None = None, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, or the one body that is all."""
    model = ServedModel(MODEL, 2048, VOCAB_SIZE, tool_parser="hermes", reasoning_parser="think", chooses_tools=True)
    async with serve(Script(text, fail_after=fail_after), model=model).client() as client:
        response = await client.post(path, json=BODIES[path] | {"stream": True} | body)
    if response.headers["content-type"].startswith("text/event-stream"):
        return [json.loads(event.partition("data: ")[2]) for event in response.text.split("\n\n") if event]
    return [response.json()]


def events_of(path: str, told: list[dict[str, Any]], status: int = 200) -> Iterator[RequestEvent]:
    surface = surface_of(path, 1)
    for data in told:
        yield from surface.read(json.dumps(data).encode(), 2.0, status)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("text", ["Hello", f"<think>Hm.</think>Look: {CALL}", CALL])
async def test_pieces_and_the_whole_tell_the_same(path: str, text: str) -> None:
    streamed = list(events_of(path, await answer(path, text)))
    whole = list(events_of(path, await answer(path, text, stream=False)))
    assert isinstance(streamed[-1], Done) and len(streamed[-1].answer_id) == 32
    sent = Sent(request=1, at_s=1.0, ask=0, kind="x", num_choices=1, max_tokens=90, tells_tokens=False)
    done = Done(request=1, at_s=2.0, answer_id="a")
    one, other = collect([sent, *streamed]), collect([sent, *whole, done])
    assert not judge(one).breaches and not judge(other).breaches
    [choice], [same] = one.answer(), other.answer()
    assert (choice.text, choice.finish) == (same.text, same.finish)
    assert choice.calls.replace(" ", "") == same.calls.replace(" ", "")  # a whole message has a call's input as JSON
    assert ("Hello" in choice.text) == (text == "Hello") and ("f" in choice.calls) == (CALL in text)
    if path == "/v1/messages":
        assert choice.finish == ("tool_calls" if CALL in text else "stop")
    assert sum(isinstance(event, Usage) for event in streamed) == 1


@pytest.mark.parametrize("path", PATHS)
async def test_an_answer_that_was_cut_at_its_length_says_so(path: str) -> None:
    name = "max_tokens" if path == "/v1/messages" else "max_output_tokens"
    told = list(events_of(path, await answer(path, "Hello, world, again and again", **{name: 3})))
    assert [event.finish for event in told if isinstance(event, Delta) and event.finish] == ["length"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_lost_or_repeated_event_is_noticed(path: str) -> None:
    told = await answer(path, "Hello, world")
    inner = [at for at, data in enumerate(told) if "delta" in data["type"] and "block_delta" not in data["type"]]
    inner = inner or [at for at, data in enumerate(told) if data["type"].startswith("content_block_st")]
    for at in inner if path == "/v1/responses" else inner[:-1]:
        for planted in ([*told[:at], *told[at + 1 :]], [*told[: at + 1], *told[at:]]):
            failures = [event for event in events_of(path, planted) if isinstance(event, Failed)]
            assert failures and not failures[0].code


async def test_the_end_of_a_response_is_what_its_pieces_told() -> None:
    told = await answer("/v1/responses", "Hello, world")
    told[-1]["response"]["output"][0]["content"][0]["text"] = "Hello, World"
    *_, failed = events_of("/v1/responses", told)
    assert isinstance(failed, Failed) and "World" in failed.message


async def test_a_response_that_nobody_waits_for_is_asked_for_until_it_is_there() -> None:
    told = await answer("/v1/responses", "Hello", stream=False)
    surface = surface_of("/v1/responses", 1)
    begun = told[0] | {"status": "in_progress", "output": [], "usage": None, "background": True}
    assert list(surface.read(json.dumps(begun).encode(), 2.0, 200)) == [] and surface.going_on == f"/{begun['id']}"
    delta, _ = surface.read(json.dumps(told[0]).encode(), 3.0, 200)
    assert isinstance(delta, Delta) and (delta.text, surface.going_on) == ("Hello", "")
    failed = begun | {"status": "failed", "error": {"code": "server_error", "message": "lost"}}
    [end] = surface.read(json.dumps(failed).encode(), 3.0, 200)
    assert isinstance(end, Failed) and (end.code, end.message) == ("server_error", "lost")


async def test_who_follows_a_response_comes_back_behind_the_last_event() -> None:
    told = await answer("/v1/responses", "Hello")
    told[0]["response"]["background"] = told[1]["response"]["background"] = told[-1]["response"]["background"] = True
    surface, texts = surface_of("/v1/responses", 1), ""
    for number, data in enumerate(told[:-1]):
        pieces = surface.read(json.dumps(data).encode(), 2.0, 200)
        texts += "".join(event.text for event in pieces if isinstance(event, Delta))
        assert surface.going_on == f"/{told[0]['response']['id']}?stream=true&starting_after={number}"
    ends = {"type": "error", "sequence_number": number, "code": "shutting_down", "message": "it ends"}
    assert not list(surface.read(json.dumps(ends).encode(), 3.0, 200)) and texts == "Hello"
    *_, end = surface.read(json.dumps(told[-1]).encode(), 3.0, 200)
    assert isinstance(end, Done)


@pytest.mark.parametrize("path", PATHS)
async def test_a_refusal_is_a_proper_error(path: str) -> None:
    [failed] = events_of(path, await answer(path, "Hello", temperature=-1), 400)
    assert isinstance(failed, Failed) and failed.status == 400 and failed.code


@pytest.mark.parametrize("path", PATHS)
async def test_an_error_in_the_middle_is_an_end(path: str) -> None:
    *_, failed = events_of(path, await answer(path, "Hello, world", fail_after=4))
    assert isinstance(failed, Failed) and failed.code, failed


def test_a_conversation_goes_on_with_an_answer_before_it() -> None:
    asks = plan_asks(60, 3, models=["m", "n"], vocab_size=99)
    following = [ask for ask in asks if ask.kind == FOLLOWING]
    assert len(following) >= 2
    for ask in following:
        assert ask.follows is not None
        first = asks[ask.follows]
        assert first.number < ask.number and (first.path, first.body["model"]) == (ask.path, ask.body["model"])
    [alone, *_] = plan_asks(2, 3, models=["m"], vocab_size=99, kinds=[FOLLOWING])
    assert alone.follows is None


def test_other_endpoints_tell_chunks() -> None:
    assert isinstance(surface_of("/v1/completions", 1), Chunks)
