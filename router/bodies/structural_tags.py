"""Structural tags as a grammar: free text in which a trigger begins a tag, and a tag has what its schema says.

{"triggers": ["<function="], "structures": [{"begin": "<function=f>", "schema": {...}, "end": "</function>"}]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ...common.errors import RequestError
from ..turns.lazy import json_rule
from .fields import not_supported

MAX_TAGS = 128


def tags_grammar(name: str, fields: Mapping[str, object]) -> str:
    """Return the grammar in Lark's form. Raises RequestError about a field below `name`."""
    if fields.get("format") is not None:
        raise not_supported(f"{name}.format")
    triggers, structures = fields.get("triggers"), fields.get("structures")
    if not isinstance(triggers, list) or not triggers or not all(isinstance(each, str) and each for each in triggers):
        raise RequestError(f"'{name}.triggers' must be a list of strings, and not be empty", param=f"{name}.triggers")
    if not isinstance(structures, list) or not 1 <= len(structures) <= MAX_TAGS:
        raise RequestError(f"'{name}.structures' must be a list of 1 to {MAX_TAGS} tags", param=f"{name}.structures")
    rules = [_tag(f"{name}.structures[{index}]", index, tag, triggers) for index, tag in enumerate(structures)]
    tags = " | ".join(f"tag_{index}" for index in range(len(rules)))
    return "\n".join(["%llguidance {}", f"start: ({tags})* rest", r"rest: TEXT", r"TEXT: /(.|\n)*/", *rules, ""])


def _tag(name: str, index: int, tag: object, triggers: list[str]) -> str:
    """One tag's rules: text up to its trigger, then what is left of its beginning, its content and its end."""
    if not isinstance(tag, dict) or not isinstance(tag.get("begin"), str) or not isinstance(tag.get("end"), str):
        raise RequestError(f"'{name}' must be an object with strings 'begin' and 'end'", param=name)
    begin, schema = tag["begin"], tag.get("schema", {})
    trigger = next((each for each in triggers if begin.startswith(each)), None)
    if trigger is None:
        raise RequestError(f"'{name}.begin' begins with none of the triggers", param=f"{name}.begin")
    if not isinstance(schema, dict):
        raise RequestError(f"'{name}.schema' must be an object", param=f"{name}.schema")
    parts = [_quoted(begin[len(trigger) :]), json_rule(schema), _quoted(tag["end"])]
    head = f"trigger_{index}[lazy]: TEXT {_quoted(trigger)}"
    return f"{head}\ntag_{index}: trigger_{index} {' '.join(filter(None, parts))}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
