"""Bounds of numbers hold, the open ones too, and dates are those of the calendar."""

from __future__ import annotations

import calendar
import itertools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kvferry.common.errors import RequestError
from kvferry.common.grammar import Grammar, GrammarBroken
from kvferry.grammar.kept import in_kept_words
from kvferry.grammar.matching import Vocabulary, compile_grammar
from kvferry.grammar.thinking import FirstMatcher
from kvferry.tests.checkpoints import write_tokenizer
from kvferry.tests.matchers import may_end

BOUNDS = [-10, -1.5, -1, -0.5, 0, 0.25, 1, 1.5, 99, 99.99]
NUMBERS = ["-10", "-1", "-1.0", "-0", "-0.0", "0", "0.0", "0.1", "1", "1.0", "1.2", "99", "99.5", "1e0", "-0.3", "-1.2"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path: Path = tmp_path_factory.mktemp("bytes")
    write_tokenizer(path, 512)
    return Vocabulary.from_dir(path, vocab_size=512, eos_token_ids=frozenset({1, 3}))


def _takes(vocabulary: Vocabulary, first: FirstMatcher, text: str) -> bool:
    matcher = first.fork()
    try:
        matcher.accept(vocabulary.tokenizer.greedy_tokenize(text))
    except GrammarBroken:
        return False
    return may_end(matcher)


@pytest.mark.parametrize("lower", ["minimum", "exclusiveMinimum"])
@pytest.mark.parametrize("upper", ["maximum", "exclusiveMaximum"])
def test_no_number_beyond_a_bound_is_taken(vocabulary: Vocabulary, lower: str, upper: str) -> None:
    num_taken = 0
    for low, high in itertools.combinations(BOUNDS, 2):
        schema = {"type": "number", lower: low, upper: high}
        first = compile_grammar(vocabulary, Grammar("json_schema", json.dumps(schema).encode()))
        for text in NUMBERS:
            if _takes(vocabulary, first, text):
                num_taken += 1
                assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)), (schema, text)
    assert num_taken > 100


@pytest.mark.parametrize(("name", "end"), [("date", ""), ("date-time", "T23:59:59.5+01:00")])
def test_the_days_of_a_year_are_those_of_the_calendar(vocabulary: Vocabulary, name: str, end: str) -> None:
    first = compile_grammar(vocabulary, Grammar("json_schema", json.dumps({"format": name, "type": "string"}).encode()))
    for year in (1, 4, 96, 1900, 2000, 2023, 2024, 2026, 2100, 2400, 9996):
        for month in range(1, 13):
            last = calendar.monthrange(year, month)[1]
            for day in (0, 1, 28, 29, 30, 31, 32):
                text = f'"{year:04}-{month:02}-{day:02}{end}"'
                assert _takes(vocabulary, first, text) == (1 <= day <= last), text


def test_a_date_with_a_pattern_of_its_own_follows_both(vocabulary: Vocabulary) -> None:
    schema = {"format": "date", "type": "string", "pattern": "^20", "allOf": [{"pattern": "-29$"}]}
    first = compile_grammar(vocabulary, Grammar("json_schema", json.dumps(schema).encode()))
    taken = [
        each
        for each in ("2024-02-29", "2023-02-29", "1924-02-29", "2024-02-28")
        if _takes(vocabulary, first, f'"{each}"')
    ]
    assert taken == ["2024-02-29"]


def test_bounds_of_a_schema_within_a_grammar_hold_too(vocabulary: Vocabulary) -> None:
    text = 'start: "<" number ">"\nnumber: %json {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}'
    first = compile_grammar(vocabulary, Grammar("lark", text.encode()))
    assert _takes(vocabulary, first, "<0.3>") and not _takes(vocabulary, first, "<0>")


@pytest.mark.parametrize(
    ("schema", "param"),
    [
        ({"additionalProperties": {"type": "integer"}, "minProperties": 2}, ".minProperties"),
        ({"items": {"type": "object", "minProperties": 3, "required": ["a"]}}, ".items.minProperties"),
        ({"required": ["a", "a"], "minProperties": 3}, ".minProperties"),
        ({"patternProperties": {"^x": {}}, "additionalProperties": False, "minProperties": 2}, ".minProperties"),
        ({"not": {"type": "object", "maxProperties": 1}}, ".not"),
    ],
)
def test_a_count_that_a_name_could_meet_which_comes_twice_is_refused(
    vocabulary: Vocabulary, schema: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError, match=r"keyword '(minProperties|not)' at") as caught:
        compile_grammar(vocabulary, Grammar("json_schema", json.dumps(schema).encode()))
    assert (caught.value.param, caught.value.code) == (param, "unsupported_grammar")


def test_a_count_that_needs_one_free_name_is_kept(vocabulary: Vocabulary) -> None:
    schema = {"type": "object", "required": ["a"], "minProperties": 2, "additionalProperties": {"type": "integer"}}
    first = compile_grammar(vocabulary, Grammar("json_schema", json.dumps(schema).encode()))
    texts = ('{"a":1}', '{"a":1,"a":2}', '{"a":1,"b":2}')
    assert [_takes(vocabulary, first, text) for text in texts] == [False, False, True]


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        ({"exclusiveMinimum": 0, "maximum": 0.5}, {"minimum": 1e-9, "maximum": 0.5}),
        ({"exclusiveMaximum": 0, "minimum": -0.5}, {"maximum": -1e-9, "minimum": -0.5}),
        ({"exclusiveMinimum": 0, "minimum": 0.1, "maximum": 0.5}, {"minimum": 0.1, "maximum": 0.5}),
        ({"exclusiveMinimum": 0, "maximum": 1}, None),
        ({"exclusiveMinimum": 0.5, "maximum": 1}, None),
        ({"properties": {"format": {"enum": ["date"]}}}, None),
        ({"format": "time"}, None),
        ({"exclusiveMinimum": True, "minimum": 0, "maximum": 0.5}, None),
        ({"properties": {"exclusiveMinimum": {"const": {"exclusiveMinimum": 0, "maximum": 0.5}}}}, None),
    ],
)
def test_only_what_the_library_does_not_keep_is_said_otherwise(
    schema: dict[str, Any], wanted: dict[str, Any] | None
) -> None:
    assert in_kept_words(schema) == (schema if wanted is None else wanted)


def test_a_schema_that_is_no_json_is_refused_as_ever(vocabulary: Vocabulary) -> None:
    with pytest.raises(RequestError):
        compile_grammar(vocabulary, Grammar("json_schema", b'{"exclusiveMinimum": '))
