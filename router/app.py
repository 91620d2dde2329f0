"""The HTTP application around its routes.

    middleware (id, key, errors) ─> routes.py ─> api/generation.py ─> reply.py
                                        └──> models, tokenize, health, metrics, version

It starts nothing and listens nowhere; `server.py` does.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from functools import partial

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import __version__
from ..common.clock import Clock
from ..common.router_config import UnknownFields
from .access.cors import Cors
from .access.hosts import HostNames
from .access.keys import ApiKeys
from .access.quota import Accounts, QuotaLimits, Quotas
from .admin.adapters import LOAD_PATH, UNLOAD_PATH, AdapterEndpoints, AdapterOperations
from .admin.json_body import client_body
from .api.body import MAX_BODY_BYTES
from .api.generation import Api
from .api.middleware import Endpoint, MiddlewareAdapter, RequestMiddleware, on_no_endpoint
from .batches.call import EndpointCalls
from .batches.files import FileStore
from .batches.folder import DataFolder
from .batches.keeper import Keeper
from .batches.routes import BatchRoutes
from .batches.run import RunDeps
from .batches.store import BatchStore
from .catalogue.catalogue import Catalogue
from .helpers.json_parser import JsonParser
from .kept.answers import KeptAnswers
from .kept.files import TASKS
from .messages.form import error_body
from .metrics.metrics import RouterMetrics
from .responses.background import BackgroundResponses
from .responses.event_files import EventFolder
from .responses.kept import KeptResponses
from .responses.states import BackgroundStates
from .responses.store import FolderStore, MemoryStore, ResponseStore
from .responses.task_folder import TaskFolder
from .routes import Routes, add_routes
from .state.classes import RequestClasses


def build_app(
    catalogue: Catalogue,
    metrics: RouterMetrics,
    *,
    clock: Clock,
    keys: ApiKeys | None = None,
    seed: int | None = None,
    quota: QuotaLimits | None = None,
    accounts: Accounts | None = None,
    share_prefix_cache: bool = False,
    classes: RequestClasses | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    allowed_hosts: tuple[str, ...] = (),
    allowed_origins: tuple[str, ...] = (),
    unknown_fields: UnknownFields = "refuse",
    data: DataFolder | None = None,
    max_batch_requests: int = 16,
    adapters: AdapterOperations | None = None,
    kept_answers: KeptAnswers | None = None,
    stores_responses: bool = True,
) -> Application:
    """The application. Batches run if there is a `data` folder to keep them in: up to `max_batch_requests` of their
    requests at once. `clock` is the dispatchers'.

    `keys`: without them nobody needs one. `seed` makes the seeds drawn for clients that give none repeatable.
    `share_prefix_cache` lets tenants find each other's prefixes. `adapters`: what clients may load; None: they may not.
    `kept_answers`: where clients that come back find their answers; None: nowhere. What `/v1/responses` answers is kept
    there too, or in memory, unless `stores_responses` is false.

    Where no keys are needed, and where `allowed_hosts` are given, a request must name one of those, an address or
    localhost.
    """
    api = Api(
        catalogue=catalogue,
        clock=clock,
        observer=metrics,
        random=random.Random(seed) if seed is not None else random.SystemRandom(),
        quotas=Quotas(quota or QuotaLimits(), clock, accounts),
        classes=classes or RequestClasses(),
        shares_prefixes=share_prefix_cache,
        max_body_bytes=max_body_bytes,
        refuses_unknown=unknown_fields == "refuse",
        kept_answers=kept_answers,
    )
    keys, cors = keys or ApiKeys(), Cors(allowed_origins)
    middleware = RequestMiddleware(
        keys=keys,
        clock=clock,
        observer=metrics,
        hosts=HostNames(allowed_hosts) if allowed_hosts or not keys.are_needed else None,
        cors=cors,
        error_shapes={"/v1/messages": error_body},
    )
    responses = KeptResponses(_response_store(kept_answers, clock) if stores_responses else None)
    states = _background_states(kept_answers, responses) if stores_responses else None
    background = BackgroundResponses(api, responses, states)
    routes = Routes(api, metrics, responses, background, has_data=data is not None)
    endpoints: dict[str, Endpoint] = {  # of which a batch may ask
        "/v1/chat/completions": routes.chat_completions,
        "/v1/completions": routes.completions,
        "/v1/responses": routes.responses,
        "/v1/embeddings": routes.embeddings,
    }
    batches = _batches(api, endpoints, metrics, keys, cors, data, max_batch_requests)
    shortcuts = {**endpoints, "/v1/messages": routes.messages}
    app = Application(middleware, shortcuts, api=api, background=background, keeper=batches.keeper)
    app.add_exception_handler(HTTPException, on_no_endpoint)
    add_routes(app, routes)
    if adapters is not None:
        loading = AdapterEndpoints(adapters, partial(client_body, api.body_room))
        app.add_api_route(LOAD_PATH, loading.load, methods=["POST"])
        app.add_api_route(UNLOAD_PATH, loading.unload, methods=["POST"])
    for method, path, endpoint in batches.table():
        app.add_api_route(path, endpoint, methods=[method])
    return app


def _response_store(answers: KeptAnswers | None, clock: Clock) -> ResponseStore:
    return MemoryStore(clock) if answers is None else FolderStore(answers.path / "responses")


def _background_states(answers: KeptAnswers | None, responses: KeptResponses) -> BackgroundStates | None:
    if answers is None:
        return None
    return BackgroundStates(responses, TaskFolder(answers.path / TASKS), EventFolder(answers.path / "events"))


def _batches(
    api: Api,
    endpoints: Mapping[str, Endpoint],
    metrics: RouterMetrics,
    keys: ApiKeys,
    cors: Cors,
    data: DataFolder | None,
    max_requests: int,
) -> BatchRoutes:
    """Return the endpoints of files and batches, whose lines are calls of these `endpoints`."""
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


class _WithoutSlash:
    """ASGI middleware that has a path with a slash at its end served as the one without."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and len(scope["path"]) > 1:
            scope["path"] = scope["path"].removesuffix("/")
        await self._app(scope, receive, send)


class Application(FastAPI):
    """FastAPI, but for the endpoints that are called all day: its layers and routes would cost them 40 us."""

    def __init__(
        self,
        middleware: RequestMiddleware,
        shortcuts: Mapping[str, Endpoint],
        *,
        api: Api,
        background: BackgroundResponses,
        keeper: Keeper | None,
    ) -> None:
        """`shortcuts`: what a POST to these paths gets. `keeper`: runs batches; None: there is no folder for them."""
        super().__init__(title="kvferry", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
        self._middleware = middleware
        self._shortcuts = shortcuts
        self.api, self.background, self.keeper = api, background, keeper
        self.add_middleware(_WithoutSlash)  # inside the next one: which path needs no key goes by its exact spelling
        self.add_middleware(MiddlewareAdapter, middleware)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        endpoint = self._shortcuts.get(scope["path"]) if is_post else None
        if endpoint is not None:
            await self._middleware.serve(endpoint, scope, receive, send)
        else:
            await super().__call__(scope, receive, send)
