"""Reasoning and answer, told apart; and that cutting the text changes nothing."""

from __future__ import annotations

import random

import pytest

from kvferry.router.turns.call_reader import CallReader, joined_calls
from kvferry.router.turns.json_syntaxes import HermesSyntax
from kvferry.router.turns.reasoning import DraftReader, ReasoningReader
from kvferry.router.turns.turn import TaggedReader, call_id

from .samples import FORMS, text_of

WORDS = ("<think>", "</think>", "<thi", "</thin", "nk>", " ", "\n", "so", "ü", "<tool_call>", '{"name": "f"}')


def _read(text: str, *, begins_inside: bool, cuts: list[int]) -> tuple[str, str]:
    reader, reasoning, answer = ReasoningReader(begins_inside=begins_inside), "", ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        more_reasoning, more = reader.push(text[start:end])
        reasoning, answer = reasoning + more_reasoning, answer + more
    more_reasoning, more = reader.push("", is_final=True)
    return reasoning + more_reasoning, answer + more


@pytest.mark.parametrize(
    ("text", "begins_inside", "reasoning", "answer"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", False, "Hm.", "Yes."),
        ("Hm.</think>Yes.\n", True, "Hm.", "Yes.\n"),
        ("<think>\nHm.\n</think>\nYes.", True, "Hm.", "Yes."),
        (" <thin</think>Yes.", True, "<thin", "Yes."),
        ("Yes.", False, "", "Yes."),
        ("Yes <think> no </think>", False, "", "Yes <think> no </think>"),
        ("<think>cut", False, "cut", ""),
        ("<think>cut</thi", False, "cut</thi", ""),
        ("<think></think>", False, "", ""),
        (" \n<thin", False, "", " \n<thin"),
        ("", True, "", ""),
    ],
)
def test_a_text_and_its_parts(text: str, begins_inside: bool, reasoning: str, answer: str) -> None:
    for cuts in ([], list(range(1, len(text)))):
        assert _read(text, begins_inside=begins_inside, cuts=cuts) == (reasoning, answer)


def test_a_cut_at_any_place_changes_nothing() -> None:
    rng = random.Random(5)
    for _ in range(500):
        text = "".join(rng.choice(WORDS) for _ in range(rng.randint(1, 7)))
        for begins_inside in (False, True):
            whole = _read(text, begins_inside=begins_inside, cuts=[])
            assert all(_read(text, begins_inside=begins_inside, cuts=[at]) == whole for at in range(1, len(text)))
            assert _read(text, begins_inside=begins_inside, cuts=list(range(1, len(text)))) == whole


def test_calls_come_after_the_reasoning() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    reader = TaggedReader(ReasoningReader(begins_inside=False), CallReader(HermesSyntax()), has_one_call=True)
    delta = reader.push(f"<think>Not {call}</think>Now:{call}{call}", is_final=True)
    assert (delta.reasoning, delta.content) == (f"Not {call}", "Now:")
    assert [(piece.name, piece.arguments) for piece in delta.calls] == [("f", "{}")]


def test_a_calls_id_is_its_requests() -> None:
    one = call_id(7, [1, 2], 0, 0)
    assert one == call_id(7, [1, 2], 0, 0) and one.startswith("call_") and len(one) == 29
    others = [call_id(8, [1, 2], 0, 0), call_id(7, [1, 3], 0, 0), call_id(7, [1, 2], 1, 0), call_id(7, [1, 2], 0, 1)]
    assert len({one, *others}) == 5
    assert call_id(7, [1], 0, 0, is_short=True).isalnum() and len(call_id(7, [1], 0, 0, is_short=True)) == 9


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.syntax.marks])
def test_calls_at_the_end_of_thoughts_are_the_same_wherever_the_text_is_cut(name: str) -> None:
    rng, form, num_calls, num_drafts = random.Random(7), FORMS[name], 0, 0

    def read(text: str, size: int) -> tuple[str, str, object]:
        syntax = form.syntax
        reader = TaggedReader(ReasoningReader(begins_inside=True), CallReader(syntax), DraftReader(syntax))
        told = [reader.push(text[at : at + size]) for at in range(0, len(text), size)]
        told.append(reader.push("", is_final=True))
        calls = joined_calls([call for each in told for call in each.calls])
        return "".join(each.reasoning for each in told), "".join(each.content for each in told), calls

    for _ in range(150):
        text = f"Hm.\n{text_of(rng, form)}"
        whole = read(text, len(text))
        num_calls, num_drafts = num_calls + bool(whole[2]), num_drafts + ("</think>" not in text and not whole[2])
        for size in (1, 2, 3, 7):
            assert read(text, size) == whole, (text, size)
        thought, answer, calls = read(f"{text} No.", 3)
        if "</think>" not in text and not thought.endswith(" No."):
            assert calls and not answer, text  # what is cut off within a call goes on in it
    assert num_calls > 20 and num_drafts > 20
