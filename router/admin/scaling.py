"""Scaling over the admin listener.

GET    /admin/scaling    mode, workers now and desired, why, the forecast, an operator's edit
POST   /admin/scaling    {"prefill": 2, "decode": 3, "for_s": 600}: these counts, until released or for a time
DELETE /admin/scaling    release them

Once the router is ending, nobody would carry out what is ordered: 409.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...common.errors import RequestError
from ..autoscaler.scale_types import Counts
from ..autoscaler.scaling import Scaling
from .json_body import json_body
from .leaving import IsLeaving, check_stays, never_leaving

_MAX_HOLD_S = 365 * 86400.0


def scaling_routes(scaling: Scaling, is_leaving: IsLeaving = never_leaving) -> list[Route]:
    async def show(_request: Request) -> Response:
        return JSONResponse(scaling.describe())

    async def hold(request: Request) -> Response:
        counts, for_s = _parse(await json_body(request, {"prefill", "decode", "for_s"}))
        check_stays(is_leaving)
        scaling.hold(counts, for_s)
        return JSONResponse({"held": {"prefill": counts.prefill, "decode": counts.decode, "for_s": for_s}}, 202)

    async def release(_request: Request) -> Response:
        check_stays(is_leaving)
        scaling.release()
        return JSONResponse({"held": None}, 202)

    return [
        Route("/admin/scaling", show, methods=["GET"]),
        Route("/admin/scaling", hold, methods=["POST"]),
        Route("/admin/scaling", release, methods=["DELETE"]),
    ]


def _parse(body: dict[str, object]) -> tuple[Counts, float | None]:
    counts = Counts(_count(body, "prefill"), _count(body, "decode"))
    for_s = body.get("for_s")
    if for_s is None:
        return counts, None
    if isinstance(for_s, bool) or not isinstance(for_s, int | float) or not 0 < for_s <= _MAX_HOLD_S:
        raise RequestError(f"for_s: a number of seconds up to {_MAX_HOLD_S:g}", param="for_s")
    return counts, for_s


def _count(body: dict[str, object], name: str) -> int:
    count = body.get(name)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise RequestError(f"{name}: a number of workers", param=name)
    return count
