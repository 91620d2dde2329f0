"""An answer that may call: text until a call begins, which then follows its tool's schema.

    free       text, calls in the model's own form, text
    answering  calls, or an answer of the form that `response_format` asks for
    thinking   thoughts, then what follows any grammar

`free` is for tools that are `strict`, and for some tools among those that the model is told of; without either the
model is left to itself, and calls are read as they come. What a model says before it calls is free in any case, so its
reasoning is, too. Any other grammar holds from the end of its thoughts on: a model that reasons does so as it is used
to.

Gemma 4's calls are no JSON: the grammar of their arguments (`values/gemma_grammar.py`) cannot say all that schemas may.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...common.grammar import COMPACT, Grammar, Thoughts, white_space
from . import channels
from .definitions import Tool, ToolUse
from .dialect import Dialect
from .forced import call_schema
from .gemma import GEMMA_TAGS
from .json_syntaxes import HERMES_TAGS, NEMOTRON_TAGS
from .reasoning import GEMMA_CHANNEL
from .syntax import Tags
from .values.gemma_grammar import ArgumentsGrammar
from .values.gemma_text import MARK

_BLANK = r"BLANK: /\s{0,2}/"
_TEXT = r"TEXT: /(.|\n)*/"
_HEADER = "%llguidance {}"
_TAGS: Mapping[str, Tags] = {  # the forms with a mark
    "hermes": HERMES_TAGS,
    "nemotron_json": NEMOTRON_TAGS,
    "gemma4": GEMMA_TAGS,
}


@dataclass(slots=True, frozen=True)
class Thinking:
    """The way of a model to think before an answer, in the words of Lark."""

    begin: str  # the mark before its thoughts; empty: they have begun in the prompt
    thoughts: str  # the rule's body
    behind: str  # what stands between the thoughts and the answer
    before_answer: str = ""  # what stands there with thoughts or without
    begin_id: int | None = None  # of marks that are one token each
    end_id: int | None = None

    @property
    def may_be_left_out(self) -> bool:
        """Tell whether the answer may begin with what follows the grammar."""
        return bool(self.begin) and not self.before_answer

    @property
    def takes_budget(self) -> bool:
        """Tell whether thoughts can be ended: by their mark, and from where on is known."""
        return self.end_id is not None and not (self.begin and self.begin_id is None) and not self.before_answer

    def before(self, budget: int | None) -> Thoughts:
        """Return the thoughts, with the grammar around them and the answer."""
        start = f"({self.begin} {self._thoughts})?" if self.begin else self._thoughts
        around = _lark_text(f"start: {start} {self.before_answer} @answer", *self._rules)
        return Thoughts(around, self.begin_id if self.begin else None, self.end_id, budget)

    @property
    def _thoughts(self) -> str:
        return f"thoughts {self.behind}"

    @property
    def _rules(self) -> tuple[str, ...]:
        return f"thoughts{'' if self.thoughts == 'TEXT' else '[lazy]'}: {self.thoughts}", _TEXT, _BLANK

    def first(self, budget: int | None) -> Grammar:
        """Return a grammar that begins as answers with thoughts do."""
        if self.begin:
            return _lark(f"start: {self.begin}", _BLANK)
        if budget == 0:
            return self.alone(budget)
        return _lark(f"start: {self._thoughts}", *self._rules)

    def alone(self, budget: int) -> Grammar:
        """Return the grammar of any text, thoughts with a budget before it."""
        return Grammar("any", b"", Thoughts("", self.begin_id if self.begin else None, self.end_id, budget))


def thinking(
    dialect: Dialect,
    prompt: str,
    continued: str,
    mark_id: Callable[[str], int | None],
    added_id: Callable[[str], int | None],
) -> Thinking | None:
    """Return how the model may think before its answer to this prompt; None: it does not, or has. See `begins_inside`.

    `mark_id(text)` and `added_id(text)`: as `Tokenizer` has them.
    """
    if not dialect.reasons:
        return None
    if dialect.has_channels:
        marks = (channels.CHANNEL, channels.MESSAGE, channels.END, channels.START)
        if continued or None in map(mark_id, marks):
            return None
        channel, message, end, start = (_token(mark, mark_id) for mark in marks)
        begin, behind = f'{channel} "analysis" {message}', f'{end} {start} "assistant"'
        return Thinking(begin, "TEXT", behind, f'{channel} "final" {message}')
    is_inside = dialect.begins_inside(prompt, continued)
    if not is_inside and (continued or prompt[-64:].rstrip().endswith(dialect.tags.end)):
        return None
    begin, end = (_marked(mark, mark_id) for mark in dialect.tags)
    is_special = mark_id(dialect.tags.end) is not None  # which no text has
    return Thinking(
        "" if is_inside else f"BLANK {begin}",
        "TEXT" if is_special else f"TEXT {end}",
        f"{end} BLANK" if is_special else "BLANK",
        begin_id=added_id(dialect.tags.begin),
        end_id=added_id(dialect.tags.end),
    )


def _marked(mark: str, mark_id: Callable[[str], int | None]) -> str:
    """Return a mark that may be a special token, or a word behind one: Gemma 4's."""
    if mark_id(mark) is None and mark.startswith(GEMMA_CHANNEL):
        return f"{_token(GEMMA_CHANNEL, mark_id)} {json.dumps(mark.removeprefix(GEMMA_CHANNEL))}"
    return _token(mark, mark_id)


def is_guidable(dialect: Dialect, *, is_free: bool) -> bool:
    """Tell whether the dialect's calls are JSON, or Gemma's, behind a mark that can be told from text, or JSON alone.

    `is_free`: an answer that does not call is any text, in which Granite's marks could stand.
    """
    return dialect.tool_parser in (*_TAGS, "llama3_json", "json") or (dialect.tool_parser == "granite" and not is_free)


def free_grammar(use: ToolUse, dialect: Dialect, mark_id: Callable[[str], int | None]) -> Grammar:
    """Return the grammar of text with calls in it. `mark_id(text)`: as `Tokenizer` has it."""
    if (tags := _TAGS.get(dialect.tool_parser)) is None:  # a text does not begin like JSON
        text = r"text: /[^\s{\[](.|\n)*/"
        return _lark(f"start: BLANK (text | {_calls(use)})?", text, _BLANK, *_call_rules(use))
    begin, end = (_token(mark, mark_id) for mark in tags)
    is_text = mark_id(tags.begin) is None  # which a text may have anywhere; a special token ends it
    times = "*" if use.is_parallel else "?"
    return _lark(
        f"start: (before BLANK {_between(use, tags)} BLANK {end}){times} TEXT",
        f"before{'[lazy]' if is_text else ''}: TEXT {begin}",
        _TEXT,
        _BLANK,
        *_rules_of(use, tags, mark_id),
    )


def keeps_schemas(use: ToolUse, dialect: Dialect) -> bool:
    """Tell whether calls of tools that are strict follow all that their schemas say, where a grammar guides them."""
    if dialect.tool_parser != "gemma4":
        return True
    grammar = ArgumentsGrammar(MARK, is_special=True)
    return all(_gemma_arguments(grammar, tool) is not None for tool in use.callable if tool.is_strict)


def answering_grammar(
    use: ToolUse, dialect: Dialect, mark_id: Callable[[str], int | None], answer: Grammar
) -> Grammar | None:
    """Return the grammar of calls or of an answer in JSON; None: the answer's grammar is of another kind."""
    match answer.kind.removeprefix(COMPACT):
        case "json_object":
            schema: object = {"type": "object"}
        case "json_schema":
            schema = json.loads(answer.text)
        case _:
            return None
    calls = _calls(use)
    tags = _TAGS.get(dialect.tool_parser)
    rules = [f"answer: {json_rule(schema, answer.kind)}", *_rules_of(use, tags, mark_id)]
    if tags is not None:
        begin, end = (_token(mark, mark_id) for mark in tags)
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


def _rules_of(use: ToolUse, tags: Tags | None, mark_id: Callable[[str], int | None]) -> list[str]:
    return _call_rules(use) if tags is not GEMMA_TAGS else _gemma_rules(use, mark_id)


def _gemma_rules(use: ToolUse, mark_id: Callable[[str], int | None]) -> list[str]:
    grammar = ArgumentsGrammar(_token(MARK, mark_id), is_special=mark_id(MARK) is not None)
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


def json_rule(schema: object, kind: str = "json_schema") -> str:
    """Return a rule's part for JSON that follows a schema. `kind`: a grammar's, which says what white space it has."""
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": white_space(kind)}
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def _token(mark: str, mark_id: Callable[[str], int | None]) -> str:
    found = mark_id(mark)
    return json.dumps(mark) if found is None else f"<[{found}]>"


def _lark(*rules: str) -> Grammar:
    return Grammar("lark", _lark_text(*rules).encode("utf-8", "replace"))


def _lark_text(*rules: str) -> str:
    return "\n".join([_HEADER, *rules, ""])
