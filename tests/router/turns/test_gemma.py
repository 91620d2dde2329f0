"""Gemma 4's calls: what becomes of their arguments, beside thoughts, and how chats with calls are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvferry.models.chat_template import ChatTemplate
from kvferry.router.catalogue.version import ServedModel
from kvferry.router.turns.call_reader import CallReader, joined_calls
from kvferry.router.turns.definitions import parse_tool_use
from kvferry.router.turns.dialect import Dialect
from kvferry.router.turns.gemma import GemmaSyntax
from kvferry.router.turns.gemma_history import with_responses
from kvferry.router.turns.parts import CallPiece
from kvferry.router.turns.syntax import Call

from .. import fakes
from ..fakes import MODEL, VOCAB_SIZE, Script, serve
from .samples import read_calls

SYNTAX = GemmaSyntax({"f": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}})
USE = parse_tool_use([{"type": "function", "function": {"name": "f"}}], None, None)
# The form of the published template, as far as it tells calls and results: whatever tells them, and what thoughts.
FORM = (
    "{%- macro value(it) -%}"
    "{%- if it is string -%}{{ '<|\"|>' + it + '<|\"|>' }}{%- elif it is boolean -%}{{ 'true' if it else 'false' }}"
    "{%- elif it is mapping -%}{{ '{' }}{{ pairs(it) }}{{ '}' }}"
    "{%- elif it is sequence -%}[{% for part in it %}{{ value(part) }}{{ ',' if not loop.last }}{% endfor %}]"
    "{%- elif it is none -%}null{%- else -%}{{ it }}{%- endif -%}{%- endmacro -%}"
    "{%- macro pairs(it) -%}{% for key, child in it | dictsort %}{{ key }}:{{ value(child) }}"
    "{{ ',' if not loop.last }}{% endfor %}{%- endmacro -%}"
    "{%- macro result(name, text) -%}{{ '<|tool_response>response:' + name + '{value:' + value(text) }}"
    "{{ '}<tool_response|>' }}{%- endmacro -%}"
    "{% for tool in tools %}<|tool>declaration:{{ tool.function.name }}<tool|>{% endfor %}"
)
CALLS = (
    "{% for call in message.tool_calls or [] %}{{ '<|tool_call>call:' + call.function.name + '{' }}"
    "{{ pairs(call.function.arguments) }}{{ '}<tool_call|>' }}{% endfor %}"
)
LATER = (  # results are messages
    FORM + "{% for message in messages %}{% if message.role == 'tool' %}"
    "{% for call in messages[loop.index0 - 1].tool_calls or [] %}{% if call.id == message.tool_call_id %}"
    "{{ result(call.function.name, message.content) }}{% endif %}{% endfor %}"
    "{% else %}{{ '<|turn>' + message.role + '\\n' }}" + CALLS + "{{ message.content }}{% endif %}{% endfor %}"
    "{% if enable_thinking %}<|think|>{% else %}<|channel>thought\n<channel|>{% endif %}"
)
FIRST = (  # results are a field of the message with the calls
    FORM + "{% for message in messages %}{{ '<|turn>' + message.role + '\\n' }}" + CALLS + "{% for each in "
    "message.tool_responses or [] %}{{ result(each.name, each.response) }}{% endfor %}{{ message.content }}{% endfor %}"
)
TEXT = '<|tool_call>call:f{city:<|"|>Oslo<|"|>,days:2}<tool_call|>'


def _dialect(source: str) -> Dialect:
    return Dialect.of_template(source, variables=ChatTemplate(source).variables)


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("{}", {}),
        ("{ }", {}),
        ('{city:<|"|><|"|>}', {"city": ""}),
        ('{city:<|"|>"a" {b} [c], d:e \\n\nü😀<tool_call><|"|>}', {"city": '"a" {b} [c], d:e \\n\nü😀<tool_call>'}),
        ('{city:<|"|>}<tool_call|><|"|>}', {"city": "}<tool_call|>"}),
        ("{days:-2,x:1.5e-3,y:true,z:null}", {"days": -2, "x": 1.5e-3, "y": True, "z": None}),
        ('{a:{b:[{c:<|"|>d<|"|>},[],{}],e:{}}}', {"a": {"b": [{"c": "d"}, [], {}], "e": {}}}),
        ("{a:[1,[2,false]]}", {"a": [1, [2, False]]}),
        ('{\n  city : <|"|>Oslo<|"|> ,\n  days: [ 1 , 2 ]\n}', {"city": "Oslo", "days": [1, 2]}),
        ("{Wetter am-Ort.1:1}", {"Wetter am-Ort.1": 1}),
        # What is no word of the form, as it is meant.
        ('{<|"|>city<|"|>:<|"|>Oslo<|"|>}', {"city": "Oslo"}),
        ('{"city": "Oslo", "days": 2}', {"city": "Oslo", "days": 2}),
        ("{city:Oslo, Norway:1}", {"city": "Oslo", "Norway": 1}),
        ("{city:New York,days:7}", {"city": "New York", "days": 7}),
        ("{city:7,x:007,y:NaN,z:1e999}", {"city": "7", "x": "007", "y": "NaN", "z": "1e999"}),
        ("{city:null,x:None,y:False}", {"city": None, "x": None, "y": False}),
        ("{city:true,other:{city:true}}", {"city": "true", "other": {"city": True}}),
        ("{days:1,x:[1,],}", {"days": 1, "x": [1]}),
    ],
)  # fmt: skip
def test_arguments_become_json_however_they_are_cut(written: str, arguments: dict[str, object]) -> None:
    text = f"So.\n<|tool_call>call:f{written}<tool_call|>"
    content, (call,) = read_calls(text, SYNTAX)
    assert (content, call.name, json.loads(call.arguments)) == ("So.", "f", arguments)
    for size in (1, 2, 3, 5, 11):
        reader, pieces = CallReader(SYNTAX), list[CallPiece]()
        for at in range(0, len(text), size):
            pieces += reader.push(text[at : at + size]).calls
        pieces += reader.push("", is_final=True).calls
        assert joined_calls(pieces) == [call]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"{TEXT}{TEXT}", "", ['{"city": "Oslo", "days": 2}'] * 2),
        (f"{TEXT}\n{TEXT} Done.", " Done.", ['{"city": "Oslo", "days": 2}'] * 2),
        ('<|tool_call>call:f{city:<|"|>Os', "", ['{"city": "Os']),  # cut by a length, as these are
        ('<|tool_call>call:f{city:<|"|>Oslo<|"', "", ['{"city": "Oslo']),
        ("<|tool_call>call:f{days:1,x:12", "", ['{"days": 1']),
        ("<|tool_call>call:f{days:1,x:[3,", "", ['{"days": 1, "x": [3']),
        # What was open when it broke is closed, so that clients can read it.
        ("<|tool_call>call:f{days:[1,2<tool_call|>", "", ['{"days": [1, 2]}']),
        ('<|tool_call>call:f{a:{city:<|"|>x<|"|>]<tool_call|>', "]<tool_call|>", ['{"a": {"city": "x"}}']),
        ("<|tool_call>call:f{days:1,:2}", ":2}", ['{"days": 1}']),
        ("<|tool_call>call:f{days:1}", "", ['{"days": 1}']),
    ],
)  # fmt: skip
def test_calls_that_are_several_or_broken(text: str, content: str, calls: list[str]) -> None:
    assert read_calls(text, SYNTAX) == (content, [Call("f", arguments) for arguments in calls])


@pytest.mark.parametrize("depth", [63, 64, 65, 200])
def test_arguments_nested_too_deeply_break_at_the_same_place_however_they_are_cut(depth: int) -> None:
    text = f"<|tool_call>call:f{{days:{'[' * depth}1{']' * depth}}}<tool_call|>"
    content, (call,) = read_calls(text, SYNTAX)
    assert ("[" in content, "1" in call.arguments) == (depth > 63, depth <= 63)
    json.loads(call.arguments)
    reader = CallReader(SYNTAX)
    deltas = [*map(reader.push, text), reader.push("", is_final=True)]
    assert "".join(delta.content for delta in deltas) == content
    assert joined_calls([piece for delta in deltas for piece in delta.calls]) == [call]


@pytest.mark.parametrize(
    "text",
    [
        "<|tool_call>",
        "<|tool_call>call:",
        "<|tool_call>call:f{",
        "<|tool_call>call:f{days",
        "<|tool_call>call:f{]}<tool_call|>",
        "<|tool_call>call:f{days}<tool_call|>",
        "<|tool_call>call:f{days:}<tool_call|>",
        "<|tool_call>call:f()<tool_call|>",
        "<|tool_call>call:{}<tool_call|>",
        '<|tool_call>{"name": "f"}<tool_call|>',
        "<|tool_call> is its mark, <tool_call|> the other.",
        "call:f{days:1}",
        f"<|tool_call>call:f{{{'x' * 400}}}",
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    assert read_calls(text, SYNTAX) == (text, [])
    reader = CallReader(SYNTAX)
    deltas = [reader.push(char) for char in text] + [reader.push("", is_final=True)]
    assert "".join(delta.content for delta in deltas) == text and not any(delta.calls for delta in deltas)


def test_texts_are_told_as_they_are_written() -> None:
    reader = CallReader(SYNTAX)
    assert not reader.push("<|tool_call>call:f{").calls
    assert reader.push('city:<|"|>Os').calls == [CallPiece(0, "f", '{"city": "Os')]
    assert reader.push('lo <|"').calls == [CallPiece(0, None, "lo ")]
    assert reader.push("|>,days:1").calls == [CallPiece(0, None, '"')]
    assert reader.push("2}").calls == [CallPiece(0, None, ', "days": 12}')]
    assert not reader.push("<tool_call|>").calls


def test_a_long_call_takes_no_more_than_its_text() -> None:
    text = '<|tool_call>call:f{city:<|"|>' + "x\n" * 100_000
    assert read_calls(text, SYNTAX)[1][0].arguments == '{"city": "' + "x\\n" * 100_000
    nested = "<|tool_call>call:f" + "{a:" * 100_000
    content, (call,) = read_calls(nested, SYNTAX)
    assert json.loads(call.arguments) and content
    bare = "<|tool_call>call:f{days:" + "7" * 100_000
    assert read_calls(bare, SYNTAX) == (bare, [])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"<|channel>thought\nHm.\n<channel|>{TEXT}", ("Hm.", "", 1)),
        (f"<|channel>thought\nHm.\n<channel|>So.{TEXT}{TEXT}", ("Hm.", "So.", 2)),
        (f"<|channel>thought\n<channel|>{TEXT}", ("", "", 1)),
        (f"{TEXT}", ("", "", 1)),
        (f"<|channel>thought\nFirst {TEXT} or not.\n<channel|>So.", (f"First {TEXT} or not.", "So.", 0)),
        (f"<|channel>thought\nHm.\n{TEXT}", ("Hm.", "", 1)),  # thoughts that never end
    ],
)
def test_calls_stand_beside_thoughts_however_they_are_cut(text: str, told: tuple[str, str, int]) -> None:
    dialect = _dialect(LATER)
    assert dialect.tool_parser == dialect.reasoning_parser == "gemma4" and dialect.has_switch
    assert dialect.shown_marks(USE) == {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'}
    for cut in range(len(text) + 1):
        reader = dialect.reader(USE, begins_inside=False)
        deltas = [reader.push(text[:cut]), reader.push(text[cut:]), reader.push("", is_final=True)]
        calls = joined_calls([call for each in deltas for call in each.calls])
        found = ("".join(each.reasoning for each in deltas), "".join(each.content for each in deltas), len(calls))
        assert found == told and all(call == Call("f", '{"city": "Oslo", "days": 2}') for call in calls)


def test_a_call_that_must_come_is_read_as_the_json_that_its_grammar_lets_through() -> None:
    use = parse_tool_use([{"type": "function", "function": {"name": "f"}}], "required", None)
    reader = _dialect(LATER).without_reasoning.reader(use, begins_inside=False)
    turn = reader.push('[{"name": "f", "arguments": {"days": 2}}]', is_final=True)
    assert joined_calls(turn.calls) == [Call("f", '{"days": 2}')]


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"id": name, "type": "function", "function": {"name": name, "arguments": {"b": [1, "x"], "a": {"c": None}}}}
        for name in ("f", "g")
    ]},
    {"role": "tool", "tool_call_id": "g", "content": "dry"},
    {"role": "tool", "tool_call_id": "f", "content": "wet"},
    {"role": "assistant", "content": "It rains."},
    {"role": "user", "content": "thanks"},
]  # fmt: skip
TOLD = (
    '<|tool_call>call:f{a:{c:null},b:[1,<|"|>x<|"|>]}<tool_call|><|tool_call>call:g{a:{c:null},b:[1,<|"|>x<|"|>]}'
    '<tool_call|><|tool_response>response:g{value:<|"|>dry<|"|>}<tool_response|>'
    '<|tool_response>response:f{value:<|"|>wet<|"|>}<tool_response|>'
)


def test_what_a_template_tells_of_earlier_calls_is_read_back() -> None:
    told = ChatTemplate(FIRST).render(with_responses(HISTORY), tools=USE.told())
    assert told == f"<|tool>declaration:f<tool|><|turn>user\nhi<|turn>assistant\n{TOLD}It rains.<|turn>user\nthanks"
    _, calls = read_calls(told, SYNTAX)
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        (name, {"a": {"c": None}, "b": [1, "x"]}) for name in ("f", "g")
    ]


def test_results_without_ids_are_those_of_the_calls_in_their_order() -> None:
    history = [{name: value for name, value in message.items() if name != "tool_call_id"} for message in HISTORY]
    (_, asked, thanks) = with_responses(history)
    assert asked["tool_responses"] == [{"name": "f", "response": "dry"}, {"name": "g", "response": "wet"}]
    assert (asked["content"], thanks["content"]) == ("It rains.", "thanks")
    assert history[1]["content"] == "" and "tool_responses" not in history[1]


def test_a_result_of_no_call_stays_a_message() -> None:
    lone = [{"role": "user", "content": "hi"}, {"role": "tool", "content": "x"}]
    assert with_responses(lone) == lone
    said = [{**HISTORY[1], "content": "I look."}, HISTORY[2], HISTORY[4]]
    assert [message["content"] for message in with_responses(said)] == ["I look.", "It rains."]


@pytest.mark.parametrize("source", [FIRST, LATER])
async def test_a_chat_with_calls_is_told_as_the_template_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    fakes.use_template(tmp_path, monkeypatch, source)
    served = serve(Script(TEXT), model=ServedModel(MODEL, 4096, VOCAB_SIZE))
    asked = [
        {**message, "tool_calls": [{**call, "function": {"name": call["function"]["name"], "arguments": '{"a":1}'}}
        for call in message["tool_calls"]]} if "tool_calls" in message else message
        for message in HISTORY[:3]
    ]  # fmt: skip
    body = {"model": MODEL, "messages": asked, "tools": USE.told()}
    async with served.client() as client:
        response = await client.post("/v1/chat/completions", json=body)
    prompt = bytes(served.request.prompt_token_ids).decode()
    told = '<|tool_call>call:g{a:1}<tool_call|><|tool_response>response:g{value:<|"|>dry<|"|>}<tool_response|>'
    assert told in prompt
    (choice,) = response.json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and call["function"]["arguments"] == '{"city": "Oslo", "days": 2}'
