"""Extreme values of every field: where they come from, what counts as a fault, and whole systems that take them."""

from __future__ import annotations

import itertools
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvferry.benchmarks.fuzz.extremes import ExtremeBodies, extremes
from kvferry.benchmarks.fuzz.raw_http import Answer
from kvferry.benchmarks.fuzz.systems import SETUPS, fuzz_systems, unfinished
from kvferry.common.errors import RequestError
from kvferry.router.bodies.fields import IGNORED, UNSUPPORTED
from kvferry.router.bodies.schemas import ChatBody, CompletionBody, GenerationBody, validate
from kvferry.tools.load import server_process

from ..e2e.forked_command import IMPORTS, NAME
from ..forks import Forks

VOCAB_SIZE = 425
KINDS = pytest.mark.parametrize("kind", [CompletionBody, ChatBody])


@KINDS
def test_every_field_of_a_body_has_extremes_and_takes_them(kind: type[GenerationBody]) -> None:
    is_chat = kind is ChatBody
    base: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]} if is_chat else {"prompt": "a"}
    needs: dict[str, dict[str, Any]] = {
        "stream_options": {"stream": True}, "top_logprobs": {"logprobs": True}, "best_of": {"n": 16},
        "max_tokens": {"echo": True},
    }  # fmt: skip
    found = extremes(kind, VOCAB_SIZE)
    assert found.keys() == kind.model_fields.keys() | IGNORED | UNSUPPORTED.keys()
    for name, values in found.items():
        for value in values:
            body = json.loads(json.dumps({**base, **needs.get(name, {}), name: value}))
            if name == "best_of":
                body["n"] = value
            if is_chat and name == "max_tokens" and value == 0:
                continue  # only a completion may ask for none
            _check(is_chat, body)


def _check(is_chat: bool, body: dict[str, Any]) -> None:
    """Raises RequestError."""
    if is_chat:
        validate(ChatBody, body)
    else:
        validate(CompletionBody, body)


@KINDS
@pytest.mark.parametrize(
    ("name", "at_least"),
    [
        ("temperature", {0, 5e-324, 1e-38, 1e-5, sys.float_info.max}),
        ("top_p", {5e-324, 1 - 2**-53, 1}), ("n", {1, 16}),
        ("presence_penalty", {-2, -5e-324, 5e-324, 2}), ("repetition_penalty", {5e-324, 1e-39, 10}),
        ("top_k", {-1, 0, 2**31 - 1}), ("seed", {-(2**63), 2**63 - 1}), ("priority", {-(2**31), 2**31 - 1}),
        ("prompt_logprobs", {0, 20}),
    ],
)  # fmt: skip
def test_numbers_come_from_their_bounds(kind: type[GenerationBody], name: str, at_least: set[float]) -> None:
    assert at_least <= set(extremes(kind, VOCAB_SIZE)[name])


def test_a_field_without_extremes_is_an_error() -> None:
    class Wider(CompletionBody):
        """With fields that nobody has thought of."""

        novelty: dict[str, float] | None = None

    class Boundless(CompletionBody):
        novelty: float | None = None

    for kind in (Wider, Boundless):
        with pytest.raises(AssertionError, match=r"novelty|without bounds"):
            extremes(kind, VOCAB_SIZE)


def test_bodies_are_valid_unlike_each_other_and_the_same_for_a_seed() -> None:
    one, again, other = (
        list(itertools.islice(ExtremeBodies(seed, vocab_size=VOCAB_SIZE, max_model_len=512), 500)) for seed in (1, 1, 2)
    )
    assert one == again != other
    assert len({body for _, body in one}) > 450
    for path, body in one:
        _check(path == "/v1/chat/completions", json.loads(body))


def test_what_is_no_body_is_not_made() -> None:
    with pytest.raises(RequestError):
        validate(CompletionBody, {"prompt": "a", "stream_options": {}})
    bodies = itertools.islice(ExtremeBodies(3, vocab_size=VOCAB_SIZE, max_model_len=512), 500)
    assert all(json.loads(body).get("stream") for _, body in bodies if b'"stream_options": {' in body)


def _answer(*choices: tuple[int, str | None], streamed: bool = False, error: bool = False) -> Answer:
    parts = [{"choices": [{"index": index, "finish_reason": reason}]} for index, reason in choices]
    if not streamed:
        whole = {"choices": [choice for part in parts for choice in part["choices"]]}
        return Answer(200, json.dumps(whole).encode(), b"")
    more: list[dict[str, Any]] = [{"error": {"message": "x"}}] if error else []
    events = [f"data: {json.dumps(part)}\n\n" for part in [*parts, *more]]
    return Answer(200, "".join([*events, "data: [DONE]\n\n"]).encode(), b"")


@pytest.mark.parametrize(
    ("answer", "body", "fault"),
    [
        (_answer((0, "stop")), {"prompt": "a"}, None),
        (_answer((0, None), (1, "stop"), (0, "length"), streamed=True), {"prompt": [5, 6], "n": 2}, None),
        (_answer((0, "stop"), (1, "stop"), (2, "stop"), (3, "stop")), {"prompt": [[5], [6]], "n": 2}, None),
        (_answer((0, None), streamed=True), {"prompt": "a"}, "finish reasons"),
        (_answer((0, "error")), {"prompt": "a"}, "finish reasons"),
        (_answer((0, "stop")), {"messages": [], "n": 2}, "of 2 choices"),
        (_answer((0, "stop"), (0, None), streamed=True), {"prompt": "a"}, "goes on"),
        (_answer((0, "stop"), streamed=True, error=True), {"prompt": "a"}, "an error"),
        (Answer(200, b'{"choices": [{"index": 0, "finish_reason": "stop", "logprob": NaN}]}', b""), {}, "NaN is no"),
        (Answer(200, b'{"choices": [', b""), {}, "Expecting value"),
    ],
)
def test_what_a_whole_answer_must_have(answer: Answer, body: dict[str, Any], fault: str | None) -> None:
    found = unfinished(answer, body)
    assert found is None if fault is None else fault in str(found)


@pytest.mark.slow
def test_whole_systems_answer_extreme_bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems are forks of one process with their imports, and end with it: they need no other tie to this one."""
    with closing(Forks(*IMPORTS)) as forks:
        monkeypatch.setattr(server_process, "subprocess", forks)
        monkeypatch.setattr(server_process, "tied", lambda command: command)
        results = fuzz_systems(300, seed=11, log_dir=tmp_path, program=(sys.executable, "-m", NAME, "serve"))
    assert [result.failures for result in results] == [[]] * len(SETUPS)
    assert sum(result.num_sent for result in results) == 300
    assert sum(result.num_accepted for result in results) > 270
