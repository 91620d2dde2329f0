"""An answer that must call: a schema of its whole text, for a `tool_choice` of `required` or of one function.

    one call   {"name": "f", "arguments": {...}}
    several    [{"name": "f", "arguments": {...}}, {"name": "g", ...}]

The text is the calls and nothing else, whatever form the model's own calls have, and is read as bare JSON.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...common.grammar import Grammar
from .definitions import Tool, ToolUse
from .json_text import dumps

_REFERENCES = ("$ref", "$dynamicRef")
# A schema with no other keywords means its properties and no others.
_CLOSED = {"type", "properties", "required", "title", "description", "$defs", "definitions", "$schema"}


def forced_grammar(use: ToolUse) -> Grammar | None:
    """Return the grammar of the calls that must come; None: the answer may be text."""
    if not use.is_forced:
        return None
    has_several = use.choice == "required" and use.is_parallel
    place = "#/items/anyOf" if has_several else "#/anyOf"
    called = [tool for tool in use.tools if use.name in (None, tool.name)]
    calls = [call_schema(tool, f"{place}/{index}") for index, tool in enumerate(called)]
    schema: dict[str, object] = {"anyOf": calls}
    if has_several:
        schema = {"type": "array", "minItems": 1, "items": schema}
    return Grammar("json_schema", dumps(schema).encode("utf-8", "replace"))


def call_schema(tool: Tool, place: str) -> dict[str, object]:
    """Return the schema of a call of this tool, for a place in a document."""
    arguments = _moved(dict(tool.parameters), f"{place}/properties/arguments")
    assert isinstance(arguments, dict)
    # Left to itself, a model may go on inventing arguments that nobody declared.
    closing = {"additionalProperties": False} if arguments.keys() <= _CLOSED and "properties" in arguments else {}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": {"type": "object", **arguments, **closing}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(value: object, place: str) -> object:
    """Return a schema for another place in a document: references to its own parts follow it there."""
    match value:
        case Mapping():
            return {
                name: f"{place}{child[1:]}"
                if name in _REFERENCES and isinstance(child, str) and child.startswith("#")
                else _moved(child, place)
                for name, child in value.items()
            }
        case list():
            return [_moved(child, place) for child in value]
    return value
