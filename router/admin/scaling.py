"""Scaling over the admin listener.

GET    /admin/scaling    mode, workers now and desired, why, the forecast, an operator's edit
POST   /admin/scaling    {"prefill": 2, "decode": 3, "for_s": 600}: these counts, until released or for a time
DELETE /admin/scaling    release them
"""

from __future__ import annotations

import json

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...common.errors import RequestError
from ..autoscaler.scale_types import Counts
from ..autoscaler.scaling import Scaling
from ..state.errors import clip

_MAX_BODY_BYTES = 4096
_MAX_HOLD_S = 365 * 86400.0


def scaling_routes(scaling: Scaling) -> list[Route]:
    async def show(_request: Request) -> Response:
        return JSONResponse(scaling.describe())

    async def hold(request: Request) -> Response:
        counts, for_s = _parse(await request.body())
        scaling.hold(counts, for_s)
        return JSONResponse({"held": {"prefill": counts.prefill, "decode": counts.decode, "for_s": for_s}}, 202)

    async def release(_request: Request) -> Response:
        scaling.release()
        return JSONResponse({"held": None}, 202)

    return [
        Route("/admin/scaling", show, methods=["GET"]),
        Route("/admin/scaling", hold, methods=["POST"]),
        Route("/admin/scaling", release, methods=["DELETE"]),
    ]


def _parse(data: bytes) -> tuple[Counts, float | None]:
    if len(data) > _MAX_BODY_BYTES:
        raise RequestError(f"the body is longer than {_MAX_BODY_BYTES} bytes", code="body_too_large", status=413)
    try:
        body = json.loads(data)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise RequestError("the body is not a JSON object", code="invalid_json")
    unknown = body.keys() - {"prefill", "decode", "for_s"}
    if unknown:
        raise RequestError(f"unknown field: {clip(min(unknown))}", param=min(unknown)[:64], code="unknown_field")
    counts = [body.get(name) for name in ("prefill", "decode")]
    for name, count in zip(("prefill", "decode"), counts, strict=True):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise RequestError(f"{name}: a number of workers", param=name)
    for_s = body.get("for_s")
    is_number = isinstance(for_s, int | float) and not isinstance(for_s, bool)
    if for_s is not None and not (is_number and 0 < for_s <= _MAX_HOLD_S):
        raise RequestError(f"for_s: a number of seconds up to {_MAX_HOLD_S:g}", param="for_s")
    return Counts(counts[0], counts[1]), for_s  # type: ignore[arg-type]
