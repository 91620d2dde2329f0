"""Every form in which a client may ask for a grammar, and what is wrong with one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvferry.common.errors import RequestError
from kvferry.common.grammar import MAX_GRAMMAR_BYTES, Grammar, pack_mask
from kvferry.grammar.gbnf import unforced
from kvferry.router.bodies import structural_tags
from kvferry.router.bodies.schemas import ChatBody, CompletionBody, validate

SCHEMA = {"type": "object", "properties": {"é": {"type": "string"}}, "required": ["é"]}
SCHEMA_TEXT = json.dumps(SCHEMA, ensure_ascii=False, separators=(",", ":"))
OPEN = Grammar("json_schema", SCHEMA_TEXT.encode())
JSON = Grammar("json_schema", f'{SCHEMA_TEXT[:-1]},"additionalProperties":false}}'.encode())


def asked(**fields: Any) -> tuple[Grammar | None, str]:
    """Return the grammar that both kinds of bodies ask for, and by which field."""
    chat = validate(ChatBody, {"messages": [{"role": "user", "content": "a"}], **fields}).asked_grammar
    completion = validate(CompletionBody, {"prompt": "a", **fields}).asked_grammar
    assert chat == completion
    return (None, "") if chat is None else chat


def named_schema(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, **more}}


@pytest.mark.parametrize(
    ("fields", "grammar", "param"),
    [
        ({}, None, ""),
        ({"response_format": None}, None, ""),
        ({"response_format": {"type": "text"}}, None, ""),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object", b""), "response_format"),
        ({"response_format": named_schema()}, JSON, "response_format.json_schema.schema"),
        ({"response_format": named_schema(strict=True)}, JSON, "response_format.json_schema.schema"),
        ({"response_format": named_schema(strict=False)}, JSON, "response_format.json_schema.schema"),
        ({"response_format": named_schema(strict=None, description="d")}, JSON, "response_format.json_schema.schema"),
        ({"structured_outputs": {"json": SCHEMA}}, JSON, "structured_outputs.json"),
        ({"structured_outputs": {"json": SCHEMA_TEXT}}, JSON, "structured_outputs.json"),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object", b""), "structured_outputs.json_object"),
        ({"structured_outputs": {"json_object": False}}, None, ""),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", b"a+"), "structured_outputs.regex"),
        (
            {"structured_outputs": {"choice": ["a", "é"], "regex": None, "disable_fallback": True}},
            Grammar("choice", '["a", "é"]'.encode()),
            "structured_outputs.choice",
        ),
        (
            {"structured_outputs": {"grammar": "start: /a/"}},
            Grammar("lark", unforced("start: /a/").encode()),
            "structured_outputs.grammar",
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_additional_properties": True}},
            JSON,
            "structured_outputs.json",
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_additional_properties": False}},
            OPEN,
            "structured_outputs.json",
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            Grammar("compact_json_schema", JSON.text),
            "structured_outputs.json",
        ),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
            Grammar("compact_json_object", b""),
            "structured_outputs.json_object",
        ),
        (
            {"structured_outputs": {"regex": "a b", "disable_any_whitespace": True}},
            Grammar("regex", b"a b"),
            "structured_outputs.regex",
        ),
        (
            {"allowed_token_ids": [0, 9, 33, 9]},
            Grammar("tokens", pack_mask(b"\1\2\0\0\2\0\0\0")),
            "allowed_token_ids",
        ),
        ({"guided_json": SCHEMA}, JSON, "guided_json"),
        ({"guided_json": SCHEMA_TEXT}, JSON, "guided_json"),
        ({"guided_regex": "a"}, Grammar("regex", b"a"), "guided_regex"),
        ({"guided_choice": ["a"]}, Grammar("choice", b'["a"]'), "guided_choice"),
        ({"guided_grammar": "root ::= 'a'"}, Grammar("lark", b"root ::= 'a'"), "guided_grammar"),
        ({"guided_json": SCHEMA, "response_format": {"type": "text"}}, JSON, "guided_json"),
        (  # as guidance sends it, for servers of any age
            {"structured_outputs": {"grammar": "start: /a/"}, "guided_grammar": "start: /a/"},
            Grammar("lark", unforced("start: /a/").encode()),
            "structured_outputs.grammar",
        ),
    ],
)
def test_every_form_becomes_one_grammar(fields: dict[str, Any], grammar: Grammar | None, param: str) -> None:
    assert asked(**fields) == (grammar, param)


JSON_FORMAT = {"type": "json_schema", "json_schema": SCHEMA}
TAGS = {
    "triggers": ["<f="],
    "structures": [{"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}, {"begin": "<f=b>", "end": "x"}],
}


def test_structural_tags_become_a_grammar_in_either_place() -> None:
    in_format = asked(response_format={"type": "structural_tag", **TAGS})
    assert in_format[0] is not None and in_format[0].kind == "lark"
    assert in_format[0] == asked(structured_outputs={"structural_tag": json.dumps(TAGS)})[0]
    text = in_format[0].text.decode()
    assert '[lazy]: TEXT "<f="' in text and '"a>" %json {"type": "integer", ' in text
    assert text.count('"x-guidance": {"whitespace_pattern"') == 2, "white space in a tag is bounded as everywhere"
    kept = {**SCHEMA, "additionalProperties": False}
    closed, _ = asked(structured_outputs={"structural_tag": json.dumps({"format": {**JSON_FORMAT}})})
    assert closed is not None and json.dumps(kept, ensure_ascii=False)[:-1] in closed.text.decode()


def test_a_tag_has_a_form_of_its_own_in_either_place() -> None:
    tag = {"format": {"type": "tag", "begin": "<a>", "content": JSON_FORMAT, "end": "</a>"}}
    in_format, param = asked(response_format={"type": "structural_tag", **tag})
    assert in_format is not None and (in_format.kind, param) == ("lark", "response_format")
    for given in (tag, {"type": "structural_tag", **tag}):
        assert asked(structured_outputs={"structural_tag": json.dumps(given)})[0] == in_format


@pytest.mark.parametrize(
    ("fields", "param", "match"),
    [
        ({"response_format": "json"}, "response_format", "must be an object"),
        ({"response_format": {}}, "response_format.type", "must be text, json_object, .*, got nothing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "got 'xml'"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "unknown field"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "must be an object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
            "is required",
        ),
        ({"response_format": named_schema(strict="yes")}, "response_format.json_schema.strict", "true or false"),
        ({"response_format": named_schema(name=7)}, "response_format.json_schema.name", "must be a string"),
        ({"structured_outputs": {}}, "structured_outputs", "has 0 forms"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "has 2 forms"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "did you mean 'regex'"),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
            "is not supported",
        ),
        ({"allowed_token_ids": []}, "allowed_token_ids", "not be empty"),
        ({"allowed_token_ids": ["a"]}, "allowed_token_ids", "list of token ids"),
        ({"allowed_token_ids": [3, -1]}, "allowed_token_ids", "got -1"),
        ({"allowed_token_ids": [2**40]}, "allowed_token_ids", "got 1099511627776"),
        ({"allowed_token_ids": [1], "guided_regex": "a"}, "allowed_token_ids", "ask for several"),
        ({"guided_regex": ["a"]}, "guided_regex", "must be a string"),
        ({"guided_regex": ""}, "guided_regex", "not be empty"),
        ({"guided_choice": []}, "guided_choice", "list of strings"),
        ({"guided_choice": ["a", 1]}, "guided_choice", "list of strings"),
        ({"guided_json": 7}, "guided_json", "JSON schema"),
        ({"guided_regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "guided_regex", "has 65537 bytes; the limit is 65536"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "ask for several"),
        ({"guided_json": {}, "response_format": {"type": "json_object"}}, "guided_json", "ask for several"),
        ({"structured_outputs": {"structural_tag": "{"}}, "structured_outputs.structural_tag", "must be JSON"),
        (
            {"response_format": {"type": "structural_tag", "format": {}}},
            "response_format.format.type",
            "must be one of const_string, .*, got nothing",
        ),
        (
            {"response_format": {"type": "structural_tag", "format": {"type": "qwen_xml_parameter"}}},
            "response_format.format.type",
            "must be one of const_string, .*, got 'qwen_xml_parameter'",
        ),
        (
            {"response_format": {"type": "structural_tag", "format": {"type": "const_string", "value": "a"}, **TAGS}},
            "response_format",
            "it takes either form",
        ),
        (
            {"response_format": {"type": "structural_tag", **TAGS, "triggers": ["<g"]}},
            "response_format.structures[0].begin",
            "begins with none of the triggers",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_its_place(fields: dict[str, Any], param: str, match: str) -> None:
    with pytest.raises(RequestError, match=match) as caught:
        asked(**fields)
    assert (caught.value.param, caught.value.status) == (param, 400)


def test_a_tag_that_can_just_be_parsed_may_be_nested_too_deep_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_deep(_schema: object) -> object:
        raise RecursionError

    monkeypatch.setattr(structural_tags, "closed", too_deep)
    with pytest.raises(RequestError, match="not nested too deep"):
        asked(structured_outputs={"structural_tag": json.dumps({"format": JSON_FORMAT})})


def test_what_would_be_too_long_if_it_were_closed_stays_open() -> None:
    part = {"type": "object", "properties": {"a": {}}}
    schema = {"type": "array", "prefixItems": [part] * (MAX_GRAMMAR_BYTES // 50)}
    grammar, _ = asked(guided_json=schema)
    assert grammar is not None and json.loads(grammar.text) == schema and len(grammar.text) < MAX_GRAMMAR_BYTES


@pytest.mark.parametrize(
    ("field", "param"),
    [({"guided_json": "TEXT"}, "guided_json"), ({"structured_outputs": {"structural_tag": "TEXT"}}, "structural_tag")],
)
def test_a_text_is_bounded_before_it_is_parsed(
    field: dict[str, Any], param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some bytes of it may become hundreds in memory."""
    text = "[" + "[]," * MAX_GRAMMAR_BYTES + "[]]"
    fields = json.loads(json.dumps(field).replace("TEXT", text))
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("it is parsed"))
    with pytest.raises(RequestError, match="the limit is") as caught:
        asked(**fields)
    assert caught.value.param is not None and param in caught.value.param
