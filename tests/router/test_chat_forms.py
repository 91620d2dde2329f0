"""Calls in the forms of models, over a scripted dispatcher: by their parser's name or template, on every surface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvferry.router.catalogue.version import ServedModel

from . import fakes
from .fakes import MODEL, VOCAB_SIZE, Script, events, serve, typed_events

CHAT = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}, "limit": {"type": "integer"}}}
FUNCTION = {"name": "search", "parameters": PARAMETERS}
CALLS = [("search", '{"query": "x", "limit": 2}'), ("search", '{"query": "y"}')]
LIST = '[{"name": "search", "arguments": {"query": "x", "limit": 2}}, {"name": "search", "arguments": {"query": "y"}}]'
FORMS = {
    "granite": f"<|tool_call|>{LIST}",
    "phi4_mini_json": f"functools{LIST}",
    "olmo3": "<function_calls>\nsearch(query='x', limit=2)\nsearch(query=\"y\")\n</function_calls>",
    "pythonic": '[search(query="x", limit=2), search(query="y")]',
    "llama4_pythonic": '<|python_start|>[search(query="x", limit=2), search(query="y")]<|python_end|>',
    "lfm2": '<|tool_call_start|>[search(query="x", limit=2), search(query="y")]<|tool_call_end|>',
    "glm45": (
        "<tool_call>search\n<arg_key>query</arg_key>\n<arg_value>x</arg_value>\n"
        "<arg_key>limit</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n"
        "<tool_call>search\n<arg_key>query</arg_key>\n<arg_value>y</arg_value>\n</tool_call>"
    ),
    "glm47": (
        "<tool_call>search<arg_key>query</arg_key><arg_value>x</arg_value>"
        "<arg_key>limit</arg_key><arg_value>2</arg_value></tool_call>"
        "<tool_call>search<arg_key>query</arg_key><arg_value>y</arg_value></tool_call>"
    ),
    "minimax_m2": (
        '<minimax:tool_call>\n<invoke name="search">\n<parameter name="query">x</parameter>\n'
        '<parameter name="limit">2</parameter>\n</invoke>\n'
        '<invoke name="search">\n<parameter name="query">y</parameter>\n</invoke>\n</minimax:tool_call>'
    ),
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>search\n```json\n"
        '{"query": "x", "limit": 2}\n```<｜tool▁call▁end｜>\n'
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>search\n```json\n{"query": "y"}\n```<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>"
    ),
    "gemma4": (
        '<|tool_call>call:search{query:<|"|>x<|"|>,limit:2}<tool_call|>'
        '<|tool_call>call:search{query:<|"|>y<|"|>}<tool_call|>'
    ),
    "hunyuan_a13b": f"<tool_calls>{LIST}</tool_calls>",
    "nemotron_json": f"<TOOLCALL>{LIST}</TOOLCALL>",
    "cohere_command3": (
        "<|START_ACTION|>[\n"
        '    {"tool_call_id": "0", "tool_name": "search", "parameters": {"query": "x", "limit": 2}},\n'
        '    {"tool_call_id": "1", "tool_name": "search", "parameters": {"query": "y"}}\n]<|END_ACTION|>'
    ),
    "deepseek_v31": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>search<｜tool▁sep｜>{"query": "x", "limit": 2}<｜tool▁call▁end｜>'
        '<｜tool▁call▁begin｜>search<｜tool▁sep｜>{"query": "y"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
}


async def _post(parser: Any, text: str, path: str, **fields: Any) -> Any:
    served = serve(Script(text), model=ServedModel(MODEL, 4096, VOCAB_SIZE, tool_parser=parser))
    async with served.client() as client:
        response = await client.post(path, json={"model": MODEL, **fields})
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize("parser", FORMS)
async def test_calls_in_every_form_are_the_same_on_every_surface_and_in_streams(parser: str) -> None:
    text = FORMS[parser]
    chat: dict[str, Any] = {"messages": CHAT, "tools": [{"type": "function", "function": FUNCTION}]}
    (choice,) = (await _post(parser, text, "/v1/chat/completions", **chat)).json()["choices"]
    told = [(call["function"]["name"], call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]
    assert (choice["message"]["content"], choice["finish_reason"], told) == (None, "tool_calls", CALLS)

    chunks: Any = events((await _post(parser, text, "/v1/chat/completions", **chat, stream=True)).text)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    pieces = [call for delta in deltas for call in delta.get("tool_calls", [])]
    for index, call in enumerate(CALLS):
        own = [piece["function"] for piece in pieces if piece["index"] == index]
        assert (own[0]["name"], "".join(piece["arguments"] for piece in own)) == call
    assert not any(delta.get("content") for delta in deltas)

    tools = [{"name": "search", "input_schema": PARAMETERS}]
    path = "/v1/messages"
    message = (await _post(parser, text, path, messages=CHAT, max_tokens=2000, tools=tools)).json()
    assert [block["type"] for block in message["content"]] == ["tool_use", "tool_use"]
    assert [block["input"] for block in message["content"]] == [{"query": "x", "limit": 2}, {"query": "y"}]

    asked = {"input": "hi", "tools": [{"type": "function", **FUNCTION}], "stream": True}
    streamed = typed_events((await _post(parser, text, "/v1/responses", **asked)).text)
    items = [event["item"] for event in streamed if event["type"] == "response.output_item.done"]
    assert [(item["name"], item["arguments"]) for item in items] == CALLS


# DeepSeek V3.1's with tools, as far as it tells calls: it joins them with "+".
JOINED = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}<{{ message.role }}>"
    "{{ message.content }}{% for call in message.tool_calls or [] %}"
    "{{ call['function']['name'] + '|' + call['function']['arguments'] }}"
    "{% endfor %}{% endfor %}"
)


# Granite 3's, as far as it tells messages: it knows of no calls.
WITHOUT_CALLS = (
    "{% if tools %}respond only with <|tool_call|> followed by a JSON list of {{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
)


# LFM2's, as far as it tells messages: neither does it.
LISTED = (
    "{% if tools %}List of tools: <|tool_list_start|>{{ tools | tojson }}<|tool_list_end|>{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
)
AS_JSON = '<|tool_call|>[{"name": "a", "arguments": {"a": 1}}, {"name": "b", "arguments": {"a": 1}}]'
AS_PYTHON = "<|tool_call_start|>[a(a=1), b(a=1)]<|tool_call_end|>"


@pytest.mark.parametrize(("template", "told"), [(WITHOUT_CALLS, AS_JSON), (LISTED, AS_PYTHON)])
async def test_earlier_calls_are_content_where_the_template_tells_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, told: str
) -> None:
    fakes.use_template(tmp_path, monkeypatch, template)
    served = serve(Script("ok"), model=ServedModel(MODEL, 4096, VOCAB_SIZE))
    calls = [{"id": name, "function": {"name": name, "arguments": '{"a":1}'}} for name in "ab"]
    asked = {"role": "assistant", "content": "So.", "tool_calls": calls}
    body = {"messages": [*CHAT, asked], "tools": [{"type": "function", "function": FUNCTION}]}
    async with served.client() as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert f"<assistant>So.{told}" in bytes(served.request.prompt_token_ids).decode()


async def test_earlier_arguments_are_a_text_where_the_template_wants_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first call is the end of its conversation: all that follows is refused."""
    fakes.use_template(tmp_path, monkeypatch, JOINED)
    served = serve(Script("ok"), model=ServedModel(MODEL, 4096, VOCAB_SIZE))
    call = {"id": "a", "type": "function", "function": {"name": "search", "arguments": '{"query":"\u00e9"}'}}
    asked = [*CHAT, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "a", "content": "x"}]
    body = {"messages": asked, "tools": [{"type": "function", "function": FUNCTION}]}
    async with served.client() as client:
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        assert 'search|{"query": "\u00e9"}<tool>x' in bytes(served.request.prompt_token_ids).decode()
