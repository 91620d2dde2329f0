"""The admin listener: what an operator asks and orders, on a socket of its own and never on the public one.

    GET  /admin/workers                every worker: state, load, blocks, which handoffs are avoided
    POST /admin/workers/{id}/drain     it takes nothing new and ends; its launcher starts it again
    POST /admin/restart                the launcher restarts everything, one process at a time; 409 where it is ending
    GET  /admin/experts                of mixtures of experts: how often each was chosen, by worker and layer
    GET  /admin/requests               this router's last requests; ?kind=recent|slowest|failed&class=NAME&limit=N
    GET  /admin/requests/{id}          one of them: where it was placed and why, what was expected and what came
    GET  /admin/scaling                workers of each pool, now and desired, and why; POST, DELETE: scaling.py
    GET  /admin/metrics                this router's; of /metrics on a port that several share, any of them answers

Where keys are set, every path needs one, unknown paths included. Without keys it listens on the loopback only, and a
web page in a browser of this machine is kept out by what browsers send: an Origin, or a Host that is a name.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ...common.errors import KVFerryError, RequestError
from ..access.hosts import is_of_this_machine
from ..access.keys import ApiKeys
from ..access.reload import LauncherLink
from ..api.body import ClientGone
from ..api.middleware import CLIENT_CLOSED, check_head, failure_response, on_no_endpoint
from ..state.errors import clip, failure_of
from ..state.expert_load import ExpertLoad
from ..state.history import KINDS, MAX_RECENT, Kind
from ..state.views import PoolView, WorkerView
from .json_body import json_body
from .leaving import IsLeaving, check_stays, never_leaving

_MAX_DRAIN_S = 86400.0


class AdminOperations(Protocol):
    """The admin listener needs this of a dispatcher."""

    def view(self) -> PoolView: ...

    def drain_worker(self, worker_id: str, deadline_s: float) -> bool: ...

    def requests(self, kind: Kind, request_class: str | None, limit: int) -> list[dict[str, object]]: ...

    def request(self, request_id: str) -> dict[str, object] | None: ...


def build_admin(admin: Admin, keys: ApiKeys, more: Sequence[Route] = ()) -> ASGIApp:
    """Build the application. `more`: what other modules answer."""
    routes = [
        Route("/admin/workers", admin.workers, methods=["GET"]),
        Route("/admin/workers/{worker_id}/drain", admin.drain, methods=["POST"]),
        Route("/admin/experts", admin.experts, methods=["GET"]),
        Route("/admin/requests", admin.requests, methods=["GET"]),
        Route("/admin/requests/{request_id}", admin.request, methods=["GET"]),
        Route("/admin/restart", admin.restart, methods=["POST"]),
        Route("/admin/metrics", admin.metrics, methods=["GET"]),
        *more,
    ]
    handlers: Mapping[Any, Any] = {HTTPException: on_no_endpoint, KVFerryError: _on_error, ClientGone: _on_gone}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), keys)


class _Guard:
    """Nothing passes without a key; without keys, nothing that a browser sends for a web page."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        try:
            check_head(scope, headers)
            if self._keys.are_needed:
                self._keys.check(headers.get(b"authorization", b""))
            elif b"origin" in headers or not is_of_this_machine(headers.get(b"host", b"")):
                raise RequestError("not for browsers: set --admin-key", code="forbidden", status=403)
            await self._app(scope, receive, send)
        except KVFerryError as error:
            await failure_response(failure_of(error))(scope, receive, send)


@dataclass(slots=True, frozen=True)
class Admin:
    """The endpoints."""

    dispatchers: Sequence[AdminOperations]  # of every version
    scrape: Callable[[], Callable[[], tuple[bytes, str]]]  # what writes (text, media type) of the metrics, on a thread
    drain_s: float  # a drained worker's limit where the caller gives none
    launcher: LauncherLink | None
    is_leaving: IsLeaving = never_leaving

    async def workers(self, request: Request) -> Response:
        views = [dispatcher.view() for dispatcher in self.dispatchers]
        return JSONResponse(
            {
                "workers": [_describe(worker) for view in views for worker in view.workers],
                "avoided_handoffs": [pair for view in views for pair in _avoided(view)],
                "queued_requests": sum(view.num_queued for view in views),
                "live_requests": sum(view.num_in_flight for view in views),
            }
        )

    async def experts(self, request: Request) -> Response:
        workers = [worker for dispatcher in self.dispatchers for worker in dispatcher.view().workers]
        return JSONResponse(
            {"workers": [_experts(worker, load) for worker in workers if (load := worker.expert_load) is not None]}
        )

    async def drain(self, request: Request) -> Response:
        worker_id = request.path_params["worker_id"]
        limit_s = _limit_of(await json_body(request, {"timeout_s"}), self.drain_s)
        if not any(dispatcher.drain_worker(worker_id, limit_s) for dispatcher in self.dispatchers):
            raise RequestError(f"no worker {clip(worker_id)} is connected", code="worker_not_found", status=404)
        return JSONResponse({"worker_id": worker_id, "state": "draining", "timeout_s": limit_s}, 202)

    async def requests(self, request: Request) -> Response:
        query = dict(request.query_params)
        if unknown := sorted(query.keys() - {"kind", "class", "limit"}):
            raise RequestError(f"unknown parameter: {clip(unknown[0])}", param=unknown[0][:64], code="unknown_field")
        kind, limit = query.get("kind", "recent"), query.get("limit", "100")
        if kind not in KINDS:
            raise RequestError(f"kind: {clip(kind)} is none of {', '.join(KINDS)}", param="kind")
        if not limit.isascii() or not limit.isdigit() or len(limit) > 9 or not 1 <= int(limit) <= MAX_RECENT:
            raise RequestError(f"limit: a number from 1 to {MAX_RECENT}", param="limit")
        lists = [dispatcher.requests(kind, query.get("class"), int(limit)) for dispatcher in self.dispatchers]
        return JSONResponse({"requests": list(islice(_joined(kind, lists), int(limit)))})

    async def request(self, request: Request) -> Response:
        request_id = request.path_params["request_id"]
        known = next(filter(None, (dispatcher.request(request_id) for dispatcher in self.dispatchers)), None)
        if known is None:
            raise RequestError(
                f"request {clip(request_id)} is not under way here, and not among the last {MAX_RECENT}",
                code="request_not_found",
                status=404,
            )
        return JSONResponse(known)

    async def restart(self, request: Request) -> Response:
        if self.launcher is None:
            raise RequestError(
                "this router was started by hand: restart what you started", code="no_launcher", status=409
            )
        check_stays(self.is_leaving)
        self.launcher.send({"event": "restart_all"})
        return JSONResponse({"state": "restarting"}, 202)

    async def metrics(self, request: Request) -> Response:
        body, media_type = await asyncio.to_thread(self.scrape())
        return Response(body, media_type=media_type)


def _joined(kind: Kind, lists: Sequence[list[dict[str, object]]]) -> Iterable[dict[str, object]]:
    """Join the dispatchers' lists, each in its own order: the newest first; of the slowest, the slowest."""
    field, sign = ("ttft_ms", -1.0) if kind == "slowest" else ("age_s", 1.0)

    def rank(summary: dict[str, object]) -> float:
        value = summary.get(field)
        return sign * value if isinstance(value, int | float) else 0.0

    return heapq.merge(*lists, key=rank)


def _avoided(view: PoolView) -> list[list[str]]:
    """[prefill worker, decode worker] of every pair that is avoided."""
    names = {worker.session: worker.worker_id for worker in view.workers}
    return [[names[session] for session in pair] for pair in sorted(view.avoided_pairs)]


def _describe(worker: WorkerView) -> dict[str, object]:
    hello, status = worker.hello, worker.status
    leaves = status is not None and status.state == "ready" and not worker.is_ready
    state = "starting" if status is None else "draining" if leaves else status.state
    known: dict[str, object] = {
        "worker_id": worker.worker_id,
        "role": worker.role,
        "state": state,
        "pid": hello.pid,
        "version": hello.version,
        "heartbeat_age_s": round(worker.status_age_s, 3),
        "requests": worker.num_bound,  # of this router
    }
    if status is not None:
        known["load"] = {
            "running": status.num_running,
            "waiting": status.num_waiting,
            "waiting_tokens": status.waiting_tokens,
            "steps": status.steps,
        }
        known["blocks"] = {
            "total": status.num_blocks,
            "free": status.num_free_blocks,
            "cached": status.num_cached_blocks,
            "granted": status.num_granted_blocks,
            "quarantined": status.num_quarantined_blocks,
        }
    if worker.expert_load is not None:
        load = worker.expert_load
        known["experts"] = {"imbalance": load.imbalance, "rank_imbalance": load.rank_imbalance}
    return known


def _experts(worker: WorkerView, load: ExpertLoad) -> dict[str, object]:
    known = {"worker_id": worker.worker_id, "role": worker.role, "ranks": worker.hello.tp_size}
    layers = [
        {"layer": total.layer, "taken": total.taken, "recently_taken": recent.taken, "of_ranks": total.of_ranks}
        for total, recent in zip(load.total, load.recent, strict=True)
    ]
    return known | {"imbalance": load.imbalance, "rank_imbalance": load.rank_imbalance, "layers": layers}


def _limit_of(body: dict[str, object], default_s: float) -> float:
    limit_s = body.get("timeout_s", default_s)
    if isinstance(limit_s, bool) or not isinstance(limit_s, int | float) or not 0 <= limit_s <= _MAX_DRAIN_S:
        raise RequestError(f"timeout_s: a number of seconds from 0 to {_MAX_DRAIN_S:g}", param="timeout_s")
    return float(limit_s)


async def _on_error(_request: Request, error: KVFerryError) -> Response:
    return failure_response(failure_of(error))


async def _on_gone(_request: Request, _error: ClientGone) -> Response:
    return Response(status_code=CLIENT_CLOSED)  # nobody reads it
