"""The JSON object that comes with an order, an operator's or a client's: small, without fields that are not known."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from starlette.requests import ClientDisconnect, Request

from ...common.errors import RequestError
from ..api.body import BODY_TIMEOUT_S, BodyRoom, ClientGone, in_time, read_body, too_large
from ..api.middleware import context_of
from ..helpers.strict_json import parse_json
from ..state.errors import clip

_MAX_BYTES = 4096


async def json_body(request: Request, known: AbstractSet[str], *, may_be_empty: bool = False) -> dict[str, object]:
    """Raises RequestError (400, 408, 413), or ClientGone. An empty body may stand for an empty object."""
    try:
        async with in_time(BODY_TIMEOUT_S):
            data = await _read(request)
    except ClientDisconnect:
        raise ClientGone from None
    return _object(data, known) if data or not may_be_empty else {}


async def _read(request: Request) -> bytes:
    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > _MAX_BYTES:
            raise too_large(f"more than {_MAX_BYTES} bytes", _MAX_BYTES)
    return data


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
