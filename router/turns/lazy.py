"""An answer that may call: text until a call begins, which then follows its tool's schema.

    free       text, calls in the model's own form, text
    answering  calls, or an answer of the form that `response_format` asks for

The first is for tools that are `strict`, and for some tools among those that the model is told of; without either the
model is left to itself, and calls are read as they come. What a model says before it calls is free in any case, so its
reasoning is, too.

Gemma 4's calls are no JSON: the grammar of their arguments (`values/gemma_grammar.py`) cannot say all that schemas may.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from ...common.grammar import WHITE_SPACE, Grammar
from .definitions import Tool, ToolUse
from .dialect import Dialect
from .forced import call_schema
from .gemma import GEMMA_TAGS
from .json_syntaxes import HERMES_TAGS, NEMOTRON_TAGS
from .reasoning import GEMMA_CHANNEL, GEMMA_THINK
from .syntax import Tags
from .values.gemma_grammar import ArgumentsGrammar
from .values.gemma_text import MARK

_BLANK = r"BLANK: /\s{0,2}/"
_HEADER = "%llguidance {}"
_TAGS: Mapping[str, Tags] = {  # the forms with a mark
    "hermes": HERMES_TAGS,
    "nemotron_json": NEMOTRON_TAGS,
    "gemma4": GEMMA_TAGS,
}


def is_guidable(dialect: Dialect, *, is_free: bool) -> bool:
    """Tell whether the dialect's calls are JSON, or Gemma's, behind a mark that can be told from text, or JSON alone.

    `is_free`: an answer that does not call is any text, in which Granite's marks could stand.
    """
    return dialect.tool_parser in (*_TAGS, "llama3_json", "json") or (dialect.tool_parser == "granite" and not is_free)


def free_grammar(use: ToolUse, dialect: Dialect, special_id: Callable[[str], int | None]) -> Grammar:
    """Return the grammar of text with calls in it. `special_id(text)`: the special token that is this text, if any."""
    if (tags := _TAGS.get(dialect.tool_parser)) is None:  # a text does not begin like JSON
        text = r"text: /[^\s{\[](.|\n)*/"
        return _lark(f"start: BLANK (text | {_calls(use)})?", text, _BLANK, *_call_rules(use))
    begin, end = (_token(mark, special_id) for mark in tags)
    is_text = special_id(tags.begin) is None  # which a text may have anywhere; a special token ends it
    times = "*" if use.is_parallel else "?"
    return _lark(
        f"start: {_thoughts(tags, special_id)}(before BLANK {_between(use, tags)} BLANK {end}){times} TEXT",
        f"before{'[lazy]' if is_text else ''}: TEXT {begin}",
        r"TEXT: /(.|\n)*/",
        _BLANK,
        *_rules_of(use, tags, special_id),
    )


def keeps_schemas(use: ToolUse, dialect: Dialect) -> bool:
    """Tell whether calls of tools that are strict follow all that their schemas say, where a grammar guides them."""
    if dialect.tool_parser != "gemma4":
        return True
    grammar = ArgumentsGrammar(MARK, is_special=True)
    return all(_gemma_arguments(grammar, tool) is not None for tool in use.callable if tool.is_strict)


def answering_grammar(
    use: ToolUse, dialect: Dialect, special_id: Callable[[str], int | None], answer: Grammar
) -> Grammar | None:
    """Return the grammar of calls or of an answer in JSON; None: the answer's grammar is of another kind."""
    match answer.kind:
        case "json_object":
            schema: object = {"type": "object"}
        case "json_schema":
            schema = json.loads(answer.text)
        case _:
            return None
    calls = _calls(use)
    tags = _TAGS.get(dialect.tool_parser)
    rules = [f"answer: {json_rule(schema)}", *_rules_of(use, tags, special_id)]
    if tags is not None:
        begin, end = (_token(mark, special_id) for mark in tags)
        calls = f"{begin} BLANK {_between(use, tags)} BLANK {end}"
        if use.is_parallel:
            calls = f"{calls} (BLANK {calls})*"
        rules.append(_BLANK)
    return _lark(f"start: answer | {calls}", *rules)


def _calls(use: ToolUse) -> str:
    return 'call | "[" call ("," call)* "]"' if use.is_parallel else "call"


def _between(use: ToolUse, tags: Tags) -> str:
    """Return what stands between a call's tags, or between those of an array."""
    if tags is not NEMOTRON_TAGS:
        return "call"
    more = ' (BLANK "," BLANK call)*' if use.is_parallel else ""
    return f'"[" BLANK call{more} BLANK "]"'


def _thoughts(tags: Tags, special_id: Callable[[str], int | None]) -> str:
    """Return what thoughts before a text are, where their marks are special tokens, which no text has: Gemma 4's."""
    if tags is not GEMMA_TAGS:
        return ""
    begin, end = special_id(GEMMA_CHANNEL), special_id(GEMMA_THINK.end)
    return "" if begin is None or end is None else f"(BLANK <[{begin}]> TEXT <[{end}]>)? "


def _rules_of(use: ToolUse, tags: Tags | None, special_id: Callable[[str], int | None]) -> list[str]:
    return _call_rules(use) if tags is not GEMMA_TAGS else _gemma_rules(use, special_id)


def _gemma_rules(use: ToolUse, special_id: Callable[[str], int | None]) -> list[str]:
    grammar = ArgumentsGrammar(_token(MARK, special_id), is_special=special_id(MARK) is not None)
    arguments = [_gemma_arguments(grammar, tool) or grammar.any_object() for tool in use.callable]
    calls = [f"{json.dumps(f'call:{tool.name}')} {name}" for tool, name in zip(use.callable, arguments, strict=True)]
    return [f"call: {' | '.join(calls)}", *grammar.rules]


def _gemma_arguments(grammar: ArgumentsGrammar, tool: Tool) -> str | None:
    """Return the rule of a tool's arguments; None: the form's grammar cannot say what its schema says."""
    try:
        return grammar.of_schema(tool.parameters if tool.is_strict else {})
    except ValueError:
        return None


def _call_rules(use: ToolUse) -> list[str]:
    names = [f"call_{index}" for index in range(len(use.callable))]
    rules = [f"call: {' | '.join(names)}"]
    return rules + [f"{name}: {json_rule(_schema(tool))}" for name, tool in zip(names, use.callable, strict=True)]


def _schema(tool: Tool) -> dict[str, object]:
    """A tool that is not strict is called by its name, with any arguments."""
    return call_schema(tool if tool.is_strict else Tool(tool.name, None, {}), "#")


def json_rule(schema: object) -> str:
    """Return a rule's part for JSON that follows a schema."""
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}}
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def _token(mark: str, special_id: Callable[[str], int | None]) -> str:
    found = special_id(mark)
    return json.dumps(mark) if found is None else f"<[{found}]>"


def _lark(*rules: str) -> Grammar:
    return Grammar("lark", "\n".join([_HEADER, *rules, ""]).encode("utf-8", "replace"))
