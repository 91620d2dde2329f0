"""The tools of /v1/messages as a chat's functions.

custom                       ─> a function
bash, text_editor, memory    ─> functions with their published arguments: the client runs them
what Anthropic itself runs   ─> left out where there are others beside it: the model may not call what nobody runs here
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...common.errors import RequestError
from ..bodies.fields import checked_array, checked_object
from ..state.errors import shown
from ..turns.places import PlacedTools

_HOSTED = re.compile(r"(?:web_search|web_fetch|code_execution|tool_search_tool)_\w+|mcp_toolset")
_OF_CLIENTS = re.compile(r"(bash|text_editor|memory)_\d+")
_TEXT: Mapping[str, object] = {"type": "string"}
_NUMBER: Mapping[str, object] = {"type": "integer"}
_FILES: Mapping[str, object] = {  # arguments of both tools that work on files
    "path": _TEXT,
    "file_text": _TEXT,
    "old_str": _TEXT,
    "new_str": _TEXT,
    "insert_line": _NUMBER,
    "insert_text": _TEXT,
    "view_range": {"type": "array", "items": _NUMBER},
}


def _arguments(properties: Mapping[str, object], *required: str) -> Mapping[str, object]:
    return {"type": "object", "properties": dict(properties), "required": list(required)}


def _commands(*names: str) -> dict[str, object]:
    return {"command": {"type": "string", "enum": list(names)}}


_PUBLISHED: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "bash": (
        "Run a command in a bash session that goes on between calls, or restart it.",
        {"type": "object", "properties": {"command": _TEXT, "restart": {"type": "boolean"}}},
    ),
    "text_editor": (
        "View, create and edit text files.",
        _arguments({**_commands("view", "create", "str_replace", "insert"), **_FILES}, "command", "path"),
    ),
    "memory": (
        "View, create, edit, delete and rename files of a memory that outlives the conversation.",
        _arguments(
            {
                **_commands("view", "create", "str_replace", "insert", "delete", "rename"),
                **_FILES,
                "old_path": _TEXT,
                "new_path": _TEXT,
            },
            "command",
        ),
    ),
}


def message_tools(raw: object) -> PlacedTools:
    """Return the tools. Raises RequestError that names the place."""
    found, hosted = PlacedTools(), list[str]()
    for index, each in enumerate(checked_array(raw, "tools") if raw else ()):
        where = f"tools[{index}]"
        tool = checked_object(each, where)
        kind = tool.get("type")
        if isinstance(kind, str) and _HOSTED.fullmatch(kind):
            hosted.append(kind)
            found.left_out.append(where)
            continue
        found.functions.append({"type": "function", "function": _function(tool, where)})
        found.places.append(where)
    if hosted and not found.functions:
        raise _not_run(hosted[0], found.left_out[0])
    return found


def _function(raw: Mapping[str, object], where: str) -> dict[str, object]:
    kind = raw.get("type") or "custom"
    published = _OF_CLIENTS.fullmatch(kind) if isinstance(kind, str) else None
    function: dict[str, object] = {"name": raw.get("name")}
    if published is not None:
        function["description"], function["parameters"] = _PUBLISHED[published[1]]
    elif kind != "custom":
        raise _not_run(kind, where)
    elif not isinstance(raw.get("input_schema"), dict):
        raise RequestError(f"{where}.input_schema must be an object", param=f"{where}.input_schema")
    else:
        function["parameters"] = raw["input_schema"]
    return function | {name: raw[name] for name in ("description", "strict") if raw.get(name) is not None}


def _not_run(kind: object, where: str) -> RequestError:
    return RequestError(
        f"{where}: tools of type {shown(kind)} run at no server of this kind",
        param=f"{where}.type",
        code="unsupported_value",
    )
