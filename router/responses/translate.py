"""A body of /v1/responses as a chat's body.

    instructions, earlier turns, input ─> messages      messages, function_call, function_call_output, reasoning
    tools, tool_choice, text, reasoning ─> the chat's fields of that meaning

What is checked here is what has no counterpart; the chat's own checks follow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ...common.errors import RequestError
from ..api.chat_messages import ROLES
from ..api.fields import not_supported, take_only, unknown_field
from ..api.surface import FieldNames
from ..state.errors import clip, shown

Message = dict[str, object]

_SAME = ("model", "stream", "temperature", "top_p", "user", "parallel_tool_calls", "cache_salt", "priority", "seed")
_IGNORED = frozenset(
    {
        *("metadata", "store", "safety_identifier", "service_tier", "stream_options"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    }
)
# Field -> the values (besides null) that ask for nothing.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "max_tool_calls": (),
    "moderation": (),
    "multi_agent": (),
    "prompt": (),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
_HARMLESS_INCLUDES = ("reasoning.encrypted_content",)  # nothing is encrypted here
_KNOWN = frozenset(
    {
        *(*_SAME, "input", "instructions", "tools", "tool_choice", "max_output_tokens"),
        *("text", "reasoning", "include", "previous_response_id"),
    }
)
FIELD_NAMES: FieldNames = (
    (re.compile(r"\btools\[(\d+)\]\.function\b"), r"tools[\1]"),
    (re.compile(r"\btool_choice\.function\.name\b"), "tool_choice.name"),
    (re.compile(r"\bresponse_format(?:\.json_schema)?\b"), "text.format"),
    (re.compile(r"\breasoning_effort\b"), "reasoning.effort"),
    (re.compile(r"\bmax_tokens asks\b"), "max_output_tokens asks"),
    (re.compile(r"'verbosity'"), "'text.verbosity'"),
    (re.compile(r"^verbosity$"), "text.verbosity"),
)
_TEXT = frozenset({"format", "verbosity"})
_REASONING = frozenset({"effort", "summary", "generate_summary"})  # what is asked of summaries changes nothing
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def chat_body(raw: Mapping[str, object], ignored: list[str] | None, earlier: Sequence[Message]) -> dict[str, object]:
    """Return the chat's body; `earlier` are the messages before this input. Raises RequestError."""
    _check_fields(raw, ignored)
    body: dict[str, object] = {name: raw[name] for name in _SAME if raw.get(name) is not None}
    instructions = raw.get("instructions")
    if instructions is not None and not isinstance(instructions, str):
        raise RequestError(f"instructions must be a string, got {shown(instructions)}", param="instructions")
    system: list[Message] = [{"role": "system", "content": instructions}] if instructions else []
    body["messages"] = messages = [*system, *earlier, *input_messages(raw.get("input"))]
    if not messages:
        raise RequestError("input must not be empty", param="input")
    if (limit := raw.get("max_output_tokens")) is not None:
        body["max_completion_tokens"] = _limit(limit)
    if raw.get("tools"):
        body["tools"] = _tools(raw["tools"])
    if raw.get("tool_choice") is not None:
        body["tool_choice"] = _choice(raw["tool_choice"])
    _take_text(raw.get("text"), body, ignored)
    _take_reasoning(raw.get("reasoning"), body, ignored)
    return body


def _limit(value: object) -> int:
    if type(value) is not int or value < 1:
        text = f"'max_output_tokens' should be a whole number of at least 1, got {shown(value)}"
        raise RequestError(text, param="max_output_tokens", code="invalid_value")
    return value


def _check_fields(raw: Mapping[str, object], ignored: list[str] | None) -> None:
    for name, value in raw.items():
        if name in _UNSUPPORTED:
            if value is not None and value not in _UNSUPPORTED[name]:
                raise not_supported(name, _UNSUPPORTED[name])
        elif name not in _KNOWN and name not in _IGNORED:
            if ignored is None:
                raise unknown_field(name, _KNOWN)
            ignored.append(name)
    include = raw.get("include")
    if include is not None and not (isinstance(include, list) and all(map(_HARMLESS_INCLUDES.__contains__, include))):
        raise not_supported("include")


def input_messages(raw: object) -> list[Message]:
    """Return the input as messages: a call joins the assistant's message that it follows."""
    if isinstance(raw, str):
        return [{"role": "user", "content": raw}]
    if not isinstance(raw, list):
        raise RequestError(f"input must be a string or an array of items, got {shown(raw)}", param="input")
    messages: list[Message] = []
    for index, each in enumerate(raw):
        _add_item(messages, each, f"input[{index}]")
    return messages


def _add_item(messages: list[Message], raw: object, where: str) -> None:
    if not isinstance(raw, dict):
        raise RequestError(f"{where} must be an object, got {shown(raw)}", param=where)
    match raw.get("type", "message"):
        case "message":
            if (role := raw.get("role")) not in ROLES:
                rule = f"must be one of {', '.join(ROLES)}"
                raise RequestError(f"{where}.role {rule}, got {shown(role)}", param=f"{where}.role")
            text = _text(raw.get("content"), f"{where}.content")
            if role == "assistant":
                message = _assistant(messages, is_new_text=True)
                message["content"] = text
            else:
                messages.append({"role": role, "content": text})
        case "function_call":
            _check_call(raw, where)
            function = {"name": raw["name"], "arguments": raw.get("arguments")}
            calls = _assistant(messages).setdefault("tool_calls", [])
            assert isinstance(calls, list)
            calls.append({"id": raw.get("call_id"), "type": "function", "function": function})
        case "function_call_output":
            _check_call_id(raw, where)
            text = _text(raw.get("output"), f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": raw.get("call_id"), "content": text})
        case "reasoning":
            text = "".join(_text(raw[name], f"{where}.{name}") for name in ("summary", "content") if raw.get(name))
            if text:
                message = _assistant(messages, is_new_text=True)
                before = message.get("reasoning_content")
                message["reasoning_content"] = f"{before}\n{text}" if before else text
        case kind:
            raise RequestError(
                f"{where}: items of type {shown(kind)} are not supported", param=where, code="unsupported_content"
            )


def _check_call(raw: Mapping[str, object], where: str) -> None:
    """Refuse by its own names what the chat would refuse by others."""
    name, arguments = raw.get("name"), raw.get("arguments")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where}.name must be the name of a function, got {shown(name)}", param=f"{where}.name")
    if not isinstance(arguments, str | dict | None):
        raise RequestError(f"{where}.arguments must be a string, got {shown(arguments)}", param=f"{where}.arguments")
    _check_call_id(raw, where)


def _check_call_id(raw: Mapping[str, object], where: str) -> None:
    call_id = raw.get("call_id")
    if call_id is not None and not (isinstance(call_id, str) and call_id):
        raise RequestError(f"{where}.call_id must be a string, got {shown(call_id)}", param=f"{where}.call_id")


def _assistant(messages: list[Message], *, is_new_text: bool = False) -> Message:
    """Return the assistant's message that goes on; a new one after others', or where its text is there already."""
    last = messages[-1] if messages else None
    if last is None or last["role"] != "assistant" or (is_new_text and (last["content"] or "tool_calls" in last)):
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _text(raw: object, where: str) -> str:
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, list):
        raise RequestError(f"{where} must be a string or an array of text parts", param=where)
    texts = []
    for at, part in enumerate(raw):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "refusal":
            texts.append(str(part.get("refusal", "")))
        elif kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            seen = clip(kind) if isinstance(kind, str) else shown(part)
            raise RequestError(
                f"{where}[{at}]: content of type {seen} is not supported, only text",
                param=f"{where}[{at}]",
                code="unsupported_content",
            )
    return "".join(texts)


def _tools(raw: object) -> list[object]:
    if not isinstance(raw, list):
        raise RequestError(f"tools must be an array, got {shown(raw)}", param="tools")
    tools: list[object] = []
    for index, each in enumerate(raw):
        if not isinstance(each, dict):
            raise RequestError(f"tools[{index}] must be an object, got {shown(each)}", param=f"tools[{index}]")
        function = {name: value for name, value in each.items() if name not in ("type", "defer_loading")}
        tools.append({"type": each.get("type"), "function": function})
    return tools


def _choice(raw: object) -> object:
    if isinstance(raw, dict) and raw.get("type") == "function":
        return {"type": "function", "function": {"name": raw.get("name")}}
    return raw


def _take_text(raw: object, body: dict[str, object], ignored: list[str] | None) -> None:
    if raw is None:
        return
    if not isinstance(raw, dict):
        raise RequestError(f"text must be an object, got {shown(raw)}", param="text")
    take_only(raw.keys(), _TEXT, "text", ignored)
    if raw.get("format") is not None:
        body["response_format"] = _format(raw["format"])
    if raw.get("verbosity") is not None:
        body["verbosity"] = raw["verbosity"]


def _format(raw: object) -> object:
    """Return a format as chats have it: a schema's fields stand in an object of their own there."""
    if not isinstance(raw, dict) or raw.get("type") != "json_schema":
        return raw
    return {"type": "json_schema", "json_schema": {name: value for name, value in raw.items() if name != "type"}}


def _take_reasoning(raw: object, body: dict[str, object], ignored: list[str] | None) -> None:
    if raw is None:
        return
    if not isinstance(raw, dict):
        raise RequestError(f"reasoning must be an object, got {shown(raw)}", param="reasoning")
    take_only(raw.keys(), _REASONING, "reasoning", ignored)
    if raw.get("effort") is not None:
        body["reasoning_effort"] = raw["effort"]
