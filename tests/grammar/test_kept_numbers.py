"""No number comes that the schema has not: neither for a large or long one, nor beyond a bound."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from kvferry.common.errors import RequestError
from kvferry.common.grammar import Grammar, GrammarBroken
from kvferry.grammar.matching import Vocabulary, compile_grammar
from kvferry.tests.checkpoints import write_tokenizer
from kvferry.tests.matchers import may_end

EXACT, LAST = 2**53, 2**63 - 1
# Each is read as another number by whoever reads floats, or is beyond what the library writes as it is.
OTHERWISE = [
    *(EXACT + 1, -EXACT - 1, 1234567890123456789, 987654321098765432, -1234567890123456789, LAST - 1, -LAST, -LAST - 1),
    *(LAST + 1, 2**64 - 1, 12345678901234567890, 10**30, 1.2345678901234568e18, 1.7976931348623157e308),
    *(123456789.12345679, -910.7181891511751, -486.84836330371195, 1.602176634e-19),
]
AS_IT_IS = [
    *(EXACT - 1, EXACT, EXACT + 2, -EXACT, 2**60, -(2**60), 10**18, LAST, 1e16, 0.1, 0.1 + 0.2, -1.5, 1e-7, 123456.789),
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path: Path = tmp_path_factory.mktemp("bytes")
    write_tokenizer(path, 512)
    return Vocabulary.from_dir(path, vocab_size=512, eos_token_ids=frozenset({1, 3}))


def _taken(vocabulary: Vocabulary, schema: dict[str, Any], texts: Iterable[str]) -> list[str]:
    """Return the texts that are answers."""
    first = compile_grammar(vocabulary, Grammar("json_schema", json.dumps(schema).encode()))
    found = []
    for text in texts:
        matcher = first.fork()
        try:
            matcher.accept(vocabulary.tokenizer.greedy_tokenize(text))
        except GrammarBroken:
            continue
        if may_end(matcher):
            found.append(text)
    return found


def _near(*numbers: int) -> list[str]:
    steps = (0, 1, 2, 3, 127, 128, 129, 1023, 1024, 1025, 4096)
    return sorted({str(number + sign * step) for number in numbers for step in steps for sign in (1, -1)})


@pytest.mark.parametrize("number", AS_IT_IS)
@pytest.mark.parametrize("words", [{"const": ...}, {"enum": ["a", ...]}, {"type": "number", "enum": [...]}])
def test_a_number_comes_as_it_is(vocabulary: Vocabulary, number: int | float, words: dict[str, Any]) -> None:
    schema = {keyword: _filled(value, number) for keyword, value in words.items()}
    text = format(Decimal(repr(number)).normalize(), "f")
    others = _near(number) if isinstance(number, int) else [text + "1", "-" + text]
    assert _taken(vocabulary, schema, {text, *others}) == [text]


def _filled(value: object, number: int | float) -> object:
    if isinstance(value, list):
        return [_filled(part, number) for part in value]
    return number if value is ... else value


@pytest.mark.parametrize("number", OTHERWISE)
def test_a_number_in_whose_place_another_would_come_is_refused(vocabulary: Vocabulary, number: int | float) -> None:
    with pytest.raises(RequestError, match="which cannot be kept: whole numbers are exact up to") as caught:
        _taken(vocabulary, {"const": number}, [])
    assert (caught.value.param, caught.value.code) == (".const", "unsupported_grammar")


BIG = EXACT + 1


@pytest.mark.parametrize(
    ("schema", "param"),
    [
        ({"type": "integer", "enum": [1, BIG]}, ".enum[1]"),
        ({"const": {"a": [1, {"b": BIG}]}}, ".const.a[1].b"),
        ({"properties": {"id": {"const": BIG}}, "required": ["id"]}, ".properties.id.const"),
        ({"$ref": "#/$defs/id", "$defs": {"id": {"enum": [BIG]}}}, ".$defs.id.enum[0]"),
        ({"prefixItems": [{"type": "null"}, {"const": BIG}]}, ".prefixItems[1].const"),
        ({"items": {"anyOf": [{"type": "null"}, {"const": BIG}]}}, ".items.anyOf[1].const"),
        ({"additionalProperties": {"const": BIG}}, ".additionalProperties.const"),
        ({"oneOf": [{"const": BIG}, {"type": "string"}]}, ".oneOf[0].const"),
        ({"if": {"const": BIG}, "then": {"type": "integer"}}, ".if.const"),
        ({"type": "array", "items": {"enum": [BIG, 1]}, "uniqueItems": True}, ".items.enum[0]"),
        ({"not": {"not": {"const": BIG}}}, ".not"),
        ({"type": "integer", "minimum": BIG, "maximum": BIG}, ".minimum"),
        ({"type": "number", "minimum": 123456789.12345679, "maximum": 123456789.12345679}, ".minimum"),
        ({"type": "integer", "minimum": 2**63, "maximum": 2**64}, ".minimum"),
        ({"items": {"type": "integer", "exclusiveMaximum": -(2**63)}}, ".items.exclusiveMaximum"),
        ({"type": "number", "minimum": 1e19}, ".minimum"),
        ({"type": "integer", "multipleOf": 10**17}, ".multipleOf"),
    ],
)
def test_the_place_of_such_a_number_is_told(vocabulary: Vocabulary, schema: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        _taken(vocabulary, schema, [])
    assert (caught.value.param, caught.value.code) == (param, "unsupported_grammar")


def test_a_number_of_a_schema_within_a_grammar_is_refused_too(vocabulary: Vocabulary) -> None:
    text = f'start: "<" id ">"\nid: %json {{"enum": [{BIG}]}}'
    with pytest.raises(RequestError, match=r"9007199254740993 at 'enum\[0\]'") as caught:
        compile_grammar(vocabulary, Grammar("lark", text.encode()))
    assert caught.value.param == ""


@pytest.mark.parametrize(
    "schema",
    [
        {"default": BIG, "examples": [BIG], "const": 5},
        {"properties": {"const": {"const": 5}, "enum": {"default": BIG}}, "const": 5},
        {"const": 5, "title": f"not {BIG}"},
    ],
)
def test_numbers_that_demand_nothing_are_left_alone(vocabulary: Vocabulary, schema: dict[str, Any]) -> None:
    assert _taken(vocabulary, schema, ["5", str(BIG)]) == ["5"]


def test_every_number_but_a_large_one_may_come(vocabulary: Vocabulary) -> None:
    taken = _taken(vocabulary, {"type": "integer", "not": {"enum": [1234567890123456789]}}, _near(1234567890123456789))
    assert "1234567890123456789" not in taken and len(taken) > 2


@pytest.mark.parametrize("name", ["integer", "number"])
def test_nothing_beyond_a_large_bound_comes(vocabulary: Vocabulary, name: str) -> None:
    draw, num_taken = random.Random(0), 0
    for _ in range(60):
        middle = draw.choice([1, -1]) * int(2 ** draw.uniform(52.9, 63.1))
        width = int(2 ** draw.uniform(0, 14))
        low, high = sorted((middle, middle + draw.choice([1, -1]) * width))
        lower, upper = draw.choice(["minimum", "exclusiveMinimum"]), draw.choice(["maximum", "exclusiveMaximum"])
        bounds = draw.choice([{lower: low}, {upper: high}, {lower: low, upper: high}])
        try:
            taken = _taken(vocabulary, {"type": name, **bounds}, _near(low, high))
        except RequestError as refusal:
            assert refusal.code == "unsupported_grammar", (bounds, str(refusal))
            continue
        num_taken += len(taken)
        for number in map(int, taken):
            assert low + (lower in bounds and lower != "minimum") <= number or lower not in bounds, (bounds, number)
            assert number <= high - (upper in bounds and upper != "maximum") or upper not in bounds, (bounds, number)
    assert num_taken > 200


@pytest.mark.parametrize(
    ("bounds", "taken", "left"),
    [
        ({"minimum": EXACT + 1}, [EXACT + 2, EXACT + 3, LAST], [EXACT]),
        ({"exclusiveMinimum": EXACT}, [EXACT + 2, EXACT + 3], [EXACT]),
        ({"minimum": EXACT, "exclusiveMinimum": True}, [EXACT + 2], [EXACT]),
        ({"minimum": EXACT + 1, "exclusiveMinimum": 5}, [EXACT + 2], [EXACT]),
        ({"minimum": EXACT - 2, "exclusiveMaximum": EXACT + 3}, [EXACT - 2, EXACT + 1, EXACT + 2], [EXACT + 3]),
        ({"minimum": 5, "maximum": EXACT + 1}, [5, EXACT - 1, EXACT], [4, EXACT + 2]),
        ({"minimum": -LAST - 1, "maximum": LAST}, [-LAST + 1023, 0, LAST], [-LAST - 2, LAST + 1]),
        ({"minimum": 10**18}, [10**18, LAST], [10**18 - 1]),
        ({"maximum": -(10**18)}, [-LAST + 1023, -(10**18)], [1 - 10**18]),
        ({"minimum": LAST, "maximum": 10**30}, [LAST], [LAST - 1]),
    ],
)
def test_a_large_bound_becomes_the_nearest_float_on_its_inner_side(
    vocabulary: Vocabulary, bounds: dict[str, Any], taken: list[int], left: list[int]
) -> None:
    assert _taken(vocabulary, {"type": "integer", **bounds}, map(str, [*taken, *left])) == [*map(str, taken)]


def test_a_long_float_is_no_bound_for_one_beyond_it(vocabulary: Vocabulary) -> None:
    tiny = 1.602176634e-19
    for bound, sign in (
        (123456789.12345679, 1),
        (910.7181891511751, -1),
        (5.180705363511971e-10, -1),
        (tiny, 1),
        (tiny, -1),
    ):
        keyword = "maximum" if sign == 1 else "minimum"
        text = Decimal(repr(bound))
        beyond = [format(text + sign * digit * text / 10**15, ".60f") for digit in (1, 2, 5)]
        within = format(text - sign * text / 10**13, ".60f")
        taken = _taken(vocabulary, {"type": "number", "minimum": 0, "maximum": 1e9, keyword: bound}, [within, *beyond])
        assert taken == [within], bound


def test_numbers_that_are_excluded_may_stand_beside_one_another(vocabulary: Vocabulary) -> None:
    """No number comes between them, of which a schema of its own would be refused."""
    schema = {"type": "integer", "not": {"enum": [EXACT, EXACT + 1]}}
    told = ["5", str(EXACT - 1), str(EXACT), str(EXACT + 2)]
    assert _taken(vocabulary, schema, told) == ["5", str(EXACT - 1), str(EXACT + 2)]
