"""The tools of /v1/responses as a chat's functions, and their names in both directions.

function                  ─> a function of that name
custom                    ─> a function of one text; calls of it have the text itself
namespace with functions  ─> functions NAMESPACE__NAME; calls of them have both names again
what OpenAI itself runs   ─> left out where there are functions beside it: the model may not call what nobody runs here
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import msgspec

from ...common.errors import RequestError
from ..bodies.fields import checked_array, checked_object
from ..state.errors import shown
from ..turns.definitions import MAX_NAME_CHARS
from ..turns.places import PlacedTools
from .custom import custom_function, input_of

# Agents offer these with every request, whoever answers it.
_HOSTED = re.compile(
    r"(?:web_search|web_search_preview)(?:_\d{4}_\d{2}_\d{2})?|tool_search|file_search|code_interpreter|image_generation"
    r"|mcp|computer|computer_use_preview|local_shell|shell|apply_patch"
)
_UNTOLD = frozenset({"type", "defer_loading"})  # fields of a function: all of them are loaded


class OwnName(msgspec.Struct, array_like=True, frozen=True):
    """A function's name as the client knows it, and what it is there. An array where conversations are kept."""

    namespace: str | None
    name: str
    is_custom: bool = False


Names = dict[str, OwnName]  # by what the model is told


@dataclass(slots=True)
class ResponseTools(PlacedTools):
    """A request's tools, with their names."""

    names: Names = field(default_factory=dict)

    _in_chat: ClassVar[re.Pattern[str]] = re.compile(r"\btools\[(\d+)\](?:\.function\b)?")

    def own(self, name: str) -> OwnName:
        """Return a called function's name as the client knows it."""
        return _own(self.names, name)

    def is_custom(self, name: str) -> bool:
        return self.own(name).is_custom


def _own(names: Names, name: str) -> OwnName:
    return names.get(name) or OwnName(None, name)


def called(names: Names, call_id: object, name: str, arguments: str) -> dict[str, object]:
    """Return a call as an item tells it, in the client's names."""
    own = _own(names, name)
    namespace = {} if own.namespace is None else {"namespace": own.namespace}
    item = {"call_id": call_id, "name": own.name, **namespace}
    if own.is_custom:
        return {"type": "custom_tool_call", **item, "input": input_of(arguments)}
    return {"type": "function_call", **item, "arguments": arguments}


def told_name(namespace: object, name: object) -> object:
    """Return what the model is told that a namespace's function is called: by its own name where both are too long."""
    if not isinstance(namespace, str) or not isinstance(name, str):
        return name
    joined = f"{namespace.rstrip('_')}__{name.lstrip('_')}"
    return joined if len(joined) <= MAX_NAME_CHARS else name


def names_of_calls(items: object) -> Names:
    """Return the names of what is called in an input: of namespaces' functions, and of custom tools."""
    found: Names = {}
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and item.get("type") in ("function_call", "custom_tool_call"):
            add_name(found, item.get("namespace"), item.get("name"), is_custom=item["type"] == "custom_tool_call")
    return found


def add_name(names: Names, namespace: object, name: object, *, is_custom: bool) -> object:
    """Return what the model is told that it is called, and keep how the client knows it, where that is more."""
    told, own = told_name(namespace, name), namespace if isinstance(namespace, str) else None
    if isinstance(told, str) and isinstance(name, str) and (own is not None or is_custom):
        names[told] = OwnName(own, name, is_custom)
    return told


def response_tools(raw: object) -> ResponseTools:
    """Return the tools. Raises RequestError that names the place."""
    found = ResponseTools()
    if not raw:
        return found
    given = checked_array(raw, "tools")
    for place, tool, namespace in _flat(given):
        if namespace is None and is_hosted(tool):
            found.left_out.append(place)
            continue
        if is_custom := tool.get("type") == "custom":
            function = custom_function(tool, place, found.left_out)
        else:
            function = {name: value for name, value in tool.items() if name not in _UNTOLD}
        function["name"] = add_name(found.names, namespace, tool.get("name"), is_custom=is_custom)
        found.functions.append({"type": "function" if is_custom else tool.get("type"), "function": function})
        found.places.append(place)
    if not found.functions and found.left_out:
        kind = next(tool["type"] for _, tool in _placed(given, "tools") if is_hosted(tool))
        raise RequestError(
            f"{found.left_out[0]}.type is {shown(kind)}; such tools run at no server of this kind",
            param=f"{found.left_out[0]}.type",
            code="unsupported_value",
        )
    return found


def _flat(raw: list[object]) -> Iterator[tuple[str, Mapping[str, object], str | None]]:
    """Yield each tool's place, itself and its namespace."""
    for place, tool in _placed(raw, "tools"):
        if tool.get("type") != "namespace":
            yield place, tool, None
            continue
        namespace, tools = tool.get("name"), tool.get("tools")
        if not isinstance(namespace, str) or not namespace:
            raise RequestError(f"{place}.name must be a string, got {shown(namespace)}", param=f"{place}.name")
        for inner, each in _placed(checked_array(tools, f"{place}.tools"), f"{place}.tools"):
            yield inner, each, namespace


def _placed(raw: list[object], where: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    for index, each in enumerate(raw):
        place = f"{where}[{index}]"
        yield place, checked_object(each, place)


def is_hosted(tool: object) -> bool:
    """Tell whether it is a tool that OpenAI itself runs."""
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    return isinstance(kind, str) and _HOSTED.fullmatch(kind) is not None
