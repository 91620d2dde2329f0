"""The history checker: a clean history passes, and each planted breach is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvferry.tools.chaos.events import (
    Cut,
    Delta,
    Done,
    Event,
    Failed,
    History,
    Left,
    Note,
    RequestEvent,
    Sent,
    Usage,
    encode_event,
    read_history,
)
from kvferry.tools.chaos.history import breaches_of, judge_all, main


def _sent(request: int, *, is_reference: bool = False, num_choices: int = 1) -> Sent:
    return Sent(
        request=request, ask=5, kind="greedy", at_s=0.0, num_choices=num_choices, max_tokens=4,
        is_reference=is_reference,
    )  # fmt: skip


def _delta(request: int, text: str, ids: list[int], choice: int = 0, **more: object) -> Delta:
    return Delta(request=request, at_s=1.0, choice=choice, text=text, token_ids=ids, **more)  # type: ignore[arg-type]


def _usage(request: int, num_tokens: int) -> Usage:
    return Usage(request=request, at_s=2.0, num_prompt_tokens=3, num_completion_tokens=num_tokens)


def _done(request: int) -> Done:
    return Done(request=request, at_s=2.0, answer_id=f"id{request}")


def _row(request: int, num_tokens: int, num_repeated: int = 0) -> Note:
    detail: dict[str, object] = {"completion_tokens": num_tokens, "repeated_tokens": num_repeated}
    return Note(at_s=2.1, what="request_finished", answer_id=f"id{request}", detail=detail)


def _answer(request: int) -> list[RequestEvent]:
    return [_delta(request, "ab", [1, 2]), _delta(request, "cd", [3, 4], finish="length"), _usage(request, 4)]


def _history(*events: Event) -> History:
    """Request 1 is the reference, request 2 what is planted."""
    history = History()
    for event in (_sent(1, is_reference=True), *_answer(1), _done(1), _row(1, 4), _sent(2), *events):
        history.add(event)
    return history


def _rules(history: History) -> set[str]:
    return {breach.rule for breach in breaches_of(history)}


def test_an_answer_like_the_undisturbed_one_breaks_nothing() -> None:
    assert breaches_of(_history(*_answer(2), _done(2), _row(2, 4))) == []


def test_how_an_answer_was_cut_into_chunks_does_not_matter() -> None:
    chunks = [_delta(2, "", [1]), _delta(2, "abc", [2, 3]), _delta(2, "d", [4]), _delta(2, "", [], finish="length")]
    assert breaches_of(_history(*chunks, _usage(2, 4), _done(2), _row(2, 4))) == []


def test_a_proper_error_is_an_end() -> None:
    failed = Failed(request=2, at_s=2.0, status=503, code="no_decode_capacity", message="no decode worker")
    history = _history(_delta(2, "ab", [1, 2]), failed)
    assert breaches_of(history) == []
    assert not judge_all(history)[2].is_lost


def test_a_repeated_token_is_counted() -> None:
    history = _history(
        _delta(2, "ab", [1, 2]), _delta(2, "bcd", [2, 3, 4], finish="length"), _usage(2, 5), _done(2), _row(2, 5)
    )
    verdict = judge_all(history)[2]
    assert (verdict.num_repeated, verdict.num_missing, verdict.num_changed) == (1, 0, 0)
    assert {"EQ", "I6"} <= _rules(history)  # five tokens where four were asked for


def test_a_missing_token_is_counted() -> None:
    history = _history(
        _delta(2, "a", [1]), _delta(2, "cd", [3, 4], finish="length"), _usage(2, 3), _done(2), _row(2, 3)
    )
    verdict = judge_all(history)[2]
    assert (verdict.num_repeated, verdict.num_missing, verdict.num_changed) == (0, 1, 0)
    assert _rules(history) == {"EQ"}


def test_a_changed_token_is_counted() -> None:
    history = _history(_delta(2, "abXd", [1, 2, 9, 4], finish="length"), _usage(2, 4), _done(2), _row(2, 4))
    verdict = judge_all(history)[2]
    assert (verdict.num_repeated, verdict.num_missing, verdict.num_changed) == (0, 0, 1)
    assert next(str(breach) for breach in verdict.breaches).startswith("EQ request 2: choice 0: 0 tokens missing")


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"text": "abcD", "finish": "length"}, "text"),
        ({"text": "abcd", "finish": "stop"}, "finish"),
        ({"text": "abcd", "finish": "length", "stop_reason": 4}, "stop_reason"),
        ({"text": "abcd", "finish": "length", "logprobs": [["a", -0.5]]}, "logprobs"),
    ],
)
def test_whatever_else_differs_is_named(more: dict[str, object], what: str) -> None:
    delta = Delta(request=2, at_s=1.0, choice=0, token_ids=[1, 2, 3, 4], **more)  # type: ignore[arg-type]
    [breach] = breaches_of(_history(delta, _usage(2, 4), _done(2), _row(2, 4)))
    assert breach.rule == "EQ" and what in breach.text


LEFT = Left(request=2, at_s=2.0)


@pytest.mark.parametrize(
    "before", [[], [_delta(2, "a", [1])], _answer(2)[:-1], [_delta(2, "", [1])]], ids=["nothing", "some", "all", "ids"]
)
def test_who_leaves_has_had_the_beginning_of_an_answer(before: list[RequestEvent]) -> None:
    history = _history(*before, LEFT)
    assert breaches_of(history) == [] and not judge_all(history)[2].is_lost


@pytest.mark.parametrize(
    "before",
    [
        [_delta(2, "b", [1])],
        [_delta(2, "ab", [1, 3])],
        [_delta(2, "ab", [1, 2]), _delta(2, "ab", [1, 2])],
        [_delta(2, "abcd", [1, 2, 3, 4], finish="stop")],
        [_delta(2, "ab", [1, 2], calls="f")],
    ],
    ids=["text", "token", "twice", "finish", "calls"],
)
def test_who_leaves_has_had_nothing_else(before: list[RequestEvent]) -> None:
    assert "EQ" in _rules(_history(*before, LEFT))


PLANTED: dict[str, tuple[str, list[Event]]] = {
    "text after the finish reason": ("I6", [*_answer(2), _delta(2, "x", [7]), _done(2)]),
    "an unknown choice": ("I6", [_delta(2, "x", [7], choice=3), *_answer(2), _done(2)]),
    "an offset that goes back": (
        "I6",
        [_delta(2, "ab", [1, 2], offsets=[0, 1]), _delta(2, "cd", [3, 4], offsets=[0, 3], finish="length"),
         _usage(2, 4), _done(2)],
    ),
    "no end": ("I8", [*_answer(2)]),
    "an end without [DONE]": ("I8", [*_answer(2), Cut(request=2, at_s=2.0, why="ended without [DONE]")]),
    "[DONE] without a finish reason": ("I8", [_delta(2, "ab", [1, 2]), _usage(2, 2), _done(2)]),
    "two finish reasons": (
        "I8",
        [_delta(2, "abcd", [1, 2, 3, 4], finish="length"), _delta(2, "", [], finish="length"), _usage(2, 4), _done(2)],
    ),
    "an unnatural finish reason": ("I8", [_delta(2, "ab", [1, 2], finish="abort"), _usage(2, 2), _done(2)]),
    "an error after [DONE]": (
        "I8",
        [*_answer(2), _done(2), Failed(request=2, at_s=3.0, status=200, code="worker_lost", message="lost")],
    ),
    "tokens for who has left": ("I8", [LEFT, _delta(2, "a", [1])]),
    "tokens after [DONE]": ("I8", [*_answer(2), _done(2), _delta(2, "x", [7])]),
    "an error that is none": ("I8", [Failed(request=2, at_s=2.0, status=502, code="", message="<html>")]),
    "no usage": ("I9", [*_answer(2)[:-1], _done(2)]),
    "usage twice": ("I9", [*_answer(2), _usage(2, 4), _done(2)]),
    "usage that counts what was not delivered": ("I9", [*_answer(2)[:-1], _usage(2, 5), _done(2)]),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_breach_is_found(name: str) -> None:
    rule, events = PLANTED[name]
    assert rule in _rules(_history(*events, _row(2, 4)))


@pytest.mark.parametrize(
    ("rows", "rule"), [([], "I8"), ([_row(2, 4), _row(2, 4)], "I8"), ([_row(2, 3)], "I9")], ids=["none", "two", "other"]
)
def test_the_router_has_one_row_for_each_answer_and_it_counts_as_the_client_does(rows: list[Note], rule: str) -> None:
    assert _rules(_history(*_answer(2), _done(2), *rows)) == {rule}


def test_of_an_answer_that_was_told_twice_the_last_row_counts() -> None:
    """Its router died when it had told it, and before all of it had left: the client came back."""
    for rows, rules in (([_row(2, 4), _row(2, 4, 4)], set()), ([_row(2, 4), _row(2, 3, 3)], {"I9"})):
        assert _rules(_history(*_answer(2), _done(2), *rows)) == rules
    assert _rules(_history(*_answer(2), _done(2), _row(2, 4, 4), _row(2, 4))) == {"I8"}


def test_of_an_answer_that_nobody_waited_for_the_last_row_counts() -> None:
    sent = Sent(
        request=2, ask=5, kind="x", at_s=0.0, num_choices=1, max_tokens=4, tells_tokens=False, is_background=True
    )
    for rows, rules in (([_row(2, 1), _row(2, 4)], set()), ([_row(2, 4), _row(2, 1)], {"I9"}), ([], {"I8"})):
        assert _rules(_history(sent, *_answer(2), _done(2), *rows)) == rules


@pytest.mark.parametrize("name", ["no end", "an end without [DONE]", "an error that is none"])
def test_a_request_is_lost_if_its_client_cannot_tell_what_became_of_it(name: str) -> None:
    assert judge_all(_history(*PLANTED[name][1]))[2].is_lost


def test_a_history_comes_back_from_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events: list[Event] = [_sent(1, is_reference=True), *_answer(1), _done(1), _row(1, 4)]
    file = tmp_path / "history.jsonl"
    file.write_bytes(b"".join(map(encode_event, [*events, _sent(2), *_answer(2), _done(2), _row(2, 4)])))
    assert read_history(file).references().keys() == {5}
    assert main([str(file)]) == 0
    file.write_bytes(b"".join(map(encode_event, [*events, _sent(2), _delta(2, "a", [1])])))
    assert main([str(file)]) == 1
    assert "never ended" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cut", "why"),
    [
        (lambda lines: [*lines[:-1], lines[-1][:10]], "history.jsonl:12: no event of a run"),
        (lambda lines: [b"{}\n", *lines], "history.jsonl:1: no event of a run"),
        (lambda lines: lines[1:], "history.jsonl:1: request 1 was not sent before"),
        (lambda lines: [], "shows nothing: no answer can be compared"),
        (lambda lines: lines[:6], "shows nothing: no answer can be compared"),
        (lambda lines: [line for line in lines if b'"is_reference"' not in line][5:], "can be compared"),
    ],
    ids=["cut off", "another file", "no beginning", "empty", "references alone", "no references"],
)
def test_a_file_that_shows_nothing_is_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: Callable[[list[bytes]], list[bytes]], why: str
) -> None:
    answered = [[*_answer(request), _done(request), _row(request, 4)] for request in (1, 2)]
    events: list[Event] = [_sent(1, is_reference=True), *answered[0], _sent(2), *answered[1]]
    file = tmp_path / "history.jsonl"
    file.write_bytes(b"".join(cut(list(map(encode_event, events)))))
    assert main([str(file)]) == 2
    assert why in capsys.readouterr().err


def test_what_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, why in ((tmp_path, "Is a directory"), (tmp_path / ("x" * 300), "File name too long")):
        assert main([str(file)]) == 2
        assert f"cannot read {file}: {why}" in capsys.readouterr().err
