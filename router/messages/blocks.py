"""The messages of /v1/messages, with blocks, as a chat's messages.

What tools that nobody runs here have done elsewhere is left out; other blocks are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain, groupby

from ...common.errors import RequestError
from ..bodies.chat_messages import MAX_MESSAGES
from ..bodies.fields import known_object
from ..state.errors import shown
from ..turns.places import Message, PlacedMessage
from .texts import Block, joined_text, no_block, read_block, result_text, text_of

CALL_NAMES = {"function.name": "name", "function.arguments": "input", "function": ""}
_NAMES_OF_ANSWERS = {"reasoning_content": "content", "tool_calls": "content"}
_NAMES_OF_RESULTS = {"tool_call_id": "tool_use_id"}
_LEFT_OUT = frozenset(
    {
        *("server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "tool_search_tool_result"),
        *("code_execution_tool_result", "bash_code_execution_tool_result", "text_editor_code_execution_tool_result"),
        *("mcp_tool_use", "mcp_tool_result", "compaction"),
    }
)
PlacedBlock = tuple[str, str, Block]  # its place, its type, and itself
# Claude Code's note for those who bill it, in a block before its prompt. It is another one in each conversation, or in
# each request: with it no two prompts would begin alike, and no prefix would be found in a cache.
_BILLED = re.compile(r"\Ax-anthropic-billing-header:[^\n]*+\n?")


def system_messages(raw: object) -> list[PlacedMessage]:
    """Return the system's prompt as a message, where there is one."""
    if raw is None or raw in ("", []):
        return []
    text = joined_text(raw, "system")
    prompt = _BILLED.sub("", text)
    if text and not prompt:
        return []
    return [PlacedMessage({"role": "system", "content": prompt}, "system", {"content": ""})]


def chat_messages(raw: object, ignored: list[str] | None, left_out: list[str]) -> list[PlacedMessage]:
    """Return the messages as a chat's: each result of a tool is a message there. Raises RequestError.

    Neighbours of one role are one turn, as Anthropic has it: many templates want roles to take turns. `left_out` gets
    the places of what the model is not told of.
    """
    if not isinstance(raw, list) or not raw:
        raise RequestError("messages must be an array that is not empty", param="messages")
    if len(raw) > MAX_MESSAGES:
        raise RequestError(f"at most {MAX_MESSAGES} messages, got {len(raw)}", param="messages")
    each = (_message(one, f"messages[{index}]", ignored, left_out) for index, one in enumerate(raw))
    return [_turn(list(group)) for _, group in groupby(chain.from_iterable(each), _side)]


def _side(placed: PlacedMessage) -> object:
    """Return whose text it is; of what has calls or thoughts, whose order would be lost, something of its own."""
    message = placed.message
    is_text = message["role"] in ("user", "assistant") and message.keys() == {"role", "content"}
    return message["role"] if is_text else id(placed)


def _turn(neighbours: Sequence[PlacedMessage]) -> PlacedMessage:
    first = neighbours[0]
    if len(neighbours) > 1:
        between = "\n" if first.message["role"] == "user" else ""  # as between blocks of a message
        first.message["content"] = between.join(str(placed.message["content"]) for placed in neighbours)
    return first


def _message(raw: object, where: str, ignored: list[str] | None, left_out: list[str]) -> list[PlacedMessage]:
    given = known_object(raw, frozenset({"role", "content"}), where, ignored)
    role, content = given.get("role"), given.get("content")
    if role not in ("user", "assistant", "system"):
        raise RequestError(f"{where}.role must be 'user' or 'assistant', got {shown(role)}", param=f"{where}.role")
    if isinstance(content, str):
        return [PlacedMessage({"role": role, "content": content}, where)]
    if not isinstance(content, list):
        raise RequestError(f"{where}.content must be a string or an array of blocks", param=f"{where}.content")
    blocks: list[PlacedBlock] = []
    for at, each in enumerate(content):
        place = f"{where}.content[{at}]"
        kind, block = read_block(each, place)
        if kind in _LEFT_OUT:
            left_out.append(place)
        else:
            blocks.append((place, kind, block))
    return [_assistant(blocks, where)] if role == "assistant" else _user(str(role), blocks, where, left_out)


def _assistant(blocks: Sequence[PlacedBlock], where: str) -> PlacedMessage:
    message: Message = {"role": "assistant", "content": ""}
    placed = PlacedMessage(message, where, _NAMES_OF_ANSWERS)
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, object]] = []
    for place, kind, block in blocks:
        match kind:
            case "text":
                texts.append(str(block["text"]))
            case "thinking":
                thoughts.append(str(block.get("thinking", "")))
            case "tool_use":
                given = block.get("input")
                if not isinstance(given, dict | str | None):  # a string, as some clients keep it, is read by the chat
                    raise RequestError(f"{place}.input must be an object, got {shown(given)}", param=f"{place}.input")
                function = {"name": block.get("name"), "arguments": given}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
                placed.calls.append(place)
            case "redacted_thinking":
                pass
            case _:
                raise no_block(kind, place)
    message["content"] = "".join(texts)
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return placed


def _user(role: str, blocks: Sequence[PlacedBlock], where: str, left_out: list[str]) -> list[PlacedMessage]:
    messages: list[PlacedMessage] = []
    texts: list[str] = []
    for place, kind, block in blocks:
        match kind:
            case "tool_result":
                content = block.get("content")
                text = "" if content is None else result_text(content, f"{place}.content", left_out)
                if _is_error(block, place):
                    text = f"Error: {text}" if text else "Error"  # a chat has no other place for it
                result: Message = {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}
                messages.append(PlacedMessage(result, place, _NAMES_OF_RESULTS))
            case _:
                texts.append(text_of(kind, block, place, left_out))
    if texts or not messages:
        messages.append(PlacedMessage({"role": role, "content": "\n".join(texts)}, where))
    return messages


def _is_error(result: dict[str, object], where: str) -> bool:
    is_error = result.get("is_error")
    if not isinstance(is_error, bool | None):
        raise RequestError(f"{where}.is_error must be a boolean, got {shown(is_error)}", param=f"{where}.is_error")
    return bool(is_error)
