"""Responses that are kept here: what they answer is shown, and they are forgotten. A key finds its own only."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
from fastapi import Request
from starlette.responses import Response

from ...common.errors import RequestError
from ..api.middleware import context_of
from ..kept.answers import KeptAnswers
from ..state.errors import clip
from .kept import KeptResponses

_USUAL_ITEMS, _MOST_ITEMS = 20, 100  # of a page, as OpenAI has it

Item = tuple[str, msgspec.Raw]  # its id, and itself as JSON


class KeptEndpoints:
    """The endpoints as methods. Each raises RequestError (404) for what is not kept."""

    def __init__(self, kept: KeptResponses, answers: KeptAnswers | None) -> None:
        self._kept = kept
        self._answers = answers

    async def items(self, request: Request, response_id: str) -> Response:
        """Return what a response answers, earlier turns included, page by page: the newest first, unless asked."""
        tenant = context_of(request.scope).tenant
        page, has_more = _page(self._kept.input(response_id, tenant), request.query_params)
        first, last = (page[at][0] if page else None for at in (0, -1))
        items = [item for _, item in page]
        shown = {"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": has_more}
        return _json(msgspec.json.encode(shown))

    async def delete(self, request: Request, response_id: str) -> Response:
        """Forget a response, and the answer of which it would be told again."""
        answer = self._kept.forget(response_id, context_of(request.scope).tenant)
        if answer and self._answers is not None:
            self._answers.forget(answer)
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


def _page(found: list[Item], asked: Mapping[str, str]) -> tuple[list[Item], bool]:
    """Return the items behind `after`, `limit` at most, and whether there are more."""
    limit, order, after = asked.get("limit", str(_USUAL_ITEMS)), asked.get("order", "desc"), asked.get("after")
    if not re.fullmatch(r"[0-9]{1,3}", limit) or not 1 <= int(limit) <= _MOST_ITEMS:
        raise RequestError(f"limit must be 1 to {_MOST_ITEMS}, got {clip(limit)}", param="limit")
    if order not in ("asc", "desc"):
        raise RequestError(f"order must be 'asc' or 'desc', got {clip(order)}", param="order")
    ordered = found if order == "asc" else found[::-1]
    start = 0
    if after is not None:
        start = next((at + 1 for at, each in enumerate(ordered) if each[0] == after), -1)
        if start < 0:
            raise RequestError(f"after: there is no {clip(after)} in this list", param="after")
    end = start + int(limit)
    return ordered[start:end], end < len(ordered)


def _json(data: bytes) -> Response:
    return Response(data, media_type="application/json")
