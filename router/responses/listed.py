"""The items of an input as they are kept and listed: as they came, each with an id by which it can be referred to.

An id that stands twice, as of an item that is sent once more, would name one of them, and have pages of a list begin
anew: the later item gets one of this server.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from .kept import RESPONSE_PREFIX

Fields = dict[str, object]

_ITEM_IDS = {  # how those of this server begin
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


def has_own_ids(given: object) -> bool:
    """Return whether any item of an input came with an id."""
    return isinstance(given, list) and any(isinstance(item, dict) and item.get("id") for item in given)


def listed(given: object, response_id: str, earlier_ids: AbstractSet[str] = frozenset()) -> list[Fields]:
    """Return the items of an input that was read, of the response `response_id`; `earlier_ids`: those before it."""
    items = given if isinstance(given, list) else [{"role": "user", "content": given}]
    found, taken = list[Fields](), set(earlier_ids)
    for at, item in enumerate(items):
        if isinstance(item, dict):
            kind, own = str(item.get("type") or "message"), item.get("id")
            item_id = f"{_ITEM_IDS.get(kind, 'item')}_{response_id.removeprefix(RESPONSE_PREFIX)}_in{at}"
            if isinstance(own, str) and own and own not in taken:
                item_id = own
            taken.add(item_id)
            found.append(_listed(item, kind, item_id))
    return found


def _listed(item: Fields, kind: str, item_id: str) -> Fields:
    """Return an item with what OpenAI's has where the client may leave it away; all else is the client's."""
    shown = {"id": item_id, "type": kind, **item} | {"id": item_id, "type": kind}
    if kind == "reasoning":
        return shown | {"summary": item.get("summary") or []}
    if kind in _ITEM_IDS:
        shown["status"] = item.get("status") or "completed"
    if kind == "function_call":
        shown["arguments"] = item.get("arguments") or ""
    if kind == "message" and isinstance(text := item.get("content"), str):
        is_answer = item.get("role") == "assistant"
        part: Fields = {"type": "output_text" if is_answer else "input_text", "text": text}
        shown["content"] = [part | {"annotations": [], "logprobs": []} if is_answer else part]
    return shown
