"""Answers that are JSON as they stand, and lists of what is kept, page by page as OpenAI has them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec
from starlette.responses import Response

from ...common.errors import RequestError
from ..state.errors import clip

Item = TypeVar("Item")


class Json(Response):
    """An answer in JSON. Bytes are JSON already."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return content if isinstance(content, bytes) else msgspec.json.encode(content)


def listed(items: Sequence[tuple[str, object]], *, has_more: bool) -> Json:
    """Return a page of a list, of items by their ids."""
    first, last = (items[at][0] if items else None for at in (0, -1))
    data = [item for _, item in items]
    return Json({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more})


def ordered(newest_first: list[Item], asked: Mapping[str, str]) -> list[Item]:
    """Return a list in the `order` that is asked for: the newest first, unless it is asc. Raises RequestError."""
    order = asked.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError(f"order must be 'asc' or 'desc', got {clip(order)}", param="order")
    return newest_first if order == "desc" else newest_first[::-1]


def page_of(
    items: list[Item], ids: Sequence[str], asked: Mapping[str, str], *, usual: int, most: int
) -> tuple[list[Item], bool]:
    """Return the items behind `after`, `limit` at most, and whether there are more. Raises RequestError."""
    limit, after = asked.get("limit", str(usual)), asked.get("after")
    if not re.fullmatch(r"[0-9]{1,6}", limit) or not 1 <= int(limit) <= most:
        raise RequestError(f"limit must be 1 to {most}, got {clip(limit)}", param="limit")
    if after is not None and after not in ids:
        raise RequestError(f"after: there is no {clip(after)} in this list", param="after")
    start = 0 if after is None else ids.index(after) + 1
    end = start + int(limit)
    return items[start:end], end < len(items)
