"""A body of /v1/messages as a chat's body.

    system, messages with blocks ─> messages    text, documents of text, tool_use, tool_result, thinking
    tools, tool_choice, stop_sequences ─> the chat's fields of that meaning
    a last message of the assistant    ─> the beginning of the answer, which goes on with it

What is checked here is what has no counterpart; the chat's own checks follow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import get_args

import msgspec

from ...common.errors import RequestError
from ..api.surface import FieldNames
from ..bodies.fields import UNSUPPORTED_EVERYWHERE, check_fields, known_object, take_only, whole
from ..bodies.values import MAX_STOP_CHARS, MAX_STOPS, Effort
from ..state.errors import shown
from ..turns.places import PlacedTools, Places
from ..turns.values.json_text import loads
from .blocks import CALL_NAMES, chat_messages, system_messages
from .context import edit_context

_SAME = (
    *("model", "stream", "temperature", "top_p", "top_k", "max_tokens"),
    *("cache_salt", "priority", "chat_template_kwargs"),  # vLLM's
)
# Labels, and hints to a cache that is always on.
_IGNORED = frozenset(
    {
        *("service_tier", "cache_control", "betas", "inference_geo", "speed", "diagnostics"),
        *("billing_policy", "user_profile_id", "workspace_id"),
        *("request_id", "session_id"),  # vLLM's, on its other surfaces
    }
)
# Field -> the values (besides null) that ask for nothing.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    **UNSUPPORTED_EVERYWHERE,
    "compaction": ({},),
    "container": (),
    "fallback_credit_token": (),
    "fallbacks": ([],),
    "mcp_servers": ([],),
}
_KNOWN = frozenset(
    {
        *(*_SAME, "messages", "system", "stop_sequences", "tools", "tool_choice", "metadata", "thinking"),
        *("output_config", "output_format", "context_management", "thread"),
    }
)
FIELD_NAMES: FieldNames = (
    (re.compile(r"\btools\[(\d+)\]\.function\.parameters\b"), r"tools[\1].input_schema"),
    (re.compile(r"\btools\[(\d+)\]\.function\b"), r"tools[\1]"),
    (re.compile(r"\btool_choice\.function\.name\b"), "tool_choice.name"),
    (re.compile(r"\btool_choice 'required'"), "tool_choice 'any'"),
    (re.compile(r"\bresponse_format\.json_schema\.schema\b"), "output_config.format.schema"),
    (re.compile(r"\bresponse_format\b"), "output_config.format"),
    (re.compile(r"\breasoning_effort\b"), "output_config.effort"),
    (re.compile(r"\bthinking_token_budget\b"), "thinking.budget_tokens"),
)
NO_THREADS = "thread_unsupported_request"  # Anthropic's: its libraries then send the whole conversation
# As efforts. Between tools, notes alone may be shown as thoughts: the model does not think.
_THINKING = {"enabled": "medium", "adaptive": "medium", "between_tools": "none", "disabled": "none"}
_EFFORTS = (*get_args(Effort), "max")
_OF_OUTPUT = frozenset({"effort", "format", "task_budget"})  # what a budget says is advice
_OF_THINKING = frozenset({"type", "budget_tokens", "display"})  # thoughts are shown, whatever is said of it


def chat_body(
    raw: Mapping[str, object], ignored: list[str] | None, tools: PlacedTools, *, needs_max_tokens: bool
) -> tuple[dict[str, object], Places]:
    """Return the chat's body, and where its messages stand in this one. Raises RequestError that names the field."""
    check_fields(raw, _KNOWN, ignored, unsupported=_UNSUPPORTED, labels=_IGNORED)
    if needs_max_tokens and raw.get("max_tokens") is None:
        raise RequestError("'max_tokens' is required", param="max_tokens", code="missing_required_parameter")
    if raw.get("thread"):
        raise RequestError("'thread' is not supported by this server", param="thread", code=NO_THREADS)
    body: dict[str, object] = {name: raw[name] for name in _SAME if raw.get(name) is not None}
    placed = [*system_messages(raw.get("system")), *chat_messages(raw.get("messages"), ignored, tools.left_out)]
    edit_context(raw.get("context_management"), placed, ignored, tools.left_out)
    body["messages"] = [each.message for each in placed]
    last = placed[-1].message
    if last["role"] == "assistant" and last["content"] and "tool_calls" not in last:
        body["continue_final_message"] = True
    if raw.get("stop_sequences"):
        body["stop"] = _sequences(raw["stop_sequences"])
    if tools.functions:
        body["tools"] = tools.functions
    _take_choice(raw.get("tool_choice"), body)
    output_config = _output_config(raw.get("output_config"), ignored)
    _take_format(raw.get("output_format"), output_config.get("format"), body, placed[-1].where)
    effort = _effort(raw.get("thinking"), output_config, ignored)
    if effort is not None:
        body["reasoning_effort"] = effort
    match raw.get("thinking"):
        case {"type": "enabled", "budget_tokens": budget} if budget is not None:
            body["thinking_token_budget"] = whole(budget)
    metadata = raw.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("user_id"), str):
        body["user"] = metadata["user_id"]
    return body, Places(placed, CALL_NAMES)


def _sequences(raw: object) -> object:
    if not isinstance(raw, list) or len(raw) > MAX_STOPS or not all(_is_stop(each) for each in raw):
        rule = f"must be an array of at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters"
        raise RequestError(f"stop_sequences {rule}, got {shown(raw)}", param="stop_sequences", code="invalid_value")
    return raw


def _is_stop(value: object) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= MAX_STOP_CHARS


def _take_choice(raw: object, body: dict[str, object]) -> None:
    if raw is None:
        return
    kind = raw.get("type") if isinstance(raw, dict) else None
    match kind:
        case "auto" | "none":
            body["tool_choice"] = kind
        case "any":
            body["tool_choice"] = "required"
        case "tool":
            assert isinstance(raw, dict)
            if not isinstance(raw.get("name"), str):
                text = f"tool_choice.name must be the name of a tool, got {shown(raw.get('name'))}"
                raise RequestError(text, param="tool_choice.name", code="invalid_value")
            body["tool_choice"] = {"type": "function", "function": {"name": raw["name"]}}
        case _:
            rule = "must be an object whose type is auto, any, tool or none"
            raise RequestError(f"tool_choice {rule}, got {shown(raw)}", param="tool_choice", code="invalid_value")
    assert isinstance(raw, dict)
    if raw.get("disable_parallel_tool_use"):
        body["parallel_tool_calls"] = False


def _take_format(older: object, newer: object, body: dict[str, object], last: str) -> None:
    """Take the format of an answer, by either name of the field. `last`: the place of the last message."""
    name, asked = ("output_format", older) if older else ("output_config.format", newer)
    if asked is None:
        return
    body["response_format"] = _format(asked)
    if body.get("continue_final_message"):  # the format is the whole answer's, and this one has begun without
        text = f"{name} goes with no assistant's text at the end ({last}), which the answer would go on"
        raise RequestError(f"{text}: leave out one of the two", param=name, code="invalid_value")


def _format(raw: object) -> object:
    """Return a format as chats have it."""
    if not isinstance(raw, dict) or raw.get("type") != "json_schema" or raw.keys() - {"type", "schema"}:
        rule = "must be an object of type json_schema with a schema"
        raise RequestError(f"output_config.format {rule}, got {shown(raw)}", param="output_config.format")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": raw.get("schema")}}


def _output_config(raw: object, ignored: list[str] | None) -> Mapping[str, object]:
    return {} if raw is None else known_object(raw, _OF_OUTPUT, "output_config", ignored)


def _effort(thinking: object, output_config: Mapping[str, object], ignored: list[str] | None) -> object:
    asked = None if thinking is None else _thinking(thinking, ignored)
    effort = output_config.get("effort")
    is_off = asked == _THINKING["disabled"] and effort in _EFFORTS  # an effort is about the answer as well
    if effort is None or is_off:
        return asked
    return effort


def _thinking(thinking: object, ignored: list[str] | None) -> str:
    """Return the effort that is asked for."""
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if not isinstance(thinking, dict) or not isinstance(kind, str) or kind not in _THINKING:
        raise RequestError(
            f"thinking must be an object whose type is one of {', '.join(_THINKING)}, got {shown(thinking)}",
            param="thinking",
            code="invalid_value",
        )
    take_only(thinking, _OF_THINKING, "thinking", ignored)
    budget = whole(thinking.get("budget_tokens"))
    if budget is not None and (type(budget) is not int or budget < 1):
        rule = "must be a whole number of at least 1"
        raise RequestError(f"thinking.budget_tokens {rule}, got {shown(budget)}", param="thinking.budget_tokens")
    return _THINKING[kind]


def input_of(arguments: str) -> msgspec.Raw:
    """Return a call's arguments as the object that clients expect; what is none stands in one field."""
    found = loads(arguments)
    shown = found if isinstance(found, dict) else {"arguments": arguments}
    return msgspec.Raw(json.dumps(shown, ensure_ascii=False).encode())
