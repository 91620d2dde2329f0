"""The JSON object that comes with an order, an operator's or a client's: small, without fields that are not known."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from starlette.requests import Request

from ...common.errors import RequestError
from ..api.body import BODY_TIMEOUT_S, BodyRoom, read_body, read_in_time
from ..api.middleware import context_of
from ..helpers.strict_json import parse_json
from ..state.errors import clip

_MAX_BYTES = 4096


async def json_body(request: Request, known: AbstractSet[str]) -> dict[str, object]:
    """Raises RequestError (400, 408, 413), or ClientGone. An empty body stands for an empty object."""
    with BodyRoom().held() as held:
        data = await read_in_time(request.receive, held, _MAX_BYTES, BODY_TIMEOUT_S)
    return _object(data, known) if data else {}


async def client_body(room: BodyRoom, request: Request, known: AbstractSet[str]) -> dict[str, object]:
    """Read it as a client's body: within its time, and of a type that no web page may send unasked."""
    with room.held() as held:
        data = await read_body(context_of(request.scope).headers, request.receive, held, max_bytes=_MAX_BYTES)
    return _object(data, known)


def _object(data: bytes, known: AbstractSet[str]) -> dict[str, object]:
    body = parse_json(data)
    if unknown := body.keys() - known:
        raise RequestError(f"unknown field: {clip(min(unknown))}", param=min(unknown)[:64], code="unknown_field")
    return body
