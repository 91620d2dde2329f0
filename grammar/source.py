r"""Grammars as clients give them, in the words of the library that matches them.

    json_object   any JSON object; the text is empty
    json_schema   a JSON schema (the text is JSON): keywords that cannot be kept are refused, none is passed over
    regex         a regular expression of the whole answer, in the syntax of Rust's regex crate
    choice        a JSON list of strings, of which the answer is one
    lark          a context-free grammar in llguidance's form of Lark, or in GBNF (`root ::= …`)
    tokens        any of these tokens at every place; the text of the grammar is their mask (`pack_mask`)
    any           every text; the text of the grammar is empty

Between the parts of a JSON text there may be one space, or a line's end with at most 32 spaces behind it: compact and
indented texts are taken, and an answer cannot go on with white space for ever. `compact_json_schema` and
`compact_json_object` have none there.
"""

from __future__ import annotations

import json
from typing import Any

from ..common.grammar import COMPACT, Grammar, white_space
from .gbnf import is_lark, plain_gbnf, unforced, with_whole_root
from .thinking import behind_thoughts
from .tokens import ANY, TOKENS

OBJECT_KINDS = ("json_object", f"{COMPACT}json_object")
SCHEMA_KINDS = ("json_schema", f"{COMPACT}json_schema")
KINDS = (*OBJECT_KINDS, *SCHEMA_KINDS, "regex", "choice", "lark", TOKENS, ANY)
_ANY_OBJECT = '{"type": "object"}'


def source_of(grammar: Grammar) -> str:
    """Return the grammar as llguidance takes it, with the thoughts before it.

    Raises ValueError for a text that is not of its kind; `tokens` and `any` are for no library.
    """
    source = _source_of_answer(grammar)
    return source if grammar.thoughts is None else behind_thoughts(grammar.thoughts, source)


def _source_of_answer(grammar: Grammar) -> str:
    from llguidance import LLMatcher

    text = grammar.text.decode()
    overrides: Any = white_space(grammar.kind)  # a TypedDict of the library's own
    match grammar.kind:
        case kind if kind in OBJECT_KINDS:
            return LLMatcher.grammar_from_json_schema(_ANY_OBJECT, overrides=overrides)
        case kind if kind in SCHEMA_KINDS:
            return LLMatcher.grammar_from_json_schema(_object(text), overrides=overrides)
        case "regex":
            return LLMatcher.grammar_from_regex(text)
        case "choice":
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(_quoted, json.loads(text)))}")
        case "lark":
            return LLMatcher.grammar_from_lark(_lark(text))
    raise ValueError(f"{grammar.kind!r} is none of {', '.join(KINDS)}")


def _object(schema: str) -> str:
    """Return a schema that is an object: `true` takes everything."""
    return "{}" if schema.strip() == "true" else schema


def _lark(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if is_lark(text):
        return text
    plain = plain_gbnf(text)
    try:
        gbnf_to_lark(plain)  # whose errors are about the rules as they were written
        return unforced(gbnf_to_lark(with_whole_root(plain)))
    except RecursionError:
        raise
    except Exception as error:  # a missing rule is a bare Exception, a text that ends in an escape an IndexError
        raise ValueError("it ends in its middle" if isinstance(error, IndexError) else str(error)) from None


def _quoted(choice: str) -> str:
    return json.dumps(choice, ensure_ascii=False).replace("\x7f", "\\u007f")  # which Lark's strings have not as it is
