"""Answers in channels: thoughts, text and calls told apart, however the text is cut; histories for such templates."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvferry.router.turns.call_reader import joined_calls
from kvferry.router.turns.channel_history import channel_messages, described_tools
from kvferry.router.turns.channels import MARKS, ChannelCount, ChannelReader
from kvferry.router.turns.definitions import ToolUse, parse_tool_use
from kvferry.router.turns.dialect import Dialect
from kvferry.router.turns.parts import Thought, TurnDelta

NAMES = frozenset({"f", "g"})
THOUGHT = "<|channel|>analysis<|message|>Hm, so.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Yes."
CALL = '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}'
WORDS = (
    *sorted(MARKS), "<|message|>", "<|message|>", "<|channel|>", "<|chan", "nel|>", "assistant", "analysis", "final",
    "commentary", " to=functions.f", " to=python", "to=g", " <|constrain|>json", " ", "\n", '{"a": 1}', "Hm <", "ü",
)  # fmt: skip


def _read(text: str, cuts: list[int], names: frozenset[str] = NAMES) -> TurnDelta:
    reader, whole = ChannelReader(names), TurnDelta()
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        whole.parts += reader.push(text[start:end]).parts
    last = reader.push("", is_final=True)
    return TurnDelta([*whole.parts, *last.parts], last.ends_call)


def _told(delta: TurnDelta) -> tuple[str, str, list[tuple[str, str]], bool]:
    calls = [(call.name, call.arguments) for call in joined_calls(delta.calls)]
    return delta.reasoning, delta.content, calls, delta.ends_call


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        (f"{THOUGHT}{FINAL}", "Hm, so.", "Yes.", []),
        (f"{THOUGHT}{FINAL}<|return|>", "Hm, so.", "Yes.", []),
        (f"{THOUGHT}{CALL}", "Hm, so.", "", [("f", '{"a": 1}')]),
        (f"{CALL}<|call|>{CALL}<|call|>", "", "", [("f", '{"a": 1}')] * 2),
        ('to=functions.g<|channel|>commentary json<|message|> {"a": 1}\n', "", "", [("g", '{"a": 1}')]),
        ("<|channel|>commentary to=g code<|message|>{}<|call|>", "", "", [("g", "{}")]),
        ("<|channel|>commentary<|message|>I look.<|end|>" + CALL, "", "I look.", [("f", '{"a": 1}')]),
        (f"{THOUGHT}<|start|>assistant{THOUGHT}{FINAL}", "Hm, so.\nHm, so.", "Yes.", []),
        ("<|channel|>analysis to=python code<|message|>1 + 1<|call|>", "1 + 1", "", []),
        ("<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>Yes.", "Hm.", "Yes.", []),
        (" so it is.", "", " so it is.", []),
        ("Yes <b>there</b> <|", "", "Yes <b>there</b> <|", []),
        ("<|chan", "", "<|chan", []),
        ("<|channel|>fin", "", "", []),
        ("<|channel|>analysis<|message|>cut<|en", "cut<|en", "", []),
        ("", "", "", []),
    ],
)
def test_a_text_and_its_parts(text: str, reasoning: str, content: str, calls: list[tuple[str, str]]) -> None:
    for cuts in ([], list(range(1, len(text)))):
        told = _told(_read(text, cuts))
        assert told == (reasoning, content, calls, bool(calls))


def test_a_cut_at_any_place_changes_nothing() -> None:
    rng = random.Random(5)
    num_calls = 0
    for number in range(600):
        text = "".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12))) + "x" * (600 if number % 50 == 0 else 0)
        whole = _told(_read(text, []))
        assert all(_told(_read(text, [at])) == whole for at in range(1, min(len(text), 90)))
        assert _told(_read(text, list(range(1, len(text))))) == whole
        num_calls += len(whole[2])
    assert num_calls > 20


def test_a_header_without_an_end_is_text() -> None:
    text = "<|channel|>final " + "so " * 300
    assert _told(_read(text, [])) == ("", text.removeprefix("<|channel|>"), [], False)


def test_parts_come_in_their_order() -> None:
    delta = _read(f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{THOUGHT}{CALL}", [])
    assert [type(part) for part in delta.parts[:2]] == [str, Thought] and delta.calls


def test_without_tools_nothing_is_a_call() -> None:
    assert _told(_read(f"{THOUGHT}{CALL}", [], frozenset())) == ('Hm, so.\n{"a": 1}', "", [], False)


def test_one_call_at_most_where_the_request_says_so() -> None:
    reader = ChannelReader(NAMES, has_one_call=True)
    delta = reader.push(f"{CALL}<|call|>{CALL}<|call|>", is_final=True)
    assert _told(delta)[2:] == ([("f", '{"a": 1}')], True)


def test_tokens_of_thoughts_are_counted_with_their_marks() -> None:
    tokens = ["<|channel|>", "analysis", "<|message|>", "Hm", ",", " so.", "<|end|>", "<|start|>", "assistant"]
    for rest, more in ((["<|channel|>", "final", "<|message|>", "Yes."], 0), ([*tokens[:3], "Oh", "<|end|>"], 7)):
        count = ChannelCount()
        for number, text in enumerate([*tokens, *rest], 1):
            count.push(text, number)
        assert count.num_tokens == 7 + more


def test_a_template_with_channels_shows_its_dialect() -> None:
    dialect = Dialect.of_template("{{ tools }}<|channel|>", variables={"tools", "reasoning_effort"})
    assert dialect.has_channels and dialect.reasons and dialect.shown_marks(ToolUse()) == MARKS
    assert [dialect.effort(asked) for asked in ("none", "medium", "xhigh")] == ["low", "medium", "high"]
    assert not dialect.without_reasoning.has_channels
    for named in ({"tool_parser": "openai"}, {"reasoning_parser": "openai_gptoss"}):
        assert Dialect.of_template("{{ tools }}", **named).has_channels  # type: ignore[arg-type]
    assert not Dialect.of_template("<|channel|>", reasoning_parser="none").has_channels


def _call(name: str, call_id: str | None = None) -> dict[str, Any]:
    call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": {}}}
    return call if call_id is None else {**call, "id": call_id}


def _result(text: str, call_id: str | None = None) -> dict[str, Any]:
    result = {"role": "tool", "content": text}
    return result if call_id is None else {**result, "tool_call_id": call_id}


@pytest.mark.parametrize("ids", [("a", "b"), (None, None)])
def test_calls_of_one_message_are_told_one_after_the_other(ids: tuple[str | None, str | None]) -> None:
    one, other = _call("f", ids[0]), _call("g", ids[1])
    results = [_result("1", ids[0]), _result("2", ids[1])]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "Both.",
        "reasoning_content": "Hm.",
        "tool_calls": [one, other],
    }
    given = results if ids[0] is None else results[::-1]
    told = channel_messages([{"role": "user", "content": "hi"}, message, *given, {"role": "user", "content": "So?"}])
    assert told[1:5] == [
        {"role": "assistant", "content": "", "tool_calls": [one], "thinking": "Hm.\nBoth."},
        results[0],
        {"role": "assistant", "content": "", "tool_calls": [other]},
        results[1],
    ]
    assert [each["role"] for each in told] == ["user", "assistant", "tool", "assistant", "tool", "user"]


def test_no_result_is_lost_and_thoughts_have_the_templates_name() -> None:
    stray = _result("x", "nobody's")
    message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [_call("f", "a")]}
    assert channel_messages([message, stray]) == [message, stray]
    said: dict[str, Any] = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    assert channel_messages([said]) == [{"role": "assistant", "content": "Yes.", "thinking": "Hm."}]


def test_every_tool_has_a_description() -> None:
    tools = parse_tool_use([{"type": "function", "function": {"name": "f"}}], None, None).told()
    (told,) = described_tools(tools)
    assert told["function"] == {**tools[0]["function"], "description": ""}  # type: ignore[dict-item]
