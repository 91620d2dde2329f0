"""An answer that must call: a schema of its whole text, where `tool_choice` requires a call.

    one call   {"name": "f", "arguments": {...}}
    several    [{"name": "f", "arguments": {...}}, {"name": "g", ...}]

The text is the calls and nothing else, whatever form the model's own calls have, and is read as bare JSON.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...common.grammar import Grammar
from .definitions import Tool, ToolUse
from .values.closing import closed
from .values.json_text import dumps

_REFERENCES = ("$ref", "$dynamicRef")
_ANCHORS = ("$anchor", "$dynamicAnchor")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # their keys are no keywords
_DATA = ("enum", "const", "default", "examples", "example")


def forced_grammar(use: ToolUse) -> Grammar | None:
    """Return the grammar of the calls that must come; None: the answer may be text."""
    if not use.is_forced:
        return None
    has_several = use.choice == "required" and use.is_parallel
    place = "#/items/anyOf" if has_several else "#/anyOf"
    calls = [call_schema(tool, f"{place}/{index}") for index, tool in enumerate(use.callable)]
    schema: dict[str, object] = {"anyOf": calls}
    if has_several:
        schema = {"type": "array", "minItems": 1, "items": schema}
    return Grammar("json_schema", dumps(schema).encode("utf-8", "replace"))


def call_schema(tool: Tool, place: str) -> dict[str, object]:
    """Return the schema of a call of this tool, for a place in a document."""
    own_name = str(tool.parameters.get("$id", "")).removesuffix("#")
    parameters = {name: value for name, value in tool.parameters.items() if name != "$id"}  # it is a part now
    arguments = _moved(closed(parameters), f"{place}/properties/arguments", own_name)
    assert isinstance(arguments, dict)
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": {"type": "object", **arguments}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(value: object, place: str, own_name: str) -> object:
    """Return a schema for another place in a document: references to its own parts follow it there.

    `own_name`: by which such references may call it, too. A part with a name of its own is what its references are to.
    """
    match value:
        case {"$id": str(name)} if not name.startswith("#"):
            return value
        case Mapping():
            return {name: _moved_value(name, child, place, own_name) for name, child in value.items()}
        case list():
            return [_moved(child, place, own_name) for child in value]
    return value


def _moved_value(keyword: str, value: object, place: str, own_name: str) -> object:
    anchor_end = place[1:].replace("/", "-")  # another tool's parts may have the same anchors
    if keyword in _NAMED and isinstance(value, Mapping):
        return {name: _moved(part, place, own_name) for name, part in value.items()}
    if keyword in _DATA:
        return value
    if not isinstance(value, str):
        return _moved(value, place, own_name)
    if keyword in _ANCHORS:
        return f"{value}{anchor_end}"
    if keyword not in _REFERENCES:
        return value
    reference = value.removeprefix(own_name) if value.startswith(f"{own_name}#") else value
    if reference == "#" or reference.startswith("#/"):
        return f"{place}{reference[1:]}"
    return f"{reference}{anchor_end}" if reference.startswith("#") else reference
