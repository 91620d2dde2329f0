"""The tools of /v1/messages as a chat's functions.

custom                       ─> a function
bash, text_editor, memory    ─> functions with their published arguments: the client runs them
what Anthropic itself runs   ─> left out where there are others beside it: the model may not call what nobody runs here
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...common.errors import RequestError
from ..state.errors import shown

_CHAT_TOOL = re.compile(r"\btools\[(\d+)\]")
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


@dataclass(slots=True)
class MessageTools:
    """A request's tools. `places` are those of the functions in the client's body; `left_out` are others' too."""

    functions: list[dict[str, object]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def own_names(self, text: str) -> str:
        """Return the text with the client's places in place of the chat's."""
        return _CHAT_TOOL.sub(self._place, text)

    def _place(self, found: re.Match[str]) -> str:
        index = int(found[1])
        return self.places[index] if index < len(self.places) else found[0]


def message_tools(raw: object) -> MessageTools:
    """Return the tools. Raises RequestError that names the place."""
    found = MessageTools()
    if not raw:
        return found
    if not isinstance(raw, list):
        raise RequestError(f"tools must be an array, got {shown(raw)}", param="tools")
    for index, each in enumerate(raw):
        where = f"tools[{index}]"
        if not isinstance(each, dict):
            raise RequestError(f"{where} must be an object, got {shown(each)}", param=where)
        kind = each.get("type")
        if isinstance(kind, str) and _HOSTED.fullmatch(kind):
            found.left_out.append(where)
            continue
        found.functions.append({"type": "function", "function": _function(each, where)})
        found.places.append(where)
    if found.left_out and not found.functions:
        raise _not_run(raw[0]["type"], found.left_out[0])
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
