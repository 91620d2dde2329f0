"""Gemma 4's calls under a grammar: what their schemas let through, and what no grammar of its form can say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvferry.common.grammar import GrammarBroken
from kvferry.grammar.matching import Vocabulary, compile_grammar
from kvferry.grammar.thinking import FirstMatcher
from kvferry.router.turns.definitions import ToolUse, parse_tool_use
from kvferry.router.turns.dialect import Dialect
from kvferry.router.turns.gemma import GemmaSyntax
from kvferry.router.turns.lazy import free_grammar, keeps_schemas, thinking
from kvferry.tests.checkpoints import write_tokenizer
from kvferry.tests.matchers import may_end

from .samples import read_calls

EOS = 1
GEMMA = Dialect("gemma4", "gemma4")
IDS = {"<|tool_call>": 500, "<tool_call|>": 501, '<|"|>': 502, "<|channel>": 503, "<channel|>": 504}
NODE = {
    "type": "object",
    "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/Node"}}, "v": {"type": "integer"}},
    "required": ["v"],
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, 512)
    return Vocabulary.from_dir(path, vocab_size=512, eos_token_ids=frozenset({EOS}))


def _use(parameters: dict[str, Any], *, is_strict: bool = True) -> ToolUse:
    function = {"name": "f", "strict": is_strict, "parameters": parameters}
    return parse_tool_use([{"type": "function", "function": function}], "auto", None)


def _tokens(vocabulary: Vocabulary, text: str, ids: dict[str, int]) -> list[int]:
    """Return the text's tokens, of which the special ones stand for what they are."""
    first = min((mark for mark in ids if mark in text), key=text.index, default=None)
    if first is None:
        return list(vocabulary.tokenizer.greedy_tokenize(text))
    before, _, behind = text.partition(first)
    return [*vocabulary.tokenizer.greedy_tokenize(before), ids[first], *_tokens(vocabulary, behind, ids)]


def _takes(matcher: FirstMatcher, tokens: list[int]) -> bool:
    try:
        matcher.accept(tokens)
    except GrammarBroken:
        return False
    return may_end(matcher)


@pytest.mark.parametrize("ids", [{}, IDS], ids=["texts", "special tokens"])
@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        ({}, ["{}", "{a:[1,{b:null}],c:<x{y}]>}"], ["{a}", "{a:x}", "{a:1"]),
        ({"properties": {"a": {}}, "type": "object"}, ["{}", "{a:1}", "{a:[<x>]}"], ["{b:1}"]),
        (
            {
                "type": "object",
                "properties": {
                    "b": {"type": ["string", "null"], "title": "B"},
                    "a": {"anyOf": [{"type": "number"}, {"type": "boolean"}], "default": 1},
                    "C": {"const": "x"},
                },
                "additionalProperties": False,
            },
            ["{}", "{a:-1.5}", "{b:null}", "{a:true,b:<q>,C:<x>}", "{a:1,C:<x>}"],
            ["{C:<y>}", "{b:1}", "{a:1,a:2}", "{b:null,a:1}", "{a:<1>}", "{a:1,}"],
        ),
        (
            {"type": "object", "properties": {"b": {"type": "null"}, "a": {"enum": [1, "", False]}}, "required": ["b"]},
            ["{b:null}", "{a:1,b:null}", "{a:<>,b:null}", "{a:false,b:null}"],
            ["{}", "{a:1}", "{a:2,b:null}", "{a:<1>,b:null}"],
        ),
        ({"properties": {"a": {"enum": [1, "b", True, None], "type": "integer"}}}, ["{a:1}"], ["{a:<b>}", "{a:true}"]),
        (
            {
                "type": "object",
                "properties": {
                    "t": {
                        "type": "array",
                        "items": {"type": "string", "minLength": 2, "maxLength": 3},
                        "minItems": 1,
                        "maxItems": 2,
                    }
                },
            },
            ["{t:[<ab>]}", "{t:[<ab>,<abc>]}"],
            ["{t:[]}", "{t:[<a>]}", "{t:[<abcd>]}", "{t:[<ab>,<ab>,<ab>]}"],
        ),
        ({"type": "object", "additionalProperties": {"type": "integer", "minimum": 3}}, ["{}", "{q:3,r:4}"], ["{q:2}"]),
        ({"type": "object", "properties": {}, "additionalProperties": False}, ["{}"], ["{a:1}"]),
        (
            {"$defs": {"Node": NODE}, "properties": {"root": {"$ref": "#/$defs/Node"}}, "required": ["root"]},
            ["{root:{v:1}}", "{root:{kids:[{v:2},{kids:[],v:3}],v:1}}"],
            ["{root:{}}", "{root:{kids:[{}],v:1}}"],
        ),
    ],
)
def test_arguments_follow_their_schema(
    vocabulary: Vocabulary, parameters: dict[str, Any], good: list[str], bad: list[str], ids: dict[str, int]
) -> None:
    use = _use(parameters)
    assert keeps_schemas(use, GEMMA)
    first = compile_grammar(vocabulary, free_grammar(use, GEMMA, ids.get))
    for arguments in [*good, *bad]:
        written = "".join('<|"|>' if char in "<>" else char for char in arguments)
        text = f"So. <|tool_call>call:f{written}<tool_call|>\n"
        assert _takes(first.fork(), _tokens(vocabulary, text, ids)) == (arguments in good), arguments
        if arguments in good:  # what it lets through is read
            content, [call] = read_calls(text, GemmaSyntax(use.schemas))
            assert content == "So." and isinstance(json.loads(call.arguments), dict)


def test_a_schema_is_read_once_however_often_its_parts_are_referred_to() -> None:
    schema: dict[str, Any] = {"type": ["string"] * 500}
    defs = {f"d{index}": {"type": ["object"] * 500, "properties": {"a": schema, "b": schema}} for index in range(1)}
    for index in range(1, 12):
        below = {"$ref": f"#/$defs/d{index - 1}"}
        defs[f"d{index}"] = {"type": ["object"] * 500, "properties": {"a": below, "b": below}}
    use = _use({"$defs": defs, "properties": {"a": {"$ref": "#/$defs/d11"}}})
    assert keeps_schemas(use, GEMMA) and len(free_grammar(use, GEMMA, IDS.get).text) < 5000


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"type": "string", "pattern": "x"}}},
        {"properties": {"a": {"type": "string", "format": "date"}}},
        {"properties": {"a": {"type": "integer"}}, "additionalProperties": True},
        {"properties": {"a": {"type": "integer"}}, "required": ["b"]},
        {"properties": {"a": {"oneOf": [{"type": "integer"}]}}},
        {"properties": {"a": {"enum": [[1]]}}},
        {"properties": {"a": {"enum": []}}},
        {"properties": {"a": {"const": 1, "type": "string"}}},
        {"properties": {"a": {"type": "nothing"}}},
        {"properties": {"a": {"type": "array", "minItems": 2, "maxItems": 1}}},
        {"properties": {"a": {"type": "array", "minItems": "1"}}},
        {"properties": {"a:b": {}}},
        {"properties": {"a": 1}},
        {"properties": {"a": {"properties": 1}}},
        {"properties": {"a": {"type": [["integer"]]}}},
        {"properties": {"a": {"type": {}, "properties": {}}}},
        {"properties": {"a": {"$ref": "#/$defs/none"}}},
        {"properties": {"a": {"$ref": "other#"}}},
        {"if": {}, "properties": {}},
        {"properties": {f"a{i}": {} for i in range(2000)}},
        {"properties": {"a": {"enum": [*range(2000)]}}},
        {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "array", "items": {"not": {}}}}},
    ],
)
def test_what_cannot_be_said_is_told_and_lets_any_arguments_through(
    vocabulary: Vocabulary, parameters: dict[str, Any]
) -> None:
    use = _use(parameters)
    assert not keeps_schemas(use, GEMMA) and keeps_schemas(_use(parameters, is_strict=False), GEMMA)
    first = compile_grammar(vocabulary, free_grammar(use, GEMMA, lambda _: None))
    for name, wanted in (("f", True), ("g", False)):
        text = f"<|tool_call>call:{name}{{any:[1,{{thing:null}}]}}<tool_call|>"
        assert _takes(first.fork(), _tokens(vocabulary, text, {})) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<|channel>thought\nHm.\n<channel|>So.", True),
        ("<|channel>thought\nHm.\n<channel|><|tool_call>call:f{}<tool_call|>", True),
        ("<|channel>thought\nHm.\n<channel|><|tool_call>call:g{}<tool_call|>", False),
        ("<|tool_call>call:f{}<tool_call|><|tool_call>call:f{}<tool_call|>", True),
        ("<|channel>thought\nHm.", False),
        ("So.<channel|>", False),
    ],
)
def test_thoughts_stand_before_what_is_said(vocabulary: Vocabulary, text: str, wanted: bool) -> None:
    """A text has no special tokens, and so none of theirs elsewhere."""
    way = thinking(GEMMA, "hi", "", IDS.get, IDS.get)
    assert way is not None
    grammar = msgspec.structs.replace(free_grammar(_use({}), GEMMA, IDS.get), thoughts=way.before(None))
    first = compile_grammar(vocabulary, grammar)
    assert _takes(first, _tokens(vocabulary, text, IDS)) == wanted
