"""A body of /v1/responses as a chat's body.

    instructions, earlier turns, input ─> messages      messages, calls, their outputs, reasoning
    tools, tool_choice, text, reasoning ─> the chat's fields of that meaning

What is checked here is what has no counterpart; the chat's own checks follow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from ...common.errors import RequestError
from ..api.surface import FieldNames
from ..bodies.fields import UNSUPPORTED_EVERYWHERE, check_fields, checked_string, known_object, not_supported, whole
from ..kept.metadata import checked_metadata
from ..state.errors import shown
from ..turns.places import Message, PlacedMessage, Places
from .items import CALL_NAMES, input_messages
from .tools import ResponseTools, is_hosted

_SAME = (
    *("model", "stream", "temperature", "top_p", "user", "parallel_tool_calls"),
    # vLLM's
    *("cache_salt", "priority", "seed", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "logit_bias", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos"),
    *("skip_special_tokens", "structured_outputs", "chat_template_kwargs", "include_reasoning"),
)
_IGNORED = frozenset(
    {
        *("metadata", "store", "safety_identifier", "service_tier", "stream_options"),
        *("client_metadata",),  # Codex's
        *("request_id", "session_id"),  # vLLM's
        *("max_tool_calls",),  # of built-in tools, which there are not
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    }
)
# Field -> the values (besides null) that ask for nothing.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    **UNSUPPORTED_EVERYWHERE,
    "access_programs": (),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "enable_response_messages": (False,),
    "image": (),
    "moderation": (),
    "multi_agent": (),
    "previous_input_messages": ([],),
    "prompt": (),
    "truncation": ("auto", "disabled"),  # nothing is cut: what does not fit is refused
}
_LOGPROBS = "message.output_text.logprobs"
_HARMLESS_INCLUDES = ("reasoning.encrypted_content", "message.input_image.image_url")  # of what is never there
_OF_LEFT_OUT = (  # of tools that the model is not told of
    *("web_search_call.action.sources", "web_search_call.results", "file_search_call.results"),
    *("code_interpreter_call.outputs", "computer_call_output.output.image_url"),
)
_KNOWN = frozenset(
    {
        *(*_SAME, "input", "instructions", "tools", "tool_choice", "max_output_tokens"),
        *("text", "reasoning", "include", "previous_response_id", "top_logprobs", "background"),
    }
)
FIELD_NAMES: FieldNames = (
    (re.compile(r"\btool_choice\.function\.name\b"), "tool_choice.name"),
    (re.compile(r"\btool_choice\.allowed_tools\b"), "tool_choice"),
    (re.compile(r'"function": \{"name": \.\.\.\}'), '"name": ...'),
    (re.compile(r'"allowed_tools": \{\.\.\.\}'), '"mode": ..., "tools": [...]'),
    (re.compile(r"\bresponse_format(?:\.json_schema)?\b"), "text.format"),
    (re.compile(r"\breasoning_effort\b"), "reasoning.effort"),
    (re.compile(r"\bmax_tokens asks\b"), "max_output_tokens asks"),
    (re.compile(r"^messages$"), "input"),
    (re.compile(r"'verbosity'"), "'text.verbosity'"),
    (re.compile(r"^verbosity$"), "text.verbosity"),
)
_UNTOLD = ("user", "service_tier", "reasoning", "tool_choice")
_MAX_UNTOLD_BYTES = 2**16
_TEXT = frozenset({"format", "verbosity"})
# What is asked of summaries and of other servers' ways changes nothing.
_REASONING = frozenset({"effort", "summary", "generate_summary", "context", "mode"})


def chat_body(
    raw: Mapping[str, object], ignored: list[str] | None, earlier: Sequence[Message], tools: ResponseTools
) -> tuple[dict[str, object], Places]:
    """Return the chat's body, and where its messages stand in this one; `earlier` are those before this input.

    Raises RequestError.
    """
    check_fields(raw, _KNOWN, ignored, unsupported=_UNSUPPORTED, labels=_IGNORED)
    checked_metadata(raw.get("metadata"))
    _check_untold(raw, tools)
    includes = _includes(raw.get("include"), tools.left_out)
    body: dict[str, object] = {name: raw[name] for name in _SAME if raw.get(name) is not None}
    instructions = raw.get("instructions")
    if instructions is not None:
        checked_string(instructions, "instructions")
    placed = [PlacedMessage(message, "previous_response_id") for message in earlier]
    placed += input_messages(raw.get("input"), tools.left_out)
    if instructions:
        placed.insert(0, PlacedMessage({"role": "system", "content": instructions}, "instructions", {"content": ""}))
    body["messages"] = [each.message for each in placed]
    if not placed:
        raise RequestError("input must not be empty", param="input")
    if (limit := raw.get("max_output_tokens")) is not None:
        body["max_completion_tokens"] = _limit(limit)
    if tools.functions:
        body["tools"] = tools.functions
    if raw.get("tool_choice") is not None:
        body["tool_choice"] = _choice(raw["tool_choice"], tools.left_out)
    if _LOGPROBS in includes or raw.get("top_logprobs") not in (None, 0):
        body |= {"logprobs": True, "top_logprobs": raw.get("top_logprobs")}
    _take_text(raw.get("text"), body, ignored)
    _take_reasoning(raw.get("reasoning"), body, ignored)
    return body, Places(placed, CALL_NAMES)


def _check_untold(raw: Mapping[str, object], tools: ResponseTools) -> None:
    """Refuse much that no model is told of: it costs its client nothing, and is kept with each response."""
    encode = msgspec.json.encode
    sizes = {name: len(encode(raw.get(name))) for name in _UNTOLD}
    sizes["tools"] = len(encode(raw.get("tools"))) - len(encode(tools.functions))
    for name, size in sizes.items():
        if size > _MAX_UNTOLD_BYTES:
            text = f"{name}: has {size} bytes that the model is not told of; {_MAX_UNTOLD_BYTES} are taken"
            raise RequestError(text, param=name)


def _includes(raw: object, left_out: list[str]) -> Sequence[object]:
    """Return what is to be included; what belongs to tools that are left out is left out, too.

    Raises RequestError for what is not there.
    """
    if raw is None:
        return ()
    known = (_LOGPROBS, *_HARMLESS_INCLUDES, *_OF_LEFT_OUT)
    if not isinstance(raw, list) or not all(each in known for each in raw):
        raise not_supported("include")
    left_out += [f"include[{index}]" for index, each in enumerate(raw) if each in _OF_LEFT_OUT]
    return raw


def _limit(given: object) -> int:
    value = whole(given)
    if type(value) is not int or value < 1:
        text = f"'max_output_tokens' should be a whole number of at least 1, got {shown(value)}"
        raise RequestError(text, param="max_output_tokens", code="invalid_value")
    return value


def _choice(raw: object, left_out: list[str]) -> object:
    """Return a choice as chats have it; tools that are left out are none of those that it allows."""
    if not isinstance(raw, dict) or raw.get("type") != "allowed_tools":
        return _named(raw)
    chosen = {name: value for name, value in raw.items() if name != "type"}
    tools = chosen.get("tools")
    if isinstance(tools, list):
        left_out += [f"tool_choice.tools[{index}]" for index, each in enumerate(tools) if is_hosted(each)]
        chosen["tools"] = [_named(each) for each in tools if not is_hosted(each)]
    return {"type": "allowed_tools", "allowed_tools": chosen}


def _named(raw: object) -> object:
    if not isinstance(raw, dict) or raw.get("type") not in ("function", "custom"):
        return raw
    return {"type": "function", "function": {"name": raw.get("name")}}


def _take_text(raw: object, body: dict[str, object], ignored: list[str] | None) -> None:
    text = {} if raw is None else known_object(raw, _TEXT, "text", ignored)
    if text.get("format") is not None:
        body["response_format"] = _format(text["format"])
    if text.get("verbosity") is not None:
        body["verbosity"] = text["verbosity"]


def _format(raw: object) -> object:
    """Return a format as chats have it: a schema's fields stand in an object of their own there."""
    if not isinstance(raw, dict) or raw.get("type") != "json_schema":
        return raw
    return {"type": "json_schema", "json_schema": {name: value for name, value in raw.items() if name != "type"}}


def _take_reasoning(raw: object, body: dict[str, object], ignored: list[str] | None) -> None:
    reasoning = {} if raw is None else known_object(raw, _REASONING, "reasoning", ignored)
    if reasoning.get("effort") is not None:
        body["reasoning_effort"] = reasoning["effort"]
