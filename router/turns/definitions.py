"""A request's tools, checked: what they are, which of them may or must be called.

Tools become part of the prompt and what they say of their parameters decides how calls are read, so both are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import msgspec

from ...common.errors import RequestError
from ..state.errors import clip, shown
from .syntax import Schemas

MAX_TOOLS = 128  # OpenAI's limit
MAX_TOOLS_BYTES = 256 * 2**10  # as JSON: more than a prompt of 64k tokens
MAX_DEPTH = 24  # of a schema: a chat template takes values nested a little deeper
MAX_NAME_CHARS = 128  # Anthropic's limit; OpenAI's is 64
_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_NAME_CHARS}}}")
_NAMED = '{"type": "function", "function": {"name": ...}}'
_NAME_RULE = f"must be 1 to {MAX_NAME_CHARS} letters, digits, '_', '-' or '.'"

Choice = Literal["none", "auto", "required", "named"]


@dataclass(slots=True, frozen=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON schema of an object; empty: it takes anything."""

    name: str
    description: str | None
    parameters: Mapping[str, object]
    is_strict: bool = False

    def as_dict(self) -> dict[str, object]:
        """Return the tool as chat templates know it."""
        function: dict[str, object] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = dict(self.parameters) or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


@dataclass(slots=True, frozen=True)
class ToolUse:
    """The tools that a request's answer may call."""

    tools: tuple[Tool, ...] = ()
    choice: Choice = "none"
    allowed: frozenset[str] | None = None  # names of those that may be called; None: all
    is_parallel: bool = True  # several calls in one answer

    @property
    def is_forced(self) -> bool:
        """The answer must call, and says nothing else."""
        return self.choice in ("required", "named")

    @property
    def callable(self) -> tuple[Tool, ...]:
        return tuple(tool for tool in self.tools if self.allowed is None or tool.name in self.allowed)

    @property
    def is_bound(self) -> bool:
        """Calls must follow a grammar: there are tools that the model is told of and may not call, or strict ones."""
        return self.allowed is not None or any(tool.is_strict for tool in self.tools)

    @property
    def schemas(self) -> Schemas:
        return {tool.name: tool.parameters for tool in self.tools}

    @property
    def narrowed(self) -> Self:
        """The same where nothing keeps the model from a call: it is not told of what it may not call."""
        return replace(self, tools=self.callable, allowed=None)

    def told(self) -> list[dict[str, object]]:
        """Return what the model is told of: all, whichever may be called now, so that a chat's beginning stays."""
        return [tool.as_dict() for tool in self.tools]


def parse_tool_use(tools: object, choice: object, parallel: bool | None, ignored: list[str] | None = None) -> ToolUse:
    """Check the three fields of a chat's body. Raises RequestError that names the place and the rule.

    Unknown fields of tools are refused, unless a list takes their names.
    """
    known = _tools(tools, ignored)
    kind, allowed = _choice(choice, known)
    if kind == "none":
        return ToolUse()
    return ToolUse(known, kind, allowed, parallel is not False)


def _tools(raw: object, ignored: list[str] | None) -> tuple[Tool, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise invalid("tools", f"must be an array, got {shown(raw)}")
    if len(raw) > MAX_TOOLS:
        raise invalid("tools", f"has {len(raw)} tools; at most {MAX_TOOLS} are taken")
    tools = tuple(_tool(each, f"tools[{index}]", ignored) for index, each in enumerate(raw))
    size = len(msgspec.json.encode([tool.as_dict() for tool in tools]))
    if size > MAX_TOOLS_BYTES:
        raise invalid("tools", f"has {size} bytes; at most {MAX_TOOLS_BYTES} are taken")
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in seen:
            raise invalid(f"tools[{index}].function.name", f"{clip(tool.name)} is the name of another tool too")
        seen.add(tool.name)
    return tools


def _tool(raw: object, where: str, ignored: list[str] | None) -> Tool:
    if not isinstance(raw, dict):
        raise invalid(where, f"must be an object, got {shown(raw)}")
    if raw.get("type") != "function":
        seen = "is missing" if "type" not in raw else f"is {shown(raw['type'])}"
        raise RequestError(
            f"{where}.type {seen}; only tools of type 'function' are served",
            param=f"{where}.type",
            code="unsupported_value",
        )
    function = raw.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{where}.function", f"must be an object, got {shown(function)}")
    only(raw, {"type", "function"}, where, ignored)
    where += ".function"
    only(function, {"name", "description", "parameters", "strict"}, where, ignored)
    name, description, strict = function.get("name"), function.get("description"), function.get("strict")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise invalid(f"{where}.name", f"{_NAME_RULE}, got {shown(name)}")
    if description is not None and not isinstance(description, str):
        raise invalid(f"{where}.description", f"must be a string, got {shown(description)}")
    if strict is not None and not isinstance(strict, bool):
        raise invalid(f"{where}.strict", f"must be a bool, got {shown(strict)}")
    return Tool(name, description, _parameters(function.get("parameters"), f"{where}.parameters"), bool(strict))


def _parameters(raw: object, where: str) -> Mapping[str, object]:
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise invalid(where, f"must be a JSON schema of an object, got {shown(raw)}")
    if raw.get("type", "object") != "object":
        raise invalid(f"{where}.type", f"must be 'object', got {shown(raw['type'])}")
    properties = raw.get("properties")
    if properties is not None and not isinstance(properties, dict):
        raise invalid(f"{where}.properties", f"must be an object, got {shown(properties)}")
    _check_depth(raw, where, MAX_DEPTH)
    return raw


def _check_depth(value: object, where: str, room: int) -> None:
    if room < 0:
        raise invalid(where, f"is nested more than {MAX_DEPTH} deep")
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        _check_depth(child, where, room - 1)


def _choice(raw: object, tools: Sequence[Tool]) -> tuple[Choice, frozenset[str] | None]:
    match raw:
        case "none":
            return "none", None
        case None | "auto":
            return ("auto" if tools else "none"), None
        case "required" if tools:
            return "required", None
        case {"type": "function", "function": {"name": str(name), **more}, **others} if not more and not others:
            _check_known(name, tools, "tool_choice.function.name")
            return "named", frozenset({name})
        case {"type": "allowed_tools", "allowed_tools": dict(chosen), **others} if not others:
            return _allowed(chosen, tools)
        case "required":
            raise invalid("tool_choice", "'required' needs tools")
    forms = f'{{"type": "allowed_tools", "allowed_tools": {{...}}}} or {_NAMED}'
    raise invalid("tool_choice", f"must be 'none', 'auto', 'required', {forms}, got {shown(raw)}")


def _allowed(raw: Mapping[str, object], tools: Sequence[Tool]) -> tuple[Choice, frozenset[str]]:
    where = "tool_choice.allowed_tools"
    only(raw, {"mode", "tools"}, where)
    mode, named = raw.get("mode"), raw.get("tools")
    if mode != "auto" and mode != "required":
        raise invalid(f"{where}.mode", f"must be 'auto' or 'required', got {shown(mode)}")
    if not isinstance(named, list) or not 0 < len(named) <= MAX_TOOLS:
        raise invalid(f"{where}.tools", f"must be an array of 1 to {MAX_TOOLS} tools, got {shown(named)}")
    names: set[str] = set()
    for each in named:
        match each:  # beside its name a definition may have what `tools` says
            case {"type": "function", "function": {"name": str(name)}}:
                _check_known(name, tools, f"{where}.tools")
                names.add(name)
            case _:
                raise invalid(f"{where}.tools", f"must be an array of {_NAMED}, got {shown(each)} in it")
    return mode, frozenset(names)


def _check_known(name: str, tools: Sequence[Tool], where: str) -> None:
    if not any(tool.name == name for tool in tools):
        raise invalid(where, f"{clip(name)} is none of the request's tools")


def only(raw: Mapping[str, object], known: set[str], where: str, ignored: list[str] | None = None) -> None:
    """Refuse every other field, unless a list takes their names. Those that are null are not there."""
    for name, value in raw.items():
        if name not in known and value is not None:
            param = f"{where}.{name}"
            if ignored is not None:
                ignored.append(param)
                continue
            raise RequestError(f"unknown field {clip(param)}", param=param[:128], code="unknown_parameter")


def invalid(where: str, rule: str) -> RequestError:
    return RequestError(f"{where} {rule}", param=where, code="invalid_value")
