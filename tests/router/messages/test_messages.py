"""/v1/messages over a scripted dispatcher: what the model is told, and the answer in Anthropic's words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvferry.common.errors import CapacityError
from kvferry.router.catalogue.version import ServedModel
from kvferry.router.messages.surface import MessagesSurface
from kvferry.router.state.errors import StreamError
from kvferry.router.turns.turn import call_id

from ..fakes import MODEL, VOCAB_SIZE, Script, Served, serve, typed_events

BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 400, "messages": [{"role": "user", "content": "hi"}]}
TOOLS = [{"name": "search", "description": "Search.", "input_schema": {"type": "object", "properties": {}}}]
FORMAT = {"type": "json_schema", "schema": {"type": "object"}}
PREFILLED = {"messages": [*BODY["messages"], {"role": "assistant", "content": "{"}]}
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>'


def _served(text: str = "Hello", *, model: dict[str, Any] | None = None, **script: Any) -> Served:
    return serve(Script(text, **script), model=ServedModel(MODEL, 4096, VOCAB_SIZE, **(model or {})))


async def _post(served: Served, path: str = "/v1/messages", **fields: Any) -> Any:
    async with served.client() as client:
        return await client.post(path, json={**BODY, **fields})


async def _whole(served: Served, **fields: Any) -> dict[str, Any]:
    response = await _post(served, **fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def _events(served: Served, **fields: Any) -> list[dict[str, Any]]:
    response = await _post(served, stream=True, **fields)
    assert response.status_code == 200, response.text
    return typed_events(response.text)


def _joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks, as a client puts them together."""
    blocks: list[dict[str, Any]] = []
    is_open = False
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks) and not is_open
                blocks.append(dict(event["content_block"]))
                is_open = True
            case "content_block_delta":
                assert event["index"] == len(blocks) - 1 and is_open
                match event["delta"]:
                    case {"type": "text_delta", "text": text}:
                        blocks[-1]["text"] += text
                    case {"type": "thinking_delta", "thinking": text}:
                        blocks[-1]["thinking"] += text
                    case {"type": "input_json_delta", "partial_json": text}:
                        blocks[-1]["json"] = blocks[-1].get("json", "") + text
            case "content_block_stop":
                assert is_open
                is_open = False
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("json", "{}"))
    assert not is_open
    return blocks


async def test_an_answer_has_anthropics_shape() -> None:
    served = _served(num_cached_tokens=5)
    answer = await _whole(served, system=[{"type": "text", "text": "Be brief."}], stop_sequences=["zz"])
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len("<system>Be brief.<user>hi<assistant>") - 5,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 5,
            "output_tokens": 6,
        },
    }
    assert bytes(served.request.prompt_token_ids) == b"<system>Be brief.<user>hi<assistant>"
    assert served.request.sampling.max_tokens == 400


async def test_a_stream_has_anthropics_events() -> None:
    events = await _events(_served("Hello"))
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0]["message"]["content"] == [] and events[0]["message"]["stop_reason"] is None
    assert _joined(events) == [{"type": "text", "text": "Hello"}]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 6


async def test_why_it_ended() -> None:
    assert (await _whole(_served("Hello"), max_tokens=2))["stop_reason"] == "max_tokens"
    answer = await _whole(_served("Hello"), stop_sequences=["lo"])
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "lo")
    assert answer["content"] == [{"type": "text", "text": "Hel"}]
    assert (await _whole(_served(""), tools=TOOLS))["content"] == []
    thinking = _served("<think>lo</think>\n\nHello", model={"reasoning_parser": "think"})
    answer = await _whole(thinking, stop_sequences=["lo", "\n\n"], thinking={"type": "enabled", "budget_tokens": 1024})
    assert [block.get("text", block.get("thinking")) for block in answer["content"]] == ["lo", "Hel"]


async def test_a_limit_beyond_the_context_ends_with_it() -> None:
    served = _served("x" * 5000)
    answer = await _whole(served, messages=[{"role": "user", "content": "y" * 4000}], max_tokens=4096)
    usage = answer["usage"]
    assert answer["stop_reason"] == "max_tokens" and usage["input_tokens"] + usage["output_tokens"] == 4096


async def test_a_templates_variables_may_be_given() -> None:
    served = _served()
    await _whole(served, chat_template_kwargs={"date_string": "today"}, session_id="s", request_id="r")
    assert bytes(served.request.prompt_token_ids).decode().endswith("today")


async def test_a_tool_may_have_as_long_a_name_as_anthropics() -> None:
    name = f"mcp__{'n' * 123}"
    served = _served(f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>')
    (block,) = (await _whole(served, tools=[{**TOOLS[0], "name": name}]))["content"]
    assert (block["type"], block["name"]) == ("tool_use", name)
    response = await _post(served, tools=[{**TOOLS[0], "name": f"{name}n"}])
    assert response.status_code == 400 and "1 to 128 letters" in response.json()["error"]["message"]


async def test_blocks_of_reasoning_text_and_calls_come_in_their_order() -> None:
    text = f"<think>Hm.</think>Look.\n{CALL}\nAnd{CALL}"
    served = _served(text, model={"reasoning_parser": "think"})
    answer = await _whole(served, tools=TOOLS, temperature=0)
    kinds = [block["type"] for block in answer["content"]]
    assert kinds == ["thinking", "text", "tool_use", "text", "tool_use"] and answer["stop_reason"] == "tool_use"
    assert answer["content"][2]["input"] == {"query": "x"} and answer["content"][2]["name"] == "search"
    seeded = _served(text, model={"reasoning_parser": "think"})
    events = await _events(seeded, tools=TOOLS, temperature=0)
    assert _joined(events) == answer["content"]  # ids too: both drew the same seed
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


async def test_half_a_character_of_two_escapes_in_a_call_is_no_failure() -> None:
    call = CALL.replace('"x"', r'"\ud83d", "n": 123456789012345678901234567890')
    (block,) = (await _whole(_served(call), tools=TOOLS))["content"]
    assert block["input"] == {"query": "?", "n": 123456789012345678901234567890}


async def test_a_calls_id_is_made_once_of_the_prompt_not_with_each_piece_of_its_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    def noted(seed: int, prompt_token_ids: Any, choice: int, index: int, *, is_short: bool = False) -> str:
        made.append(index)
        return call_id(seed, prompt_token_ids, choice, index, is_short=is_short)

    monkeypatch.setattr("kvferry.router.api.chat_turns.call_id", noted)
    events = await _events(_served(f"{CALL}{CALL}"), tools=TOOLS)
    assert len([event for event in events if event["type"] == "content_block_delta"]) > 4
    assert made == [0, 1]


async def test_a_conversation_with_calls_and_results_becomes_a_chat() -> None:
    served = _served()
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "Look."},
                {"type": "tool_use", "id": "a", "name": "search", "input": {"query": "x"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "found"}]},
                {"type": "text", "text": "so?"},
            ],
        },
    ]
    await _whole(served, messages=messages)
    assert bytes(served.request.prompt_token_ids).decode() == (
        '<user>hi<assistant>Look.\n<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>'
        "<user><tool_response>\nfound\n</tool_response>\nso?<assistant>"
    )


async def test_neighbours_of_one_role_are_one_turn() -> None:
    served = _served()
    texts = [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"), ("user", "e")]
    await _whole(served, messages=[{"role": role, "content": text} for role, text in texts])
    assert bytes(served.request.prompt_token_ids).decode() == "<user>a\nb<assistant>cd<user>e<assistant>"


@pytest.mark.parametrize(("content", "told"), [("no such file", "Error: no such file"), ([], "Error")])
async def test_the_model_is_told_that_a_tool_has_failed(content: Any, told: str) -> None:
    served = _served()
    call = {"type": "tool_use", "id": "a", "name": "search", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "is_error": True, "content": content}
    messages = [*BODY["messages"], {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    await _whole(served, messages=messages)
    assert f"<tool_response>\n{told}\n</tool_response>" in bytes(served.request.prompt_token_ids).decode()


async def test_a_format_goes_with_a_call_at_the_end_or_an_empty_message() -> None:
    called = [{"type": "text", "text": "Hm."}, {"type": "tool_use", "id": "a", "name": "search", "input": {}}]
    for content in (called, "", [{"type": "thinking", "thinking": "Hm.", "signature": ""}]):
        messages = [*BODY["messages"], {"role": "assistant", "content": content}]
        surface = MessagesSurface()
        body = surface.chat_body({**BODY, "messages": messages, "output_config": {"format": FORMAT}}, None)
        assert "response_format" in body and "continue_final_message" not in body


@pytest.mark.parametrize("content", ["{", [{"type": "text", "text": "{"}]])
async def test_a_last_message_of_the_assistant_begins_the_answer(content: Any) -> None:
    served = _served('"a": 1}')
    messages = [*BODY["messages"], {"role": "assistant", "content": content}]
    answer = await _whole(served, messages=messages)
    assert bytes(served.request.prompt_token_ids) == b"<user>hi<assistant>{"
    assert answer["content"] == [{"type": "text", "text": '"a": 1}'}]
    counted = await _post(served, "/v1/messages/count_tokens", messages=messages)
    assert counted.json() == {"input_tokens": len("<user>hi<assistant>{")}
    await _whole(served, messages=[*BODY["messages"], {"role": "assistant", "content": ""}])
    assert bytes(served.request.prompt_token_ids) == b"<user>hi<assistant><assistant>"


async def test_a_tool_may_be_strict() -> None:
    response = await _post(_served(), tools=[{**TOOLS[0], "strict": True}])
    assert response.headers["x-kvferry-ignored"] == "tools.strict"  # as a chat says it, where no grammar is followed
    assert (await _post(_served(), tools=[{**TOOLS[0], "strict": "yes"}])).status_code == 400
    assert "x-kvferry-ignored" not in (await _post(_served(), tools=TOOLS)).headers


async def test_thinking_is_an_effort() -> None:
    served = _served()  # the toy template has enable_thinking
    await _whole(served, thinking={"type": "enabled", "budget_tokens": 1024})
    assert bytes(served.request.prompt_token_ids).endswith(b"<think>")
    await _whole(served, thinking={"type": "disabled"})
    assert bytes(served.request.prompt_token_ids).endswith(b"<assistant>")
    await _whole(served, thinking={"type": "between_tools"})  # which is off, as anthropic's types say
    assert bytes(served.request.prompt_token_ids).endswith(b"<assistant>")
    await _whole(served, output_config={"effort": "high", "task_budget": {"type": "tokens", "total": 20_000}})
    assert bytes(served.request.prompt_token_ids).endswith(b"<think>")


@pytest.mark.parametrize("effort", ["low", "medium", "max"])
@pytest.mark.parametrize("kind", ["disabled", "between_tools"])
async def test_no_effort_switches_thinking_on_that_is_disabled(effort: str, kind: str) -> None:
    served = _served()
    await _whole(served, thinking={"type": kind}, output_config={"effort": effort})
    assert bytes(served.request.prompt_token_ids).endswith(b"<assistant>")


async def test_an_effort_that_is_none_is_refused_with_thinking_off_too() -> None:
    response = await _post(_served(), thinking={"type": "disabled"}, output_config={"effort": "silly"})
    assert response.status_code == 400 and "output_config.effort" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"thinking": {"type": "adaptive"}}, "thinking"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "output_config.effort"),
    ],
)
def test_an_effort_goes_by_the_name_of_what_asks_for_it(fields: dict[str, Any], name: str) -> None:
    surface = MessagesSurface()
    surface.chat_body({**BODY, **fields}, None)
    assert surface.own_names("reasoning_effort") == name


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a"}]}]}, "'tool_use'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name must be"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "other"}}, "'other' is none of the request's tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice.name"),
        ({"output_config": {"effort": "enormous"}}, "'output_config.effort' should be"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "'output_config.format.schema' is required"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"thinking": {"type": "always"}}, "one of enabled, adaptive, between_tools, disabled, got an object of 1"),
        ({"thinking": {"type": "enabled", "budget": 5}}, "unknown field 'thinking.budget'; did you mean"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens must be a whole number"),
        ({"tool_choice": {"type": "any"}}, "tool_choice 'any' needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name must be the name of a tool"),
        ({"mcp_servers": [{}]}, "'mcp_servers' is not supported"),
        ({"stop_sequences": ["a"] * 65}, "stop_sequences must be an array of at most 64 strings"),
        ({"stop_sequences": "a"}, "stop_sequences must be an array"),
        ({"stop_sequences": [""]}, "stop_sequences must be an array"),
        ({"stop_sequnces": []}, "did you mean 'stop_sequences'"),
        ({"temperature": -1}, "temperature"),
        ({"output_config": {"colour": 1}}, "unknown field 'output_config.colour'"),
        ({"output_config": "low"}, "output_config must be an object"),
        (PREFILLED | {"output_config": {"format": FORMAT}}, "output_config.format goes with no assistant's text"),
        (PREFILLED | {"system": "Hm.", "output_format": FORMAT}, "output_format goes with no assistant's text"),
        (PREFILLED | {"system": "Hm.", "output_format": FORMAT}, "at the end (messages[1])"),
    ],
)
async def test_a_refusal_has_anthropics_shape(fields: dict[str, Any], part: str) -> None:
    response = await _post(_served(), **fields)
    assert response.status_code == 400
    error = response.json()
    assert set(error) == {"type", "error", "request_id"} and error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error" and part in error["error"]["message"]


@pytest.mark.parametrize(
    ("block", "fault"),
    [
        ({"type": "tool_use", "id": "a", "input": {}}, "name must be a string"),
        ({"type": "tool_use", "id": "a", "name": "f", "input": 5}, "input must be an object, got 5"),
        ({"type": "tool_use", "id": 5, "name": "f", "input": {}}, "id must be a string"),
    ],
)
async def test_what_is_wrong_with_a_call_has_the_clients_place_and_name(block: dict[str, Any], fault: str) -> None:
    said = [{"type": "text", "text": "Look."}, block]
    result = {"type": "tool_result", "tool_use_id": "z", "content": "found"}
    messages = [
        *BODY["messages"],
        {"role": "user", "content": [result, result]},  # two messages of a chat
        {"role": "assistant", "content": said},
    ]
    response = await _post(_served(), system="Be brief.", messages=messages)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(f"messages[2].content[1].{fault}")


async def test_what_is_wrong_with_a_result_has_the_clients_place_and_name() -> None:
    result = {"type": "tool_result", "tool_use_id": 5, "content": "found"}
    response = await _post(_served(), system="x", messages=[{"role": "user", "content": [result]}])
    assert response.json()["error"]["message"].startswith("messages[0].content[0].tool_use_id must be a string")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"system": "</s>"}, "system"),
        ({"system": "x", "messages": [{"role": "user", "content": "</s>"}]}, "messages[0].content"),
    ],
)
async def test_a_special_token_is_refused_by_the_clients_name(fields: dict[str, Any], name: str) -> None:
    response = await _post(_served(model={"special_tokens": "refuse"}), **fields)
    assert response.status_code == 400 and response.json()["error"]["message"].startswith(
        f"{name} has the special token"
    )


async def test_other_errors_have_it_too() -> None:
    response = await _post(_served(refuse=CapacityError("the queue is full")))
    assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")
    response = await _post(_served(), model="other")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")
    events = await _events(_served(fail_after=2, error=StreamError("worker d-1 was lost", "worker_lost", 503)))
    assert events[-1] == {"type": "error", "error": {"type": "overloaded_error", "message": "worker d-1 was lost"}}


async def test_half_a_surrogate_pair_in_streamed_arguments_is_a_question_mark_as_in_whole_ones() -> None:
    """Anthropic's client parses them as they come, and fails at one."""
    call = CALL.replace('"x"', r'"\ud83d\ude00 \ud83d."')
    (whole,) = (await _whole(_served(call), tools=TOOLS))["content"]
    (block,) = _joined(await _events(_served(call), tools=TOOLS))
    assert block["input"] == whole["input"] == {"query": "😀 ?."}


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "/v1/messages/batches", 404, "batches of messages are not served"),
        ("GET", "/v1/messages/batches/msgbatch_1/results", 404, "batches of messages are not served"),
        ("GET", "/v1/messages/other", 404, "no such path"),
        ("GET", "/v1/messages", 405, "GET /v1/messages"),
    ],
)
async def test_what_is_not_served_below_it_is_told_in_its_shape(
    method: str, path: str, status: int, words: str
) -> None:
    async with _served().client() as client:
        response = await client.request(method, path)
        other = await client.request(method, "/v1/messages-of-others")
    body = response.json()
    assert (response.status_code, body["type"]) == (status, "error") and words in body["error"]["message"]
    assert body["error"]["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert other.json()["error"]["code"] == "unknown_url"


async def test_a_request_has_an_id_by_the_name_that_clients_read() -> None:
    async with _served().client(**{"x-request-id": "mine-1"}) as client:
        answers = [await client.post("/v1/messages", json={**BODY, **more}) for more in ({}, {"max_tokens": 0})]
        counted = await client.post("/v1/messages/count_tokens", json=BODY)
        chat = await client.post("/v1/chat/completions", json={"messages": BODY["messages"]})
    assert [answer.status_code for answer in answers] == [200, 400] and answers[1].json()["request_id"] == "mine-1"
    for answer in (*answers, counted):
        assert answer.headers["request-id"] == answer.headers["x-request-id"] == "mine-1"
    assert "request-id" not in chat.headers


async def test_a_key_comes_in_either_header() -> None:
    served = serve(api_keys=("key-1",))
    sent = ({"x-api-key": "key-1"}, {"authorization": "Bearer key-1"}, {"x-api-key": "no"})
    for headers, status in zip(sent, (200, 200, 401), strict=True):
        async with served.client(**headers) as client:
            assert (await client.post("/v1/messages", json=BODY)).status_code == status
    async with served.client(**{"x-api-key": "key-1", "authorization": "Bearer no"}) as client:
        assert (await client.post("/v1/messages", json=BODY)).status_code == 401


async def test_tokens_are_counted_without_an_answer() -> None:
    served = _served()
    async with served.client() as client:
        body = {"model": MODEL, "messages": BODY["messages"], "system": "Be brief."}
        response = await client.post("/v1/messages/count_tokens", json=body)
    assert response.json() == {"input_tokens": len("<system>Be brief.<user>hi<assistant>")}
    assert not served.dispatcher.requests
