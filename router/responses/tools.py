"""The tools of /v1/responses as a chat's functions, and their names in both directions.

function                  ─> a function of that name
namespace with functions  ─> functions NAMESPACE__NAME; calls of them have both names again
what OpenAI itself runs   ─> left out where there are functions beside it: the model may not call what nobody runs here
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ...common.errors import RequestError
from ..state.errors import shown
from ..turns.definitions import MAX_NAME_CHARS

_CHAT_TOOL = re.compile(r"\btools\[(\d+)\](?:\.function\b)?")
# Agents offer these with every request, whoever answers it.
_HOSTED = frozenset({"web_search", "web_search_preview", "image_generation"})
_UNTOLD = frozenset({"type", "defer_loading"})  # fields of a function: all of them are loaded

Names = dict[str, tuple[str, str]]  # a function's -> its namespace and name there


@dataclass(slots=True)
class ResponseTools:
    """A request's tools. `places` are those of the functions in the client's body."""

    functions: list[dict[str, object]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    names: Names = field(default_factory=dict)

    def named(self, name: str) -> dict[str, str]:
        """Return a called function's name as the client knows it."""
        return own_name(self.names, name)

    def own_names(self, text: str) -> str:
        """Return the text with the client's places in place of the chat's."""
        return _CHAT_TOOL.sub(self._place, text)

    def _place(self, found: re.Match[str]) -> str:
        index = int(found[1])
        return self.places[index] if index < len(self.places) else found[0]


def own_name(names: Mapping[str, tuple[str, str]], name: str) -> dict[str, str]:
    """Return a function's name as the client knows it."""
    if name not in names:
        return {"name": name}
    namespace, own = names[name]
    return {"name": own, "namespace": namespace}


def told_name(namespace: object, name: object) -> object:
    """Return what the model is told that a namespace's function is called: by its own name where both are too long."""
    if not isinstance(namespace, str) or not isinstance(name, str):
        return name
    joined = f"{namespace.rstrip('_')}__{name.lstrip('_')}"
    return joined if len(joined) <= MAX_NAME_CHARS else name


def names_of_calls(items: object) -> Names:
    """Return the names of the namespaces' functions that are called in an input."""
    found: Names = {}
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and item.get("type") == "function_call":
            told, own = told_name(item.get("namespace"), item.get("name")), item.get("name")
            if isinstance(told, str) and isinstance(own, str) and isinstance(item.get("namespace"), str):
                found[told] = (item["namespace"], own)
    return found


def response_tools(raw: object) -> ResponseTools:
    """Return the tools. Raises RequestError that names the place."""
    found = ResponseTools()
    if not raw:
        return found
    if not isinstance(raw, list):
        raise RequestError(f"tools must be an array, got {shown(raw)}", param="tools")
    for place, tool, namespace in _flat(raw):
        if namespace is None and is_hosted(tool):
            found.left_out.append(place)
            continue
        function = {name: value for name, value in tool.items() if name not in _UNTOLD}
        if namespace is not None:
            function["name"] = told = told_name(namespace, tool.get("name"))
            if isinstance(told, str):
                found.names[told] = (namespace, str(tool["name"]))
        found.functions.append({"type": tool.get("type"), "function": function})
        found.places.append(place)
    if not found.functions and found.left_out:
        kind = next(each["type"] for each in raw if is_hosted(each))
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
        if not isinstance(tools, list):
            raise RequestError(f"{place}.tools must be an array, got {shown(tools)}", param=f"{place}.tools")
        for inner, each in _placed(tools, f"{place}.tools"):
            yield inner, each, namespace


def _placed(raw: list[object], where: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    for index, each in enumerate(raw):
        if not isinstance(each, dict):
            raise RequestError(f"{where}[{index}] must be an object, got {shown(each)}", param=f"{where}[{index}]")
        yield f"{where}[{index}]", each


def is_hosted(tool: object) -> bool:
    """Tell whether it is a tool that OpenAI itself runs."""
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    return isinstance(kind, str) and kind in _HOSTED
