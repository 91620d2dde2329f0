"""The JSON object that an operator sends with an order: small, and without fields that are not known."""

from __future__ import annotations

import json
from collections.abc import Set as AbstractSet

from starlette.requests import Request

from ...common.errors import RequestError
from ..state.errors import clip

_MAX_BYTES = 4096


async def json_body(request: Request, known: AbstractSet[str], *, may_be_empty: bool = False) -> dict[str, object]:
    """Raises RequestError (400, 413). An empty body may stand for an empty object."""
    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > _MAX_BYTES:
            raise RequestError(f"the body is longer than {_MAX_BYTES} bytes", code="body_too_large", status=413)
    try:
        body = json.loads(data) if data or not may_be_empty else {}
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise RequestError("the body is not a JSON object", code="invalid_json")
    if unknown := body.keys() - known:
        raise RequestError(f"unknown field: {clip(min(unknown))}", param=min(unknown)[:64], code="unknown_field")
    return body
