"""The items of /v1/responses' input as a chat's messages.

Those of tools that nobody runs here, as a conversation that began elsewhere has them, are left out; others are refused.
"""

from __future__ import annotations

from ...common.errors import RequestError
from ..bodies.chat_messages import MAX_MESSAGES, ROLES
from ..bodies.fields import checked_object
from ..state.errors import clip, shown
from ..turns.places import Message, PlacedMessage
from .custom import arguments_of
from .tools import told_name

CALL_NAMES = {"function.name": "name", "function.arguments": "arguments", "function": "", "id": "call_id"}
_NAMES_OF_ANSWERS = {"tool_calls": ""}
_NAMES_OF_RESULTS = {"tool_call_id": "call_id", "content": "output"}
_LEFT_OUT = frozenset(
    {
        *("web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call", "compaction"),
        *("mcp_list_tools", "mcp_call", "mcp_approval_request", "mcp_approval_response"),
        *("local_shell_call", "local_shell_call_output", "shell_call", "shell_call_output"),
        *("apply_patch_call", "apply_patch_call_output", "computer_call", "computer_call_output"),
        *("tool_search_call", "tool_search_call_output", "tool_search_output"),
    }
)
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def check_num_items(raw: object) -> None:
    """Refuse more items than a chat has messages. Raises RequestError."""
    if isinstance(raw, list) and len(raw) > MAX_MESSAGES:
        raise RequestError(f"input: at most {MAX_MESSAGES} items, got {len(raw)}", param="input")


def input_messages(raw: object, left_out: list[str]) -> list[PlacedMessage]:
    """Return the input as messages: a call joins the assistant's message that it follows.

    `left_out` gets the places of items that the model is not told of.
    """
    if isinstance(raw, str):
        return [PlacedMessage({"role": "user", "content": raw}, "input", {"content": ""})]
    if not isinstance(raw, list):
        raise RequestError(f"input must be a string or an array of items, got {shown(raw)}", param="input")
    messages: list[PlacedMessage] = []
    for index, each in enumerate(raw):
        if isinstance(each, dict) and isinstance(kind := each.get("type"), str) and kind in _LEFT_OUT:
            left_out.append(f"input[{index}]")
        else:
            _add_item(messages, each, f"input[{index}]")
    for placed in messages:
        if isinstance(thoughts := placed.message.get("reasoning_content"), list):
            placed.message["reasoning_content"] = "\n".join(thoughts)
    return messages


def _add_item(messages: list[PlacedMessage], raw: object, where: str) -> None:
    raw = checked_object(raw, where)
    match raw.get("type") or "message":  # clients dump an absent type as null
        case "message":
            if (role := raw.get("role")) not in ROLES:
                rule = f"must be one of {', '.join(ROLES)}"
                raise RequestError(f"{where}.role {rule}, got {shown(role)}", param=f"{where}.role")
            if role == "assistant":
                text = _text(raw.get("content"), f"{where}.content")
                _assistant(messages, where, is_new_text=True).message["content"] = text
            else:
                text = _text(raw.get("content"), f"{where}.content", between="\n")
                messages.append(PlacedMessage({"role": role, "content": text}, where))
        case "function_call" | "custom_tool_call" as kind:
            is_custom = kind == "custom_tool_call"
            arguments = arguments_of(raw.get("input"), where) if is_custom else _arguments(raw.get("arguments"), where)
            function = {"name": told_name(raw.get("namespace"), raw.get("name")), "arguments": arguments}
            placed = _assistant(messages, where)
            calls = placed.message.setdefault("tool_calls", [])
            assert isinstance(calls, list)
            placed.calls.append(where)
            calls.append({"id": raw.get("call_id"), "type": "function", "function": function})
        case "function_call_output" | "custom_tool_call_output":
            if raw.get("call_id") == "":
                raise RequestError(f"{where}.call_id must be a string, got ''", param=f"{where}.call_id")
            text = _text(raw.get("output"), f"{where}.output", between="\n")
            result: Message = {"role": "tool", "tool_call_id": raw.get("call_id"), "content": text}
            messages.append(PlacedMessage(result, where, _NAMES_OF_RESULTS))
        case "reasoning":
            text = "".join(_text(raw[name], f"{where}.{name}") for name in ("summary", "content") if raw.get(name))
            if text:
                message = _assistant(messages, where, is_new_text=True).message
                thoughts = message.setdefault("reasoning_content", [])
                assert isinstance(thoughts, list)  # until all are there
                thoughts.append(text)
        case kind:
            raise RequestError(
                f"{where}: items of type {shown(kind)} are not supported", param=where, code="unsupported_content"
            )


def _arguments(raw: object, where: str) -> str:
    """Return a call's arguments, which are shown again as they came: JSON in a string; null where there are none."""
    if not isinstance(raw, str | None):
        raise RequestError(f"{where}.arguments must be a string, got {shown(raw)}", param=f"{where}.arguments")
    return raw or ""


def _assistant(messages: list[PlacedMessage], where: str, *, is_new_text: bool = False) -> PlacedMessage:
    """Return the assistant's message that goes on; a new one after others', or where its text is there already."""
    last = messages[-1].message if messages else None
    if last is None or last["role"] != "assistant" or (is_new_text and (last["content"] or "tool_calls" in last)):
        messages.append(PlacedMessage({"role": "assistant", "content": ""}, where, _NAMES_OF_ANSWERS))
    return messages[-1]


def _text(raw: object, where: str, between: str = "") -> str:
    """Return a string, or text parts as one, with `between` between them."""
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
    return between.join(texts)
