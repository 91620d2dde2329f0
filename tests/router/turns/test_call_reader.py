"""Calls in a model's text: what is one, what is content, and that cutting the text changes nothing."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from kvferry.router.turns.call_reader import CallReader, joined_calls
from kvferry.router.turns.parts import CallPiece
from kvferry.router.turns.qwen_coder import QwenCoderSyntax
from kvferry.router.turns.syntax import Call, Syntax

from .samples import FORMS, NAMES, SCHEMAS, arguments_of, read_calls, text_of

TEXTS = 2100
CUTS = 30  # places of a text, taken by chance, at each of which it is cut once
UNTYPED = ("qwen3_coder", "seed_oss", "glm", "minimax_m2", "told otherwise")
HERMES, BARE, MISTRAL, CODER, DEEPSEEK, PYTHONIC, GRANITE = (
    FORMS[name].syntax for name in ("hermes", "json", "mistral", "qwen3_coder", "deepseek_v3", "pythonic", "granite")
)


def _streamed(text: str, syntax: Syntax, cuts: list[int]) -> tuple[str, list[CallPiece]]:
    reader, content, pieces = CallReader(syntax), "", list[CallPiece]()
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        delta = reader.push(text[start:end])
        content += delta.content
        pieces += delta.calls
    delta = reader.push("", is_final=True)
    return content + delta.content, pieces + delta.calls


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_joined_deltas_are_the_whole_answer_wherever_the_text_is_cut(name: str) -> None:
    form, rng = FORMS[name], random.Random(name)
    num_calls = 0
    for _ in range(TEXTS // len(FORMS)):
        text = text_of(rng, form)
        content, calls = read_calls(text, form.syntax)
        num_calls += len(calls)
        every = list(range(1, len(text)))
        alone = rng.sample(every, min(len(every), CUTS))
        for cuts in (every, *([at] for at in alone), sorted(rng.sample(every, min(len(every), 3)))):
            streamed, pieces = _streamed(text, form.syntax, cuts)
            assert (streamed, joined_calls(pieces)) == (content, list(calls)), (text, cuts)
            assert [piece.index for piece in pieces if piece.name is not None] == list(range(len(calls)))
    assert num_calls > 100


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", r'<tool_call>{"arguments": {"text": "\ud83d"}, "name": "search"}</tool_call>'),
        ("hermes", r'<tool_call>{"name": "search", "arguments": "\ud83d"}</tool_call>'),
        ("qwen3_coder", "<function=search>\n<parameter=filter>\n" r'{"text": "\ud83d"}' "\n</parameter>\n</function>"),
    ],
)
def test_half_a_character_of_two_escapes_can_be_answered(name: str, text: str) -> None:
    syntax = QwenCoderSyntax({"search": {"properties": {"filter": {"type": "object"}}}})
    _, (call,) = read_calls(text, syntax if name == "qwen3_coder" else FORMS[name].syntax)
    assert call.arguments.encode()


CODE = {"text": 'if a:\n\treturn "\\\\\n"', "parts": ["\r\n"]}
WRITTEN = json.dumps(CODE, indent=1)
RAW = WRITTEN.replace("\\n\\t", "\n\t").replace("\\r\\n", "\r\\\n")  # the last with a backslash before it


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", f'<tool_call>\n{{"name": "write.file", "arguments": {RAW}}}\n</tool_call>'),
        ("hermes", f'<tool_call>\n{{"arguments": {RAW}, "name": "write.file"}}\n</tool_call>'),
        ("hermes", f'<tool_call>{{"name": "write.file", "arguments": {json.dumps(RAW)}}}</tool_call>'),
        ("llama3_json", f'{{"name": "write.file", "parameters": {RAW}}}'),
        ("mistral", f"[TOOL_CALLS]write.file[ARGS]{RAW}"),
        ("mistral", f'[TOOL_CALLS] [{{"name": "write.file", "arguments": {RAW}}}]'),
        ("deepseek_v3", f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>write.file\n```json\n{RAW}\n```"),
    ],
)
def test_line_breaks_as_they_are_in_strings_are_escaped(name: str, text: str) -> None:
    """Models write code so; a client's parser takes none of it."""
    syntax = FORMS[name].syntax
    content, (call,) = read_calls(text, syntax)
    assert (content, call.name, json.loads(call.arguments)) == ("", "write.file", CODE)
    for at in range(1, len(text)):
        content, pieces = _streamed(text, syntax, [at])
        assert (content, joined_calls(pieces)) == ("", [call])
    content, pieces = _streamed(text, syntax, list(range(1, len(text))))
    assert (content, joined_calls(pieces)) == ("", [call])


def test_what_is_escaped_already_stays_as_it_is() -> None:
    _, (call,) = read_calls(f'<tool_call>{{"name": "f", "arguments": {WRITTEN}}}</tool_call>', HERMES)
    assert call.arguments == WRITTEN


@pytest.mark.parametrize("name", FORMS)
def test_what_is_written_in_the_form_is_read_back(name: str) -> None:
    form, rng = FORMS[name], random.Random(f"{name} sound")
    for _ in range(200):
        tool, arguments = rng.choice(NAMES), arguments_of(rng)
        if name == "pythonic":  # where the schema wants a text, all is one
            arguments = {key: value for key, value in arguments.items() if isinstance(value, str)}
        if name == "gemma4":  # the same for what is no text
            arguments = {
                key: value for key, value in arguments.items() if value is None or isinstance(value, str | list)
            }
        if name in UNTYPED:  # no types but the schema's, and no way to quote its own tags
            properties = SCHEMAS[tool].get("properties", {})
            assert isinstance(properties, dict)
            arguments = {key: "x" if key in properties else "7" for key in arguments}
            arguments = {key: value for key, value in arguments.items() if properties.get(key) == {"type": "string"}}
        content, calls = read_calls(form.write(rng, tool, arguments), form.syntax)
        assert calls and not content
        assert all((call.name, json.loads(call.arguments)) == (tool, arguments) for call in calls)


@pytest.mark.parametrize("name", FORMS)
def test_a_text_without_calls_is_content_to_the_last_character(name: str) -> None:
    rng = random.Random(f"{name} content")
    for _ in range(500):
        text = text_of(rng, FORMS[rng.choice(list(FORMS))])
        content, calls = read_calls(text, FORMS[name].syntax)
        if not calls:
            assert content == text


@pytest.mark.parametrize(
    ("syntax", "text", "content", "calls"),
    [
        (
            HERMES,
            'Look.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
            "Look.",
            [("f", '{"a": 1}')],
        ),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),  # cut by a length
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "", [("f", '{"a": 1}')]),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>ok', "ok", [("f", "{}")]),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "", [("f", "{}")]),
        (
            HERMES,
            '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n{"name": "g", "arguments": {}}\n</tool_call>',
            "",
            [("f", '{"a": 1}'), ("g", "{}")],
        ),
        (
            HERMES,
            '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g"}]</tool_call>\n<tool_call>{"name": "h"}',
            "",
            [("f", "{}"), ("g", "{}"), ("h", "{}")],
        ),
        (HERMES, '<tool_call>\n```json\n{"name": "f"}\n```\n</tool_call>ok', "ok", [("f", "{}")]),
        (HERMES, '<tool_call>{"name": "f"}{"no": "call"}', '{"no": "call"}', [("f", "{}")]),
        (HERMES, "<tool_call>```js", "<tool_call>```js", []),
        (HERMES, '<tool_call>{"nam', '<tool_call>{"nam', []),
        (HERMES, "<tool_call>none</tool_call>", "<tool_call>none</tool_call>", []),
        (HERMES, "a <tool_cal", "a <tool_cal", []),
        (HERMES, " plain \n", " plain \n", []),
        (BARE, '{"name": "search", "parameters": {}}', "", [("search", "{}")]),
        (BARE, '{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
        (BARE, '{"answer": 42}', '{"answer": 42}', []),
        (BARE, 'Sure: {"name": "search", "parameters": {}}', 'Sure: {"name": "search", "parameters": {}}', []),
        (
            GRANITE,
            'So.\n<|tool_call|>[{"name": "search", "arguments": {"query": "x"}}, {"name": "a-b", "arguments": {}}]',
            "So.",
            [("search", '{"query": "x"}'), ("a-b", "{}")],
        ),
        (GRANITE, '<tool_call>[{"name": "search", "arguments": {}}]', "", [("search", "{}")]),
        (GRANITE, '<|tool_call|>[{"name": "search"}]<|/tool_call|>ok', "ok", [("search", "{}")]),
        (GRANITE, 'functools[{"name": "search", "arguments": {}}]', "", [("search", "{}")]),
        (GRANITE, "functools.wraps and functools[0]", "functools.wraps and functools[0]", []),
        (MISTRAL, '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g{}', "", [("f", '{"a": 1}'), ("g", "{}")]),
        (MISTRAL, "[TOOL_CALLS] of mine", "[TOOL_CALLS] of mine", []),
        (
            CODER,
            "<tool_call>\n<function=search>\n<parameter=query>\n7\n</parameter>\n<parameter=limit>\n7\n</parameter>\n"
            "</function>\n</tool_call>",
            "",
            [("search", '{"query": "7", "limit": 7}')],
        ),
        (CODER, "<function=search>\n<parameter=query>\nab", "", [("search", '{"query": "ab')]),
        (CODER, "<function=search>\n</function>", "", [("search", "{}")]),
        (
            CODER,
            "<tool_call>\n<function=search>\n<parameter=query>\nx\n<parameter=a>\n<parameter=limit>\n7\n</function>\n"
            "</tool_call>\n<tool_call>\n<function=search>\n<parameter=query>\n</function>",
            "",
            [("search", '{"query": "x\\n<parameter=a>", "limit": 7}'), ("search", '{"query": ""}')],
        ),
        (
            CODER,
            "<function=search>\n<parameter=query>\n</function>\nx</parameter>\n</function>",
            "",
            [("search", '{"query": "</function>\\nx"}')],
        ),
        (CODER, "<function name>", "<function name>", []),
        (
            DEEPSEEK,
            "Look.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
            '{"a": "```"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n'
            "```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "Look.",
            [("f", '{"a": "```"}'), ("g", "{}")],
        ),
        (
            DEEPSEEK,
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
            "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "",
            [("function", '{"a": 1}'), ("g", "{}")],
        ),
        (DEEPSEEK, '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": "b', "", [("f", '{"a": "b')]),  # cut by a length
        (
            PYTHONIC,
            "Look.\n<function_calls>\nf(a='it's', b=\"\\u00e9\\n\", c=[1, {'d': None}])\nsearch(limit=-2,)\n"
            "</function_calls>",
            "Look.",
            [("f", '{"a": "it\'s", "b": "é\\n", "c": [1, {"d": null}]}'), ("search", '{"limit": -2}')],
        ),
        (
            PYTHONIC,
            "[search(query=Oslo, limit=true), search()]<|python_end|> ok",
            " ok",
            [("search", '{"query": "Oslo", "limit": true}'), ("search", "{}")],
        ),
        (PYTHONIC, "[search(query=7, limit=07)]", "", [("search", '{"query": "7", "limit": "07"}')]),
        (PYTHONIC, '<function_calls>f(a=\'x\', b="""y"z\n', "", [("f", '{"a": "x"')]),  # cut by a length
        (PYTHONIC, "[unknown(a=1)]", "[unknown(a=1)]", []),
        (PYTHONIC, "Sure: [search(limit=1)]", "Sure: [search(limit=1)]", []),
        (PYTHONIC, "[1, 2]", "[1, 2]", []),
        (DEEPSEEK, "<｜tool▁calls▁begin｜> none", "<｜tool▁calls▁begin｜> none", []),
        (DEEPSEEK, "<｜tool▁call▁begin｜>f<｜tool▁call▁end｜>", "<｜tool▁call▁begin｜>f<｜tool▁call▁end｜>", []),
    ],
)
def test_a_text_and_its_calls(syntax: Syntax, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read_calls(text, syntax) == (content, [Call(*call) for call in calls])


OPTIONAL = {"anyOf": [{"type": "string"}, {"type": "null"}]}  # as pydantic writes a text that may be missing


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "7", "7"),
        ({"type": "integer"}, "7", 7),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "-1e999", "-1e999"),
        ({"type": "boolean"}, "True", True),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"type": "array"}, "['a', True]", ["a", True]),
        ({"type": "object"}, "{'a': None}", {"a": None}),
        ({"type": "object"}, "{a: None}", "{a: None}"),
        ({"type": "string"}, "['a']", "['a']"),
        ({}, "7", 7),
        ({}, '"7"', '"7"'),
        (OPTIONAL, "7", "7"),
        (OPTIONAL, "true", "true"),
        (OPTIONAL, "[1]", "[1]"),
        (OPTIONAL, "null", None),
        ({"type": ["string", "null"]}, "7", "7"),
        ({"type": ["string", "integer"]}, "7", 7),
        ({"type": ["string", "integer"]}, "7.5", "7.5"),
        ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, "7", 7),
        ({"anyOf": [{"$ref": "#/$defs/a"}, {"type": "string"}]}, "7", 7),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": "1"}, "1", "1"),
        (True, "7", "7"),
    ],
)
def test_a_coders_parameter_is_of_a_type_that_its_schema_names(schema: Any, text: str, value: object) -> None:
    syntax = QwenCoderSyntax({"f": {"type": "object", "properties": {"a": schema}}})
    content, [call] = read_calls(f"<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>", syntax)
    assert (content, json.loads(call.arguments)) == ("", {"a": value})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('""', ""),
        ("'''it's \"so\"'''", 'it\'s "so"'),
        (r"'\ud83d\ude00\x41\/\''", "\U0001f600A/'"),
        ("'two\nlines'", "two\nlines"),
        ("1e3", 1000.0),
        ("(1, (2,))", [1, [2]]),
        ("{'a': True, \"b\": null}", {"a": True, "b": None}),
        ("[" * 5000 + "]" * 5000, "[" * 5000 + "]" * 5000),
        ("1e999", "1e999"),
        ("f'{x}'", "f'{x}'"),
        ("[a, b]", "[a, b]"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_a_value_is_what_python_means_by_it(text: str, value: object) -> None:
    text = f"<function_calls>\nf(a={text}, b = 1)\n</function_calls>"
    content, (call,) = read_calls(text, PYTHONIC)
    assert (content, json.loads(call.arguments)) == ("", {"a": value, "b": 1})
    assert joined_calls(_streamed(text, PYTHONIC, list(range(1, len(text))))[1]) == [call]


def test_arguments_leave_as_they_are_written() -> None:
    reader = CallReader(HERMES)
    assert not reader.push('<tool_call>{"name": "f", "arguments": ').calls
    assert reader.push('{"a"').calls == [CallPiece(0, "f", '{"a"')]
    assert reader.push(': "b').calls == [CallPiece(0, None, ': "b')]
    assert reader.push('"}').calls == [CallPiece(0, None, '"}')]
    assert not reader.push("}</tool_call>").calls


def test_a_long_call_takes_no_more_than_its_text() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * 200_000
    assert read_calls(text, HERMES)[1][0].arguments == '{"a": "' + "x" * 200_000
    text = "<function_calls>f(a=[" + "'x', " * 50_000
    assert _streamed(text, PYTHONIC, list(range(1, len(text), 5)))[1] == [CallPiece(0, "f", "")]
    assert read_calls("[" * 100_000, BARE) == ("[" * 100_000, [])


COMMAND, GLM, HUNYUAN = (FORMS[name].syntax for name in ("cohere_command3", "glm", "hunyuan_a13b"))
# What never becomes a call, however long it goes on, and at which length that is clear.
ENDLESS = [
    (HERMES, '<tool_call>{"name": "', "a", 128, '", "arguments": {"b": 1}}</tool_call>'),
    (HERMES, '<tool_call>{"', "a", 12, '": 1, "name": "f"}</tool_call>'),
    (BARE, '{"name": "search', "h", 122, '", "parameters": {}}'),
    (GRANITE, '<|tool_call|>[{"name":"search', "h", 122, '", "arguments": {}}]'),
    (COMMAND, '<|START_ACTION|>[{"tool_call_id":"', "0", 128, '", "tool_name": "search", "parameters": {}}]'),
    *(
        (syntax, begin, " ", 1024, rest)
        for syntax, begin, rest in (
            (HERMES, "<tool_call>", '{"name": "f", "arguments": {}}</tool_call>'),
            (HERMES, "<tool_call>{", '"name": "f", "arguments": {}}</tool_call>'),
            (HERMES, "<tool_call>[", '{"name": "f"}]</tool_call>'),
            (HERMES, "<tool_call>```json", '{"name": "f"}```</tool_call>'),
            (MISTRAL, "[TOOL_CALLS]", '[{"name": "f", "arguments": {}}]'),
            (MISTRAL, "[TOOL_CALLS]f", '{"a": 1}'),
            (PYTHONIC, "[", "search(limit=1)]"),
            (PYTHONIC, "[search", "(limit=1)]"),
            (HUNYUAN, "<tool_calls>", '[{"name": "f", "arguments": {}}]</tool_calls>'),
            (GLM, "<tool_call>", "search</tool_call>"),
            (GLM, "<tool_call>search", "</tool_call>"),
        )
    ),
]


@pytest.mark.parametrize(("syntax", "begin", "more", "most", "rest"), ENDLESS)
def test_what_is_too_long_for_a_call_is_told_while_it_goes_on(
    syntax: Syntax, begin: str, more: str, most: int, rest: str
) -> None:
    reader = CallReader(syntax)
    text = begin + more * (most + 1) + "z"
    assert "".join(reader.push(char).content for char in text) == text


@pytest.mark.parametrize(("syntax", "begin", "more", "most", "rest"), ENDLESS)
def test_what_is_too_long_is_so_wherever_the_text_is_cut(
    syntax: Syntax, begin: str, more: str, most: int, rest: str
) -> None:
    for size in range(most - 1, most + 3):
        text = begin + more * size + rest + " ok"
        content, calls = read_calls(text, syntax)
        border = len(begin) + most
        for cuts in (list(range(1, len(text))), *([at] for at in range(border - 3, border + 4)), [len(begin), border]):
            streamed, pieces = _streamed(text, syntax, cuts)
            assert (streamed, joined_calls(pieces)) == (content, list(calls)), (size, cuts)
        assert size <= most or (content, calls) == (text, [])


@pytest.mark.parametrize(
    ("syntax", "begin", "rest"),
    [
        (HERMES, '<tool_call>{"name": "f", "arguments": {"limit": 1}', "}</tool_call>"),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"limit": 1}}', "</tool_call>"),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"limit": 1}}', '{"name": "g"}</tool_call>'),
        (HERMES, '<tool_call>[{"name": "f", "arguments": {"limit": 1}},', '{"name": "g"}]</tool_call>'),
        (PYTHONIC, "<function_calls>f(limit=1", ", a=2)</function_calls>"),
        (PYTHONIC, "<function_calls>f(limit=1,", "a=2)</function_calls>"),
        (PYTHONIC, "<function_calls>f(limit=1)", "</function_calls>"),
        (PYTHONIC, "<function_calls>f(limit=1)", "f()</function_calls>"),
        (GLM, "<tool_call>f<arg_key>limit</arg_key><arg_value>1</arg_value>", "</tool_call>"),
        (DEEPSEEK, '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"limit": 1}', "<｜tool▁call▁end｜>"),
        (DEEPSEEK, '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"limit": 1}<｜tool▁call▁end｜>', "<｜tool▁calls▁end｜>"),
    ],
)
def test_white_space_behind_a_call_takes_none_of_it_back(syntax: Syntax, begin: str, rest: str) -> None:
    for size in (1023, 1024, 1025, 3000):
        text = begin + " " * size + rest
        content, calls = read_calls(text, syntax)
        assert calls[0].name == "f" and json.loads(calls[0].arguments)["limit"] in (1, "1")
        for cuts in (list(range(1, len(text))), [len(begin)], [len(text) - len(rest)]):
            streamed, pieces = _streamed(text, syntax, cuts)
            assert (streamed, joined_calls(pieces)) == (content, list(calls)), (size, cuts)


@pytest.mark.parametrize(
    ("syntax", "begin", "rest"),
    [
        (DEEPSEEK, "<｜tool▁call▁begin｜>f", "<｜tool▁sep｜>{}<｜tool▁call▁end｜>"),
        (DEEPSEEK, "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f", "\n```json\n{}\n```<｜tool▁call▁end｜>"),
        (HUNYUAN, "<tool_calls><tool_call>f", "\n```json\n{}\n```</tool_call></tool_calls>"),
    ],
)
def test_a_long_header_is_none_wherever_the_text_is_cut(syntax: Syntax, begin: str, rest: str) -> None:
    seen = set[int]()
    for size in range(470, 520):
        text = begin + " " * size + rest
        content, calls = read_calls(text, syntax)
        for cuts in (list(range(1, len(text))), [len(begin) + size]):
            streamed, pieces = _streamed(text, syntax, cuts)
            assert (streamed, joined_calls(pieces)) == (content, list(calls)), (size, cuts)
        seen.add(len(calls))
    assert seen == {0, 1}
