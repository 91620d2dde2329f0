"""/v1/responses over a scripted dispatcher: what the model is told, the items and events, and what is kept."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.common.errors import RequestError
from kvferry.router.catalogue.defaults import SamplingDefaults
from kvferry.router.catalogue.version import ServedModel
from kvferry.router.helpers.wire import Chat
from kvferry.router.responses.items import input_messages
from kvferry.router.responses.kept import KeptResponses
from kvferry.router.responses.store import MAX_AGE_S, MemoryStore
from kvferry.router.responses.tools import ResponseTools
from kvferry.router.responses.translate import chat_body
from kvferry.router.state.errors import StreamError
from kvferry.router.turns.places import Message
from kvferry.tests.fake_clock import FakeClock

from ..fakes import MODEL, VOCAB_SIZE, Inline, Script, Served, serve, typed_events

BODY: dict[str, Any] = {"model": MODEL, "input": "hi"}
TOOLS = [{"type": "function", "name": "search", "parameters": {"type": "object", "properties": {}}, "strict": False}]
CALLED = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>'


def _served(text: str = "Hello", *, model: dict[str, Any] | None = None, **script: Any) -> Served:
    return serve(Script(text, **script), model=ServedModel(MODEL, 4096, VOCAB_SIZE, **(model or {})))


async def _post(served: Served, **fields: Any) -> Any:
    async with served.client() as client:
        return await client.post("/v1/responses", json={**BODY, **fields})


async def _whole(served: Served, **fields: Any) -> dict[str, Any]:
    response = await _post(served, **fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def _events(served: Served, **fields: Any) -> list[dict[str, Any]]:
    response = await _post(served, stream=True, **fields)
    assert response.status_code == 200, response.text
    found = typed_events(response.text)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def _prompt(served: Served) -> str:
    return bytes(served.request.prompt_token_ids).decode()


async def test_a_response_has_openais_shape() -> None:
    served = _served(num_cached_tokens=3)
    answer = await _whole(served, instructions="Be brief.", max_output_tokens=9, metadata={"a": "b"})
    assert answer["id"].startswith("resp_") and answer["object"] == "response" and answer["status"] == "completed"
    (item,) = answer["output"]
    assert item.pop("id").startswith("msg_")
    content = [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
    assert item == {"type": "message", "role": "assistant", "content": content, "status": "completed"}
    assert answer["usage"] == {
        "input_tokens": len("<system>Be brief.<user>hi<assistant>"),
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len("<system>Be brief.<user>hi<assistant>") + 6,
    }
    assert (answer["instructions"], answer["max_output_tokens"], answer["metadata"]) == ("Be brief.", 9, {"a": "b"})
    assert _prompt(served) == "<system>Be brief.<user>hi<assistant>" and served.request.sampling.max_tokens == 9


async def test_a_response_that_is_cut_says_so() -> None:
    answer = await _whole(_served(), max_output_tokens=2)
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete"
    assert (await _events(_served(), max_output_tokens=2))[-1]["type"] == "response.incomplete"


async def test_a_stream_has_typed_events_with_numbers() -> None:
    events = await _events(_served())
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == "Hello"
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    assert events[-1]["response"]["output"][0] == events[-2]["item"]
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1


async def test_reasoning_text_and_calls_are_items_in_their_order() -> None:
    text = f"<think>Hm.</think>Look.\n{CALL}"
    answer = await _whole(_served(text, model={"reasoning_parser": "think"}), tools=TOOLS)
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message", "function_call"]
    call = answer["output"][2]
    assert (call["name"], call["arguments"]) == ("search", '{"query": "x"}') and call["call_id"].startswith("call_")
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] == len("<think>Hm.</think>")
    events = await _events(_served(text, model={"reasoning_parser": "think"}), tools=TOOLS)
    streamed = events[-1]["response"]["output"]
    for one, other in zip(answer["output"], streamed, strict=True):
        assert {**one, "id": None} == {**other, "id": None}
    arguments = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert "".join(arguments) == '{"query": "x"}' and len(arguments) > 3
    assert [e["delta"] for e in events if e["type"] == "response.reasoning_text.delta"] != []
    (done,) = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert (done["name"], done["arguments"]) == ("search", '{"query": "x"}')


@pytest.mark.parametrize("tokens_per_update", [1, 7, 1000])
async def test_an_item_is_added_before_it_has_anything_and_deltas_have_all_of_it(tokens_per_update: int) -> None:
    events = await _events(_served(f"Look.\n{CALL}{CALL}", tokens_per_update=tokens_per_update), tools=TOOLS)
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert [item.get("arguments", item.get("content")) for item in added] == [[], "", ""]
    said = ["", "", ""]
    for event in events:
        said[event.get("output_index", 0)] += event.get("delta", "")
    assert said == ["Look.", '{"query": "x"}', '{"query": "x"}']


async def test_a_response_goes_on_with_an_earlier_one() -> None:
    served = _served()
    first = await _whole(served, instructions="Be brief.")
    events = await _events(served, input="more", previous_response_id=first["id"])
    assert _prompt(served) == "<user>hi<assistant>Hello<user>more<assistant>"  # instructions hold for one call
    await _whole(served, input="last", previous_response_id=events[-1]["response"]["id"], store=False)
    assert _prompt(served).endswith("<user>more<assistant>Hello<user>last<assistant>")


async def test_calls_of_an_earlier_response_are_answered() -> None:
    served = _served(CALL)
    first = await _whole(served, tools=TOOLS)
    output = {"type": "function_call_output", "call_id": first["output"][0]["call_id"], "output": "found"}
    await _whole(served, input=[output], previous_response_id=first["id"])
    assert "<tool_call>" in _prompt(served)
    assert _prompt(served).endswith("<user><tool_response>\nfound\n</tool_response><assistant>")


async def test_a_response_goes_on_as_if_its_items_were_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    served = _served(f"<think>Hm.</think>Look.\n{CALL}", model={"reasoning_parser": "think"})
    rendered: list[Any] = []

    async def noting(renderer: Inline, chat: Chat) -> str:
        rendered.append(list(chat.messages))
        return "prompt"

    monkeypatch.setattr(Inline, "render", noting)
    first = await _whole(served, tools=TOOLS)
    output = {"type": "function_call_output", "call_id": first["output"][-1]["call_id"], "output": "found"}
    await _whole(served, tools=TOOLS, input=[output], previous_response_id=first["id"])
    await _whole(served, tools=TOOLS, input=[{"role": "user", "content": "hi"}, *first["output"], output])
    assert rendered[1] == rendered[2] and "Hm." in str(rendered[1])


async def test_what_is_not_kept_is_refused_as_openai_does() -> None:
    served = _served()
    answer = await _whole(served, store=False)
    assert answer["store"] is False
    for response_id in (answer["id"], "resp_other"):
        response = await _post(served, previous_response_id=response_id)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "previous_response_id")
        assert (error["type"], error["code"]) == ("invalid_request_error", "previous_response_not_found")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"previous_response_id": 5}, "previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "9"}, "max_output_tokens"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "some"}, "truncation"),
        ({"include": ["file_search_call.everything"]}, "include"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call", "name": 5, "arguments": "{}"}]}, "input[0].name"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": 5}]}, "input[0].arguments"),
        ({"input": [CALLED, {**CALLED, "arguments": {"a": 1}}]}, "input[1].arguments"),
        ({"input": [CALLED, {**CALLED, "arguments": []}]}, "input[1].arguments"),
        ({"input": [{"type": "function_call_output", "call_id": 5, "output": ""}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "", "output": ""}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "arguments": "{}"}], "instructions": "Be brief."}, "input[0].name"),
        ({"input": [CALLED, {**CALLED, "name": "f" * 257}]}, "input[1].name"),
        ({"input": [*[CALLED] * 2, {**CALLED, "call_id": "c" * 257}]}, "input[2].call_id"),
        ({"input": [{"role": "user", "content": "x"}] * 4097}, "input"),
        ({"reasoning": {"effort": "enormous"}}, "reasoning.effort"),
        ({"reasoning": {"effrot": "high"}}, "reasoning.effrot"),
        ({"text": {"verbosty": "low"}}, "text.verbosty"),
        ({"tools": [{**TOOLS[0], "name": "a b"}]}, "tools[0].name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "other"}}, "tool_choice.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        ({"inputs": "x"}, "inputs"),
        ({"temperature": -1}, "temperature"),
        ({"metadata": "a"}, "metadata"),
        ({"metadata": {"a": 5}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {"a" * 65: "x"}}, "metadata"),
        ({"metadata": {str(at): "x" for at in range(17)}}, "metadata"),
        ({"user": "x" * 70_000}, "user"),
        ({"service_tier": ["x" * 70_000]}, "service_tier"),
        ({"reasoning": {"summary": "x" * 70_000}}, "reasoning"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "search", "x": "x" * 70_000}}, "tool_choice"),
        ({"tools": [*TOOLS, {"type": "web_search", "filters": "x" * 70_000}]}, "tools"),
        ({"tools": [{**TOOLS[0], "defer_loading": "x" * 70_000}]}, "tools"),
    ],
)
async def test_a_refusal_names_the_field(fields: dict[str, Any], param: str) -> None:
    response = await _post(_served(), **fields)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


async def test_a_stream_that_fails_ends_with_an_error() -> None:
    events = await _events(_served(fail_after=2, error=StreamError("worker d-1 was lost", "worker_lost", 503)))
    assert events[-1]["type"] == "error" and events[-1]["code"] == "worker_lost"


async def test_what_asks_for_nothing_is_accepted() -> None:
    fields = {
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "truncation": "auto", "background": False,
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "max", "summary": "auto", "mode": "pro", "context": "all_turns"},
        "top_logprobs": 0, "service_tier": "priority", "parallel_tool_calls": False,
        "stream_options": None, "tool_choice": "auto", "temperature": 0,
    }  # fmt: skip
    answer = await _whole(_served(), **fields)
    assert (answer["temperature"], answer["top_p"]) == (0, 1.0)
    assert answer["parallel_tool_calls"] is False and answer["reasoning"] == fields["reasoning"]
    assert (answer["service_tier"], answer["truncation"]) == ("priority", "auto")


async def test_a_response_tells_what_it_was_sampled_with() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_p=0.9)
    names = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
    answer = await _whole(_served(model={"defaults": defaults}), top_p=0.5, presence_penalty=0.1)
    assert tuple(answer[name] for name in names) == (0.6, 0.5, 0.1, 0.0)
    for event in await _events(_served(model={"defaults": defaults})):
        if "response" in event:
            assert tuple(event["response"][name] for name in names) == (0.6, 0.9, 0.0, 0.0)


async def test_vllms_fields_of_sampling_reach_the_workers() -> None:
    served = _served("abcd", ends_with_eos=False)
    answer = await _whole(
        served, top_k=4, min_p=0.1, presence_penalty=0.2, frequency_penalty=0.3, repetition_penalty=1.1,
        logit_bias={"5": 1}, ignore_eos=True, stop_token_ids=[9], stop=["c"], include_stop_str_in_output=True,
        skip_special_tokens=False, include_reasoning=True, chat_template_kwargs={"date_string": "today"},
        request_id="r", session_id="s",
    )  # fmt: skip
    sampling = served.request.sampling
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (4, 0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.2, 0.3)
    assert (sampling.logit_bias, sampling.ignore_eos, sampling.stop_token_ids) == ({5: 1.0}, True, (9,))
    assert answer["output"][0]["content"][0]["text"] == "abc" and answer["status"] == "completed"
    assert _prompt(served).endswith("today")
    wrong: dict[str, object] = {"top_k": "4", "stop": [5], "logit_bias": [], "structured_outputs": 5}
    for name, value in wrong.items():
        response = await _post(_served(), **{name: value})
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)


async def test_a_limit_beyond_the_context_ends_where_it_ends() -> None:
    served = _served("x" * 5000)
    answer = await _whole(served, input="y" * 4000, max_output_tokens=200)
    room = 4096 - answer["usage"]["input_tokens"]
    assert answer["usage"]["output_tokens"] == served.request.sampling.max_tokens == room < 100
    assert (answer["status"], answer["max_output_tokens"]) == ("incomplete", 200)
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_labels_may_be_as_many_and_as_long_as_openais() -> None:
    labels = {f"{at:064}": "ü" * 512 for at in range(16)}
    assert (await _whole(_served(), metadata=labels))["metadata"] == labels
    assert (await _whole(_served(), metadata=None))["metadata"] == {}


async def test_truncation_cuts_nothing() -> None:
    response = await _post(_served(), input="x" * 5000, truncation="auto")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


async def test_a_response_repeats_the_defaults_of_what_is_asked_in_part() -> None:
    answer = await _whole(_served(), text={"verbosity": "medium", "format": None}, reasoning={"effort": "low"})
    assert answer["text"] == {"format": {"type": "text"}, "verbosity": "medium"}
    assert answer["reasoning"] == {"effort": "low", "summary": None}


def test_unknown_parts_are_told_where_they_may_be_ignored() -> None:
    ignored: list[str] = []
    asked = {"input": "x", "reasoning": {"effrot": "high", "effort": "low"}, "text": {"verbosty": "low"}}
    body, _ = chat_body(asked, ignored, [], ResponseTools())
    assert body["reasoning_effort"] == "low"
    assert ignored == ["text.verbosty", "reasoning.effrot"]


def test_thoughts_that_follow_one_another_are_all_kept() -> None:
    items = [
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]} for text in "ab"
    ]
    assert [each.message for each in input_messages(items, [])] == [
        {"role": "assistant", "content": "", "reasoning_content": "a\nb"}
    ]


def test_an_item_whose_type_is_null_is_a_message() -> None:
    assert [each.message for each in input_messages([{"type": None, "role": "user", "content": "hi"}], [])] == [
        {"role": "user", "content": "hi"}
    ]


def test_items_of_a_turn_become_one_message() -> None:
    said = {"type": "output_text", "text": "Look.", "annotations": []}
    items = [
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [said]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "1"}]},
        {"type": "message", "role": "assistant", "content": "One."},
        {"type": "message", "role": "assistant", "content": "Two."},
    ]
    messages = [each.message for each in input_messages(items, [])]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant", "assistant"]
    assert (messages[1]["content"], messages[1]["reasoning_content"]) == ("Look.", "Hm.")
    calls = messages[1]["tool_calls"]
    assert isinstance(calls, list) and [call["id"] for call in calls] == ["a", "b"]


def test_what_is_kept_has_bounds_of_memory_and_time_and_belongs_to_a_key() -> None:
    clock = FakeClock(0.0)
    store = MemoryStore(clock, max_bytes=2500)
    kept = KeptResponses(store)
    for number in range(10):
        kept.keeper(f"resp_{number}", b"one", [{"role": "user", "content": "x" * 200}])()
    assert 1500 < store.num_bytes <= 2500
    assert kept.find("resp_9", b"one")[0][0]["content"] == "x" * 200
    kept.keeper("resp_long", b"one", [{"role": "user", "content": "x" * 4000}])()
    for response_id, tenant in (("resp_0", b"one"), ("resp_9", b"other"), ("resp_long", b"one"), (7, b"one")):
        with pytest.raises(RequestError):
            kept.find(response_id, tenant)
    clock.advance(MAX_AGE_S + 1)
    with pytest.raises(RequestError):
        kept.find("resp_9", b"one")
    kept.keeper("resp_new", b"one", [])()
    assert store.num_bytes < 1000


def test_short_messages_count_for_what_they_take_in_memory() -> None:
    kept = KeptResponses(MemoryStore(FakeClock(0.0)))
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
    messages: list[Message] = [{"role": "assistant", "content": "", "tool_calls": [call] * 128} for _ in range(100)]
    kept.keeper("resp_0", b"", messages[:10])()
    assert kept.find("resp_0", b"")[0] == messages[:10]
    kept.keeper("resp_1", b"", messages)()
    with pytest.raises(RequestError):
        kept.find("resp_1", b"")
