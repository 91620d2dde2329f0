"""A body of /v1/messages as a chat's body.

    system, messages with blocks ─> messages    text, tool_use, tool_result, thinking; others are refused by name
    tools, tool_choice, stop_sequences ─> the chat's fields of that meaning
    a last message of the assistant    ─> the beginning of the answer, which goes on with it

What is checked here is what has no counterpart; the chat's own checks follow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from ...common.errors import RequestError
from ..api.fields import not_supported, take_only, unknown_field
from ..api.surface import FieldNames
from ..api.values import MAX_STOP_CHARS, MAX_STOPS
from ..state.errors import clip, shown

_SAME = ("model", "stream", "temperature", "top_p", "top_k", "max_tokens", "cache_salt", "priority")
# Labels, and hints to a cache that is always on.
_IGNORED = frozenset(
    {
        *("service_tier", "cache_control", "betas", "inference_geo", "speed", "diagnostics"),
        *("billing_policy", "user_profile_id", "workspace_id"),
    }
)
_UNSUPPORTED = frozenset(
    {
        *("container", "context_management", "mcp_servers", "fallbacks", "fallback_credit_token"),
        *("compaction", "thread"),
    }
)
_KNOWN = frozenset(
    {
        *(*_SAME, "messages", "system", "stop_sequences", "tools", "tool_choice", "metadata", "thinking"),
        *("output_config", "output_format"),
    }
)
FIELD_NAMES: FieldNames = (
    (re.compile(r"\btools\[(\d+)\]\.function\.parameters\b"), r"tools[\1].input_schema"),
    (re.compile(r"\btools\[(\d+)\]\.function\b"), r"tools[\1]"),
    (re.compile(r"\btool_choice\.function\.name\b"), "tool_choice.name"),
    (re.compile(r"\bresponse_format\.json_schema\.schema\b"), "output_config.format.schema"),
    (re.compile(r"\bresponse_format\b"), "output_config.format"),
    (re.compile(r"\breasoning_effort\b"), "output_config.effort"),
)
_THINKING = {"enabled": "medium", "adaptive": "medium", "disabled": "none"}  # as efforts


def chat_body(raw: Mapping[str, object], ignored: list[str] | None, *, needs_max_tokens: bool) -> dict[str, object]:
    """Return the chat's body. Raises RequestError that names the field."""
    _check_fields(raw, ignored)
    if needs_max_tokens and raw.get("max_tokens") is None:
        raise RequestError("'max_tokens' is required", param="max_tokens", code="missing_required_parameter")
    body: dict[str, object] = {name: raw[name] for name in _SAME if raw.get(name) is not None}
    messages = body["messages"] = [*_system(raw.get("system")), *_messages(raw.get("messages"), ignored)]
    last = messages[-1]
    if last["role"] == "assistant" and last["content"] and "tool_calls" not in last:
        body["continue_final_message"] = True
    if raw.get("stop_sequences"):
        body["stop"] = _sequences(raw["stop_sequences"])
    if raw.get("tools"):
        body["tools"] = _tools(raw["tools"])
    _take_choice(raw.get("tool_choice"), body)
    output_config = _output_config(raw.get("output_config"))
    output_format = raw.get("output_format") or output_config.get("format")
    if output_format is not None:
        body["response_format"] = _format(output_format)
    effort = _effort(raw.get("thinking"), output_config)
    if effort is not None:
        body["reasoning_effort"] = effort
    metadata = raw.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("user_id"), str):
        body["user"] = metadata["user_id"]
    return body


def _check_fields(raw: Mapping[str, object], ignored: list[str] | None) -> None:
    for name, value in raw.items():
        if name in _UNSUPPORTED:
            if value:
                raise not_supported(name)
        elif name not in _KNOWN and name not in _IGNORED:
            if ignored is None:
                raise unknown_field(name, _KNOWN)
            ignored.append(name)


def _sequences(raw: object) -> object:
    if not isinstance(raw, list) or len(raw) > MAX_STOPS or not all(_is_stop(each) for each in raw):
        rule = f"must be an array of at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters"
        raise RequestError(f"stop_sequences {rule}, got {shown(raw)}", param="stop_sequences", code="invalid_value")
    return raw


def _is_stop(value: object) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= MAX_STOP_CHARS


def _system(raw: object) -> list[dict[str, object]]:
    if raw is None or raw in ("", []):
        return []
    return [{"role": "system", "content": _text(raw, "system")}]


def _messages(raw: object, ignored: list[str] | None) -> list[dict[str, object]]:
    if not isinstance(raw, list) or not raw:
        raise RequestError("messages must be an array that is not empty", param="messages")
    messages: list[dict[str, object]] = []
    for index, each in enumerate(raw):
        messages += _message(each, f"messages[{index}]", ignored)
    return messages


def _message(raw: object, where: str, ignored: list[str] | None) -> list[dict[str, object]]:
    if not isinstance(raw, dict):
        raise RequestError(f"{where} must be an object, got {shown(raw)}", param=where)
    take_only(raw.keys(), frozenset({"role", "content"}), where, ignored)
    role, content = raw.get("role"), raw.get("content")
    if role not in ("user", "assistant", "system"):
        raise RequestError(f"{where}.role must be 'user' or 'assistant', got {shown(role)}", param=f"{where}.role")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise RequestError(f"{where}.content must be a string or an array of blocks", param=f"{where}.content")
    blocks = [_block(each, f"{where}.content[{at}]") for at, each in enumerate(content)]
    return _assistant(blocks, where) if role == "assistant" else _user(str(role), blocks, where)


def _assistant(blocks: list[tuple[str, dict[str, object]]], where: str) -> list[dict[str, object]]:
    message: dict[str, object] = {"role": "assistant", "content": ""}
    calls: list[dict[str, object]] = []
    for at, (kind, block) in enumerate(blocks):
        match kind:
            case "text":
                message["content"] = f"{message['content']}{block['text']}"
            case "thinking":
                message["reasoning_content"] = f"{message.get('reasoning_content', '')}{block.get('thinking', '')}"
            case "tool_use":
                function = {"name": block.get("name"), "arguments": block.get("input")}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case "redacted_thinking":
                pass
            case _:
                raise _no_block(kind, f"{where}.content[{at}]")
    return [{**message, "tool_calls": calls}] if calls else [message]


def _user(role: str, blocks: list[tuple[str, dict[str, object]]], where: str) -> list[dict[str, object]]:
    messages: list[dict[str, object]] = []
    texts: list[str] = []
    for at, (kind, block) in enumerate(blocks):
        match kind:
            case "text":
                texts.append(str(block["text"]))
            case "tool_result":
                content = block.get("content")
                text = "" if content is None else _text(content, f"{where}.content[{at}].content")
                messages.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
            case _:
                raise _no_block(kind, f"{where}.content[{at}]")
    if texts or not messages:
        messages.append({"role": role, "content": "\n".join(texts)})
    return messages


def _block(raw: object, where: str) -> tuple[str, dict[str, object]]:
    if not isinstance(raw, dict) or not isinstance(kind := raw.get("type"), str):
        raise RequestError(f"{where} must be an object with a type", param=where)
    if kind == "text" and not isinstance(raw.get("text"), str):
        raise RequestError(f"{where}.text must be a string", param=f"{where}.text")
    return kind, raw


def _text(raw: object, where: str) -> str:
    """Return a string, or text blocks as one."""
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, list):
        raise RequestError(f"{where} must be a string or an array of text blocks", param=where)
    texts = []
    for at, each in enumerate(raw):
        kind, block = _block(each, f"{where}[{at}]")
        if kind != "text":
            raise _no_block(kind, f"{where}[{at}]")
        texts.append(str(block["text"]))
    return "\n".join(texts)


def _no_block(kind: str, where: str) -> RequestError:
    return RequestError(
        f"{where}: blocks of type {clip(kind)} are not supported here", param=where, code="unsupported_content"
    )


def _tools(raw: object) -> list[object]:
    if not isinstance(raw, list):
        raise RequestError(f"tools must be an array, got {shown(raw)}", param="tools")
    return [_tool(each, f"tools[{index}]") for index, each in enumerate(raw)]


def _tool(raw: object, where: str) -> object:
    if not isinstance(raw, dict):
        raise RequestError(f"{where} must be an object, got {shown(raw)}", param=where)
    if raw.get("type", "custom") not in ("custom", None):
        raise RequestError(
            f"{where}: tools of type {shown(raw['type'])} run at no server of this kind",
            param=f"{where}.type",
            code="unsupported_value",
        )
    if not isinstance(raw.get("input_schema"), dict):
        raise RequestError(f"{where}.input_schema must be an object", param=f"{where}.input_schema")
    function: dict[str, object] = {"name": raw.get("name"), "parameters": raw["input_schema"]}
    function |= {name: raw[name] for name in ("description", "strict") if raw.get(name) is not None}
    return {"type": "function", "function": function}


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
            body["tool_choice"] = {"type": "function", "function": {"name": raw.get("name")}}
        case _:
            rule = "must be an object whose type is auto, any, tool or none"
            raise RequestError(f"tool_choice {rule}, got {shown(raw)}", param="tool_choice", code="invalid_value")
    assert isinstance(raw, dict)
    if raw.get("disable_parallel_tool_use"):
        body["parallel_tool_calls"] = False


def _format(raw: object) -> object:
    """Return a format as chats have it."""
    if not isinstance(raw, dict) or raw.get("type") != "json_schema" or raw.keys() - {"type", "schema"}:
        rule = "must be an object of type json_schema with a schema"
        raise RequestError(f"output_config.format {rule}, got {shown(raw)}", param="output_config.format")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": raw.get("schema")}}


def _output_config(raw: object) -> Mapping[str, object]:
    if raw is None:
        return {}
    if isinstance(raw, dict) and raw.keys() <= {"effort", "format"}:
        return raw
    raise not_supported("output_config")


def _effort(thinking: object, output_config: Mapping[str, object]) -> object:
    effort = output_config.get("effort")
    if effort is not None:
        return "xhigh" if effort == "max" else effort
    if thinking is None:
        return None
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if not isinstance(kind, str) or kind not in _THINKING:
        raise RequestError(
            f"thinking must be an object whose type is enabled, adaptive or disabled, got {shown(thinking)}",
            param="thinking",
            code="invalid_value",
        )
    return _THINKING[kind]


def input_of(arguments: str) -> dict[str, object]:
    """Return a call's arguments as the object that clients expect; what is none stands in one field."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"arguments": arguments}
