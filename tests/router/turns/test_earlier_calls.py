"""Arguments of earlier calls: an object where a template can have it, else the text that the model wrote."""

from __future__ import annotations

import msgspec
import pytest

from kvferry.router.turns.definitions import MAX_DEPTH
from kvferry.router.turns.earlier_calls import parse_calls


def _arguments(text: str) -> object:
    [call] = parse_calls([{"type": "function", "function": {"name": "f", "arguments": text}}], "calls")
    msgspec.msgpack.encode(call)  # its way to the template
    function = call["function"]
    assert isinstance(function, dict)
    return function["arguments"]


def _nested(depth: int) -> str:
    return '{"a": ' * (depth - 1) + "{}" + "}" * (depth - 1)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"a": [1, {"b": "x"}]}', {"a": [1, {"b": "x"}]}),
        ('{"a": 18446744073709551615, "b": true}', {"a": 2**64 - 1, "b": True}),
        ("", {}),
    ],
)
def test_arguments_become_an_object(text: str, kept: object) -> None:
    assert _arguments(text) == kept


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "{a: 1}",
        '{"a": 18446744073709551616}',
        '{"a": {"b": [-9223372036854775809]}}',
        _nested(MAX_DEPTH + 1),
        _nested(900),
        _nested(5000),
    ],
)
def test_what_no_template_is_given_stays_a_text(text: str) -> None:
    assert _arguments(text) == text


def test_arguments_may_be_nested_as_a_schema_may() -> None:
    assert isinstance(_arguments(_nested(MAX_DEPTH)), dict)
