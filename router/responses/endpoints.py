"""Responses that are kept here: what they answer is shown, and they are forgotten. A key finds its own only."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fastapi import Request
from starlette.responses import Response

from ...common.errors import RequestError
from ..api.json_answers import Json, listed, ordered, page_of
from ..api.middleware import context_of
from ..kept.answers import KeptAnswers
from ..state.errors import clip
from .kept import KeptResponses

_USUAL_ITEMS, _MOST_ITEMS = 20, 100  # of a page, as OpenAI has it


class KeptEndpoints:
    """The endpoints as methods. Each raises RequestError (404) for what is not kept."""

    def __init__(self, kept: KeptResponses, answers: KeptAnswers | None) -> None:
        self._kept = kept
        self._answers = answers

    async def items(self, request: Request, response_id: str) -> Response:
        """Return what a response answers, earlier turns included, page by page: the newest first, unless asked."""
        tenant = context_of(request.scope).tenant
        items = ordered(self._kept.input(response_id, tenant)[::-1], request.query_params)
        ids = [item_id for item_id, _ in items]
        page, has_more = page_of(items, ids, request.query_params, usual=_USUAL_ITEMS, most=_MOST_ITEMS)
        return listed(page, has_more=has_more)

    async def delete(self, request: Request, response_id: str) -> Response:
        """Forget a response, and the answer of which it would be told again."""
        answer = self._kept.forget(response_id, context_of(request.scope).tenant)
        if answer and self._answers is not None:
            self._answers.forget(answer)
        return Json({"id": response_id, "object": "response", "deleted": True})


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
