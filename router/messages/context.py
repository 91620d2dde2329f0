"""The `context_management` of /v1/messages: which thoughts of earlier turns the model is told of.

clear_thinking_20251015, keep all ─> nothing changes      keep the last n turns' ─> older thoughts are left out

Edits that shorten a prompt by what they count of its tokens have no effect, which is told; others are refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...common.errors import RequestError
from ..bodies.fields import checked_array, checked_object, known_object, take_only, whole
from ..state.errors import shown
from ..turns.places import PlacedMessage

_CLEAR_THINKING = "clear_thinking_20251015"
_WITHOUT_EFFECT = ("clear_tool_uses_20250919", "compact_20260112")
_KEPT_TURNS = 1  # where an edit does not say how many


def edit_context(
    raw: object, messages: Sequence[PlacedMessage], ignored: list[str] | None, left_out: list[str]
) -> None:
    """Take out of the messages what the edits leave out; `left_out` gets the places of those that are not made.

    Raises RequestError.
    """
    if raw is None:
        return
    given = known_object(raw, frozenset({"edits"}), "context_management", ignored)
    kept: list[int] = []
    for index, each in enumerate(checked_array(given.get("edits") or [], "context_management.edits")):
        where = f"context_management.edits[{index}]"
        if isinstance(each, dict) and each.get("type") in _WITHOUT_EFFECT:
            left_out.append(where)
            continue
        if (num_turns := _kept_turns(each, where, ignored)) is not None:
            kept.append(num_turns)
    if kept:  # one after the other they would leave the same, and go through all messages each time
        _clear_thinking(messages, min(kept))


def _kept_turns(raw: object, where: str, ignored: list[str] | None) -> int | None:
    """Return of how many turns the thoughts are kept; None: of all."""
    edit = checked_object(raw, where)
    if edit.get("type") != _CLEAR_THINKING:
        raise RequestError(
            f"{where}: edits of type {shown(edit.get('type'))} are not supported, only {_CLEAR_THINKING!r}",
            param=f"{where}.type",
            code="unsupported_value",
        )
    take_only(edit, frozenset({"type", "keep"}), where, ignored)
    match edit.get("keep"):
        case None:
            return _KEPT_TURNS
        case "all" | {"type": "all"}:
            return None
        case {"type": "thinking_turns", "value": value} if type(number := whole(value)) is int and number >= 1:
            return number
        case keep:
            rule = 'must be "all" or {"type": "thinking_turns", "value": a whole number of at least 1}'
            raise RequestError(f"{where}.keep {rule}, got {shown(keep)}", param=f"{where}.keep", code="invalid_value")


def _clear_thinking(messages: Sequence[PlacedMessage], kept: int) -> None:
    """Leave out all thoughts but those of the last turns that have any: a turn goes on behind results of tools."""
    num_kept, is_counted = 0, False
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index].message
        if "reasoning_content" in message:
            num_kept += not is_counted
            is_counted = True
            if num_kept > kept:
                del message["reasoning_content"]
        elif message["role"] == "user" and not _is_beside_results(messages, index):
            is_counted = False


def _is_beside_results(messages: Sequence[PlacedMessage], index: int) -> bool:
    """Tell whether a user's text came with results of tools."""
    return index > 0 and messages[index - 1].message["role"] == "tool"
