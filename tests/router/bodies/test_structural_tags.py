"""What answers of structural tags may be: as XGrammar has it, or less where the library cannot say it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvferry.common.errors import RequestError
from kvferry.common.grammar import Grammar
from kvferry.grammar.matching import Vocabulary, compile_grammar
from kvferry.models.tokenizer import Tokenizer
from kvferry.router.bodies.structural_tags import MAX_DEPTH, MAX_FORMATS, tags_grammar
from kvferry.tests.checkpoints import write_tokenizer
from kvferry.tests.matchers import END, may_come, may_end

Format = dict[str, Any]
TEXT: Format = {"type": "any_text"}
NUMBER: Format = {"type": "json_schema", "json_schema": {"type": "integer"}}


def const(value: str) -> Format:
    return {"type": "const_string", "value": value}


def regex(pattern: str) -> Format:
    return {"type": "regex", "pattern": pattern}


def tag(begin: str, content: Format, end: str | list[str]) -> Format:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def sequence(*elements: Format) -> Format:
    return {"type": "sequence", "elements": list(elements)}


def either(*elements: Format) -> Format:
    return {"type": "or", "elements": list(elements)}


CALLS = [tag("<f=a>", NUMBER, "</f>"), tag("<f=b>", regex("[a-z]+"), "</f>")]


def triggered(**more: bool) -> Format:
    return {"type": "triggered_tags", "triggers": ["<f="], "tags": CALLS, **more}


def separated(**more: bool) -> Format:
    return {"type": "tags_with_separator", "separator": ",", "tags": CALLS, **more}


Reads = Callable[[dict[str, Any], str], bool]


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> Reads:
    """Make what tells whether an answer may be a text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 512)
    tokenizer = Tokenizer.from_dir(folder)
    vocabulary = Vocabulary.from_dir(folder, vocab_size=tokenizer.vocab_size, eos_token_ids=frozenset({END}))

    def reads(fields: dict[str, Any], text: str) -> bool:
        matcher = compile_grammar(vocabulary, Grammar("lark", tags_grammar("f", fields).encode()))
        for token_id in tokenizer.encode(text, add_special_tokens=False):
            if token_id not in may_come(matcher):
                return False
            matcher.accept([token_id])
        return may_end(matcher)

    return reads


@pytest.mark.parametrize(
    ("form", "taken", "refused"),
    [
        (const('a"%json {/'), ['a"%json {/'], ["", "a", 'a"%json {/x']),
        (const(""), [""], ["a"]),
        (NUMBER, ["1", "-20"], ["", "a"]),
        (regex("a/b|[%\\d]+"), ["a/b", "1%2"], ["", "a"]),
        (regex(""), [""], ["a"]),
        (TEXT, ["", "a\nb"], []),
        (sequence(const("a"), NUMBER, const("b")), ["a1b"], ["1b", "a1", "ab"]),
        (sequence(const("x"), TEXT), ["x", "x\ny"], ["", "y"]),
        (either(const("a"), tag("<a>", NUMBER, "")), ["a", "<a>7"], ["", "a7", "<a>"]),
        (tag("<a>", TEXT, "</a>"), ["<a></a>", "<a>x<</a>"], ["<a>", "<a>x</a>y", "<a>x</a></a>"]),
        (tag("<a>", TEXT, ["</a>", "!"]), ["<a>x</a>", "<a>!"], ["<a>!</a>", "<a>x"]),
        (tag("<a>", regex("[a-z]+!?"), "end"), ["<a>xend"], ["<a>end", "<a>Xend", "<a>xendend"]),
        (tag("<a>", sequence(const("x"), TEXT), "."), ["<a>x.", "<a>xy."], ["<a>y.", "<a>x.."]),
        (tag("<a>", either(const("x"), NUMBER), ["", "."]), ["<a>x", "<a>1."], ["<a>", "<a>x.."]),
        (sequence(tag("", TEXT, "</think>"), NUMBER), ["</think>1", "a 1</think>2"], ["1", "a</think>"]),
        (triggered(), ["", "x<f", "x<f=a>1</f>y<f=b>z</f>"], ["<f=", "<f=c>", "<f=a>1", "<f=a>x</f>"]),
        (triggered(at_least_one=True), ["<f=a>1</f>", "<f=b>z</f>y<f=a>1</f>"], ["", "x<f=a>1</f>"]),
        (triggered(stop_after_first=True), ["", "x", "x<f=a>1</f>"], ["<f=a>1</f>y", "<f=a>1"]),
        (triggered(at_least_one=True, stop_after_first=True), ["<f=b>z</f>"], ["", "x", "<f=b>z</f>y"]),
        (
            tag("<t>", triggered(), "</t>"),
            ["<t></t>", "<t>x<f=a>1</f>y</t>"],
            ["<t>", "<t>x<f=a>1</t>", "<t></t>x", "<t><f=c></t>"],
        ),
        (separated(), ["", "<f=a>1</f>", "<f=a>1</f>,<f=b>z</f>"], ["x", ",", "<f=a>1</f>,", "<f=a>1</f><f=a>1</f>"]),
        (separated(at_least_one=True), ["<f=b>z</f>,<f=b>z</f>"], [""]),
        (separated(stop_after_first=True), ["", "<f=a>1</f>"], ["<f=a>1</f>,<f=a>1</f>"]),
        (separated(stop_after_first=True, at_least_one=True), ["<f=a>1</f>"], ["", "<f=a>1</f>,<f=a>1</f>"]),
    ],
)
def test_an_answer_is_what_its_format_says(reads: Reads, form: Format, taken: list[str], refused: list[str]) -> None:
    assert [text for text in (*taken, *refused) if reads({"format": form}, text)] == taken


def test_the_older_form_is_triggered_tags(reads: Reads) -> None:
    older = {
        "triggers": ["<f=", "["],
        "structures": [
            {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"},
            {"begin": "[b]", "end": "", "schema": None},
        ],
    }
    taken = ["", "x<f=a>1</f>y", '[b]{"a": []}', "<f=a>1</f>[b]1 <f=a>2</f>"]
    assert [text for text in (*taken, "<f=a>x</f>", "[c]", "<f=a>[b]1</f>") if reads(older, text)] == taken


def test_a_field_that_is_null_is_not_given(reads: Reads) -> None:
    assert reads({"format": {**TEXT, "max_tokens": None, "more": None}}, "abc")


def _deep(depth: int) -> Format:
    form = const("a")
    for _ in range(depth - 1):
        form = sequence(form)
    return form


@pytest.mark.parametrize(
    ("form", "param", "match"),
    [
        ("a", "", "must be an object"),
        ({"type": "qwen_xml_parameter", "json_schema": {}}, ".type", "must be one of const_string, .*'qwen_xml"),
        ({"type": ["or"]}, ".type", "must be one of"),
        ({"type": "const_string"}, ".value", "must be a string, got nothing"),
        ({**const("a"), "values": "a"}, ".values", "did you mean 'value'"),
        ({**TEXT, "excludes": ["a"]}, ".excludes", "not supported"),
        ({**TEXT, "max_tokens": 5}, ".max_tokens", "not supported"),
        ({**NUMBER, "style": "qwen_xml"}, ".style", "only 'json'"),
        ({"type": "json_schema", "json_schema": False}, ".json_schema", "must be an object, or true"),
        (regex("a\\"), ".pattern", "within an escape"),
        (sequence(), ".elements", "not be empty"),
        (sequence(TEXT, const("a")), ".elements[0]", "any_text, which nothing ends"),
        (sequence(regex("a*"), const("a")), ".elements[0]", "a regex, which nothing ends"),
        (sequence(triggered(), const("a")), ".elements[0]", "triggered_tags, which nothing ends"),
        (tag("<a>", TEXT, ""), ".content", "which nothing ends"),
        (tag("<a>", TEXT, []), ".end", "must be a string"),
        (tag("<a>", {"type": "or", "elements": [TEXT]}, ["", "a"]), ".content.elements[0]", "which nothing ends"),
        ({**triggered(), "triggers": ["<g"]}, ".tags[0].begin", "with none of the triggers"),
        ({**triggered(), "triggers": ["<f=", "<f"]}, ".tags[0].begin", "with several of the triggers"),
        ({**triggered(), "triggers": ["<f=", "<g"]}, ".triggers", "must each begin one of the tags, got '<g'"),
        ({**triggered(), "tags": []}, ".tags", "not be empty"),
        ({**triggered(), "at_least_one": 1}, ".at_least_one", "true or false"),
        ({**separated(), "tags": [{**CALLS[0], "type": "or"}]}, ".tags[0].type", "must be tag"),
        ({**separated(), "tags": [{**CALLS[0], "stop": ""}]}, ".tags[0].stop", "unknown field"),
        (_deep(MAX_DEPTH + 1), ".elements[0]" * MAX_DEPTH, f"deeper than {MAX_DEPTH} formats"),
        (sequence(*[const("")] * MAX_FORMATS), f".elements[{MAX_FORMATS - 1}]", f"more than {MAX_FORMATS} formats"),
        ({**triggered(), "tags": CALLS * MAX_FORMATS}, ".tags[255].content", f"more than {MAX_FORMATS} formats"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_its_place(form: object, param: str, match: str) -> None:
    with pytest.raises(RequestError, match=match) as caught:
        tags_grammar("f", {"format": form})
    assert (caught.value.param, caught.value.status) == (f"f.format{param}"[:128], 400)


def test_formats_within_their_bounds_are_taken(reads: Reads) -> None:
    assert reads({"format": _deep(MAX_DEPTH)}, "a")
    assert reads({"format": sequence(*[const("")] * (MAX_FORMATS - 1))}, "")
