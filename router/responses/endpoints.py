"""Responses that are kept here: shown, with what they answer, and forgotten. A key finds its own only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import msgspec
from fastapi import Request
from starlette.responses import Response

from ...common.errors import RequestError
from ..api.middleware import context_of
from ..state.errors import clip
from ..turns.places import Message
from .kept import RESPONSE_PREFIX, KeptResponses
from .tools import Names, called

_USUAL_ITEMS, _MOST_ITEMS = 20, 100  # of a page, as OpenAI has it

Fields = dict[str, object]


class KeptEndpoints:
    """The endpoints as methods. Each raises RequestError (404) for what is not kept."""

    def __init__(self, kept: KeptResponses) -> None:
        self._kept = kept

    async def show(self, request: Request, response_id: str) -> Response:
        return _json(self._kept.response(response_id, context_of(request.scope).tenant))

    async def items(self, request: Request, response_id: str) -> Response:
        """Return what a response answers, earlier turns included, page by page: the newest first, unless asked."""
        tenant = context_of(request.scope).tenant
        messages, names = self._kept.input(response_id, tenant)
        name = response_id.removeprefix(RESPONSE_PREFIX)
        found = [{"id": f"{kind}_{name}_in{at}", **item} for at, (kind, item) in enumerate(_items(messages, names))]
        page, has_more = _page(found, request.query_params)
        ids = [each["id"] for each in page] or [None]
        shown = {"object": "list", "data": page, "first_id": ids[0], "last_id": ids[-1], "has_more": has_more}
        return _json(msgspec.json.encode(shown))

    async def delete(self, request: Request, response_id: str) -> Response:
        self._kept.forget(response_id, context_of(request.scope).tenant)
        return _json(msgspec.json.encode({"id": response_id, "object": "response", "deleted": True}))


def events_after(asked: Mapping[str, str]) -> int | None:
    """Return behind which event a response is to be streamed; -1: none, and None: it is to be shown whole.

    Raises RequestError.
    """
    stream, after = asked.get("stream", "false"), asked.get("starting_after")
    if stream not in ("true", "false"):
        raise RequestError(f"stream must be true or false, got {clip(stream)}", param="stream")
    if after is not None and not re.fullmatch(r"[0-9]{1,9}", after):
        text = f"starting_after must be the number of an event, got {clip(after)}"
        raise RequestError(text, param="starting_after")
    if stream == "false":
        return None
    return -1 if after is None else int(after)


def _items(messages: Sequence[Message], names: Names) -> Iterator[tuple[str, Fields]]:
    """Yield the items that messages came as, each with the beginning of its id."""
    custom: set[object] = set()  # ids of calls
    for message in messages:
        role, text, calls = message["role"], message["content"], message.get("tool_calls")
        if thoughts := message.get("reasoning_content"):
            content: list[Fields] = [{"type": "reasoning_text", "text": thoughts}]
            yield "rs", {"type": "reasoning", "summary": [], "content": content}
        if role == "tool":
            result = {"call_id": message.get("tool_call_id"), "output": text}
            prefix, kind = ("ctco", "custom_tool_call") if result["call_id"] in custom else ("fco", "function_call")
            yield prefix, {"type": f"{kind}_output", **result, "status": "completed"}
        elif text or not calls:
            is_answer = role == "assistant"
            content = [{"type": "input_text", "text": text}]
            if is_answer:
                content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
            yield "msg", {"type": "message", "role": role, "content": content, "status": "completed"}
        for call in calls if isinstance(calls, list) else ():
            function = call["function"]
            item = called(names, call["id"], function["name"], function["arguments"])
            if is_custom := item["type"] == "custom_tool_call":
                custom.add(call["id"])
            yield "ctc" if is_custom else "fc", {**item, "status": "completed"}


def _page(found: list[Fields], asked: Mapping[str, str]) -> tuple[list[Fields], bool]:
    """Return the items behind `after`, `limit` at most, and whether there are more."""
    limit, order, after = asked.get("limit", str(_USUAL_ITEMS)), asked.get("order", "desc"), asked.get("after")
    if not re.fullmatch(r"[0-9]{1,3}", limit) or not 1 <= int(limit) <= _MOST_ITEMS:
        raise RequestError(f"limit must be 1 to {_MOST_ITEMS}, got {clip(limit)}", param="limit")
    if order not in ("asc", "desc"):
        raise RequestError(f"order must be 'asc' or 'desc', got {clip(order)}", param="order")
    ordered = found if order == "asc" else found[::-1]
    start = 0
    if after is not None:
        start = next((at + 1 for at, each in enumerate(ordered) if each["id"] == after), -1)
        if start < 0:
            raise RequestError(f"after: there is no {clip(after)} in this list", param="after")
    end = start + int(limit)
    return ordered[start:end], end < len(ordered)


def _json(data: bytes) -> Response:
    return Response(data, media_type="application/json")
