"""The HTTP application: routes, and the small endpoints beside the two that generate.

    middleware (id, key, errors) ─> route ─> generation.py ─> reply.py
                                       └──> models, tokenize, health, metrics, version

It starts nothing and listens nowhere; `server.py` does.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .. import __version__
from ..common.clock import Clock, SystemClock
from ..common.config import UnknownFields
from ..common.errors import RequestError
from ..models.probes import probe_distance
from .access.cors import Cors
from .access.hosts import HostNames
from .access.keys import ApiKeys
from .access.quota import QuotaLimits, Quotas
from .admin.adapters import LOAD_PATH, UNLOAD_PATH, AdapterEndpoints, AdapterOperations
from .api.body import MAX_BODY_BYTES
from .api.generation import Api
from .api.middleware import Endpoint, MiddlewareAdapter, RequestMiddleware, context_of
from .api.openai_types import Detokenized, Model, ModelList, PoolCounts, Struct, Tokenized
from .api.reply import Reply
from .api.schemas import ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, TokenizeBody
from .batches.call import EndpointCalls
from .batches.files import FileStore
from .batches.folder import DataFolder
from .batches.routes import BatchRoutes
from .batches.run import RunDeps
from .batches.store import BatchStore
from .catalogue.catalogue import Catalogue
from .catalogue.version import Version
from .embeddings.endpoint import embed
from .helpers.json_parser import JsonParser
from .messages.form import error_body
from .messages.surface import MessagesSurface
from .metrics.metrics import RouterMetrics
from .responses.kept import KeptResponses
from .responses.surface import ResponsesSurface
from .state.classes import RequestClasses
from .state.errors import failure_of, unknown_path

_COUNT_PATH = "/v1/messages/count_tokens"
_PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", _COUNT_PATH, "/v1/embeddings",
    "/v1/models", "/tokenize", "/detokenize", "/live", "/ready", "/health", "/metrics", "/version", "/openapi.json",
)  # fmt: skip
_PATHS_OF_DATA = ("/v1/files", "/v1/batches")  # where there is a folder for them


def build_app(
    catalogue: Catalogue,
    metrics: RouterMetrics,
    *,
    keys: ApiKeys | None = None,
    clock: Clock | None = None,
    seed: int | None = None,
    quota: QuotaLimits | None = None,
    share_prefix_cache: bool = False,
    classes: RequestClasses | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    allowed_hosts: tuple[str, ...] = (),
    allowed_origins: tuple[str, ...] = (),
    unknown_fields: UnknownFields = "refuse",
    data: DataFolder | None = None,
    max_batch_requests: int = 16,
    adapters: AdapterOperations | None = None,
) -> FastAPI:
    """The application; `app.state.api` is the `Api` behind it, `app.state.keeper` runs batches, if there is a `data`
    folder to keep them in: up to `max_batch_requests` of their requests at once. `clock` is the dispatchers'.

    `keys`: without them nobody needs one. `seed` makes the seeds drawn for clients that give none repeatable.
    `share_prefix_cache` lets tenants find each other's prefixes. `adapters`: what clients may load; None: they may not.

    Where no keys are needed, and where `allowed_hosts` are given, a request must name one of those, an address or
    localhost.
    """
    clock = clock or SystemClock()
    api = Api(
        catalogue=catalogue,
        clock=clock,
        observer=metrics,
        random=random.Random(seed) if seed is not None else random.SystemRandom(),
        quotas=Quotas(quota or QuotaLimits(), clock),
        classes=classes or RequestClasses(),
        shares_prefixes=share_prefix_cache,
        max_body_bytes=max_body_bytes,
        refuses_unknown=unknown_fields == "refuse",
    )
    keys, cors = keys or ApiKeys(), Cors(allowed_origins)
    middleware = RequestMiddleware(
        keys=keys,
        clock=clock,
        observer=metrics,
        hosts=HostNames(allowed_hosts) if allowed_hosts or not keys.are_needed else None,
        cors=cors,
        error_bodies={"/v1/messages": error_body, _COUNT_PATH: error_body},
    )
    routes = _Routes(api, metrics, has_data=data is not None)
    app = _Application(middleware, routes)
    app.state.api = api
    batches = _batches(api, routes, metrics, keys, cors, data, max_batch_requests)
    app.state.keeper = batches.keeper
    app.add_exception_handler(HTTPException, _on_http_error)
    _add_routes(app, routes)
    if adapters is not None:
        endpoints = AdapterEndpoints(adapters)
        app.add_api_route(LOAD_PATH, endpoints.load, methods=["POST"])
        app.add_api_route(UNLOAD_PATH, endpoints.unload, methods=["POST"])
    for method, path, endpoint in batches.table():
        app.add_api_route(path, endpoint, methods=[method])
    return app


def _batches(
    api: Api,
    routes: _Routes,
    metrics: RouterMetrics,
    keys: ApiKeys,
    cors: Cors,
    data: DataFolder | None,
    max_requests: int,
) -> BatchRoutes:
    """Return the endpoints of files and batches, whose lines are calls of the endpoints here."""
    endpoints: dict[str, Endpoint] = {
        "/v1/chat/completions": routes.chat_completions,
        "/v1/completions": routes.completions,
        "/v1/responses": routes.responses,
        "/v1/embeddings": routes.embeddings,
    }
    deps = None
    if data is not None:
        deps = RunDeps(
            store=BatchStore(data),
            files=FileStore(data),
            caller=EndpointCalls(endpoints, api.clock),
            json=JsonParser(),
            check_model=api.catalogue.version,
            tenant_of=keys.tenant_of,
            slots=asyncio.Semaphore(max_requests),
            on_line=metrics.on_batch_line,
        )
    return BatchRoutes(
        deps,
        endpoints=tuple(endpoints),
        model=api.catalogue.version(None).model.name,
        owner_of=keys.owner_of,
        body_room=api.body_room,
        check_form=cors.check_form,
    )


class _Application(FastAPI):
    """FastAPI, but for the two endpoints that are called all day: its layers and routes would cost them 40 us."""

    def __init__(self, middleware: RequestMiddleware, routes: _Routes) -> None:
        super().__init__(title="kvferry", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
        self._middleware = middleware
        self._shortcuts: dict[tuple[str, str], Endpoint] = {
            ("POST", "/v1/completions"): routes.completions,
            ("POST", "/v1/chat/completions"): routes.chat_completions,
            ("POST", "/v1/messages"): routes.messages,
            ("POST", "/v1/responses"): routes.responses,
            ("POST", "/v1/embeddings"): routes.embeddings,
        }
        self.add_middleware(MiddlewareAdapter, middleware)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._shortcuts.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if endpoint is not None:
            await self._middleware.serve(endpoint, scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class _Routes:
    """The endpoints as methods: each takes the request and gives a response."""

    def __init__(self, api: Api, metrics: RouterMetrics, *, has_data: bool) -> None:
        """`has_data`: there is a folder for files and batches."""
        self._api = api
        self._metrics = metrics
        paths = _PATHS + _PATHS_OF_DATA * has_data
        self._root = msgspec.json.encode({"server": "kvferry", "paths": paths})
        self._kept = KeptResponses(api.clock)

    async def completions(self, request: Request) -> Reply:
        return await self._api.complete(request)

    async def chat_completions(self, request: Request) -> Reply:
        return await self._api.chat(request)

    async def responses(self, request: Request) -> Reply:
        return await self._api.chat(request, ResponsesSurface(self._kept, context_of(request.scope).tenant))

    async def messages(self, request: Request) -> Reply:
        return await self._api.chat(request, MessagesSurface())

    async def embeddings(self, request: Request) -> Reply:
        return await embed(self._api, request)

    async def count_messages(self, request: Request) -> Response:
        num_tokens = await self._api.count_chat(request, MessagesSurface(counts_only=True))
        return Response(msgspec.json.encode({"input_tokens": num_tokens}), media_type="application/json")

    async def models(self) -> Response:
        return _json(ModelList(data=[self._model(version) for version in self._api.catalogue.shown()]))

    async def model(self, name: str) -> Response:
        return _json(self._model(self._api.catalogue.version(name)))

    def _model(self, version: Version) -> Model:
        model, view = version.model, version.dispatcher.view()
        hellos = [worker.hello for worker in view.workers]
        probes = {hello.quantization: hello.probe for hello in hellos}
        return Model(
            id=model.name,
            created=self._api.started_s,
            root=model.name if version.adapter is None else version.adapter.path,
            parent=version.parent or None,
            max_model_len=model.max_model_len,
            kvferry=PoolCounts(
                prefill_workers=len(view.ready("prefill")),
                decode_workers=len(view.ready("decode")),
                quantization=", ".join(sorted(probes)) if len(probes) > 1 else model.quantization,
                logprob_distance=probe_distance(probes.values()),
            ),
        )

    async def tokenize(self, request: Request) -> Response:
        prompts = self._api.prompts
        with self._api.body_room.held() as held:
            body, version = await self._api.body(request, held, TokenizeBody)
            ids = await prompts.tokenize(version, body, held.num_bytes)
        names = await prompts.names(version, ids) if body.return_token_strs else None
        limit = version.model.max_model_len
        return _json(Tokenized(count=len(ids), max_model_len=limit, tokens=ids, token_strs=names))

    async def detokenize(self, request: Request) -> Response:
        with self._api.body_room.held() as held:
            body, version = await self._api.body(request, held, DetokenizeBody)
            return _json(Detokenized(prompt=await self._api.prompts.decode(version, body.tokens)))

    async def root(self) -> Response:
        """List what there is."""
        return Response(self._root, media_type="application/json")

    async def live(self) -> Response:
        """The process answers."""
        return Response(b'{"status":"live"}', media_type="application/json")

    async def ready(self) -> Response:
        """A request that came now would be answered; 503 and why not otherwise."""
        reasons = self._api.catalogue.ready()
        if self._api.in_flight.is_leaving or self._api.in_flight.is_closing:
            reasons = ["the server is shutting down"]
        if not reasons:
            return Response(b'{"status":"ready","reasons":[]}', media_type="application/json")
        error = {"message": "; ".join(reasons), "type": "server_error", "param": None, "code": "not_ready"}
        body = msgspec.json.encode({"status": "not ready", "reasons": reasons, "error": error})
        return Response(body, 503, {"retry-after": "1"}, media_type="application/json")

    async def metrics(self) -> Response:
        body, media_type = self._metrics.render(self._api.catalogue.views(), num_in_flight=len(self._api.in_flight))
        return Response(body, media_type=media_type)

    async def version(self) -> Response:
        return Response(msgspec.json.encode({"version": __version__}), media_type="application/json")


def _add_routes(app: FastAPI, routes: _Routes) -> None:
    app.add_api_route("/v1/completions", routes.completions, methods=["POST"], openapi_extra=_takes(CompletionBody))
    app.add_api_route("/v1/chat/completions", routes.chat_completions, methods=["POST"], openapi_extra=_takes(ChatBody))
    app.add_api_route("/v1/responses", routes.responses, methods=["POST"])
    app.add_api_route("/v1/messages", routes.messages, methods=["POST"])
    app.add_api_route("/v1/embeddings", routes.embeddings, methods=["POST"], openapi_extra=_takes(EmbeddingBody))
    app.add_api_route(_COUNT_PATH, routes.count_messages, methods=["POST"])
    app.add_api_route("/tokenize", routes.tokenize, methods=["POST"], openapi_extra=_takes(TokenizeBody))
    app.add_api_route("/detokenize", routes.detokenize, methods=["POST"], openapi_extra=_takes(DetokenizeBody))
    for path, endpoint in (
        ("/", routes.root),
        ("/v1/models", routes.models),
        ("/v1/models/{name:path}", routes.model),
        ("/live", routes.live),
        ("/ready", routes.ready),
        ("/health", routes.ready),
        ("/metrics", routes.metrics),
        ("/version", routes.version),
    ):
        app.add_api_route(path, endpoint, methods=["GET"])
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)  # some scrapers ask so first


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    """The body in /openapi.json. It is checked by `schemas.validate`, whose errors are in OpenAI's shape."""
    schema = kind.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _json(value: Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Answer what Starlette itself refuses: a path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        failure = failure_of(unknown_path(request.url.path))
    else:
        message = f"{request.method[:16]} {request.url.path[:64]}: {error.detail}"
        failure = failure_of(RequestError(message, code="method_not_allowed", status=error.status_code))
    response = Response(failure.body, failure.status, error.headers)
    response.raw_headers.extend(failure.headers)
    return response
