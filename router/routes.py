"""The endpoints of the API as methods, and their paths. Those that generate hand on to `api/`."""

from __future__ import annotations

import asyncio
import functools
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from .. import __version__
from ..models.probes import probe_distance
from .api.generation import Api
from .api.json_answers import Json
from .api.middleware import context_of
from .api.openai_types import Detokenized, Model, ModelList, PoolCounts, Tokenized
from .api.reply import Reply
from .bodies.schemas import ChatBody, CompletionBody
from .bodies.text_bodies import DetokenizeBody, EmbeddingBody, TokenizeBody
from .catalogue.version import ServedModel, Version
from .embeddings.endpoint import embed
from .messages.surface import MessagesSurface
from .metrics.metrics import RouterMetrics
from .responses.background import BackgroundResponses
from .responses.endpoints import KeptEndpoints, events_after
from .responses.kept import KeptResponses
from .responses.surface import ResponsesSurface
from .state.errors import unknown_path

_ANTHROPIC = "anthropic-version"  # a header of its clients
COUNT_PATH = "/v1/messages/count_tokens"
_COUNT_RESPONSE_PATH = "/v1/responses/input_tokens"
_PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", _COUNT_RESPONSE_PATH, "/v1/messages", COUNT_PATH,
    "/v1/embeddings", "/v1/models", "/tokenize", "/detokenize", "/live", "/ready", "/health", "/ping",
    "/metrics", "/version", "/openapi.json",
)  # fmt: skip
_PATHS_OF_DATA = ("/v1/files", "/v1/batches")  # where there is a folder for them


class Routes:
    """The endpoints as methods: each takes the request and gives a response."""

    def __init__(
        self,
        api: Api,
        metrics: RouterMetrics,
        responses: KeptResponses,
        background: BackgroundResponses,
        *,
        has_data: bool,
    ) -> None:
        """`has_data`: there is a folder for files and batches."""
        self._api = api
        self._metrics = metrics
        self._root = {"server": "kvferry", "paths": _PATHS + _PATHS_OF_DATA * has_data}
        self._kept = responses
        self._background = background
        self.kept = KeptEndpoints(self._kept, api.kept_answers)

    async def completions(self, request: Request) -> Reply:
        return await self._api.complete(request)

    async def chat_completions(self, request: Request) -> Reply:
        return await self._api.chat(request)

    async def responses(self, request: Request) -> Response:
        context = context_of(request.scope)
        surface = ResponsesSurface(
            self._kept,
            context.tenant,
            context.request_id,
            keeps=self._kept.are_kept and not context.is_background,
            goes_on=self._background.are_possible,
        )
        reply = await self._api.chat(request, surface)
        if not surface.is_background:
            return reply
        return await self._background.begin(request.scope, reply, surface)

    async def show_response(self, request: Request, response_id: str) -> Response:
        after, tenant = events_after(request.query_params), context_of(request.scope).tenant
        if after is None:
            return Json(self._background.shown(response_id, tenant))
        return self._background.follow(response_id, tenant, after)

    async def cancel_response(self, request: Request, response_id: str) -> Response:
        return Json(await self._background.cancel(response_id, context_of(request.scope).tenant))

    async def delete_response(self, request: Request, response_id: str) -> Response:
        tenant = context_of(request.scope).tenant
        await self._background.stop(response_id, tenant)
        shown = await self.kept.delete(request, response_id)
        self._background.forget(response_id, tenant)
        return shown

    async def messages(self, request: Request) -> Reply:
        return await self._api.chat(request, MessagesSurface())

    async def embeddings(self, request: Request) -> Reply:
        return await embed(self._api, request)

    async def count_messages(self, request: Request) -> Response:
        num_tokens = await self._api.count_chat(request, MessagesSurface(counts_only=True))
        return Json({"input_tokens": num_tokens})

    async def count_response(self, request: Request) -> Response:
        context = context_of(request.scope)
        surface = ResponsesSurface(self._kept, context.tenant, context.request_id, keeps=False)
        num_tokens = await self._api.count_chat(request, surface)
        return Json({"object": "response.input_tokens", "input_tokens": num_tokens})

    async def only_post(self) -> Response:
        """Answer for a path that looks like a response's id and is none."""
        raise HTTPException(405, headers={"allow": "POST"})

    async def unknown(self, request: Request) -> Response:
        """Answer for a path that others' servers have, where its method looks like a wrong one."""
        raise unknown_path(request.url.path)

    async def models(self, request: Request) -> Response:
        listed = ModelList(data=[self._model(request, name, version) for name, version in self._api.catalogue.shown()])
        if _ANTHROPIC in request.headers:
            listed.has_more = False
            listed.first_id, listed.last_id = (listed.data[at].id if listed.data else None for at in (0, -1))
        return Json(listed)

    async def model(self, request: Request, name: str) -> Response:
        return Json(self._model(request, name, self._api.catalogue.version(name)))

    def _model(self, request: Request, name: str, version: Version) -> Model:
        model, view = version.model, version.dispatcher.view()
        hellos = [worker.hello for worker in view.workers]
        probes = {hello.quantization: hello.probe for hello in hellos}
        shown = Model(
            id=name,
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
        return _with_anthropics(shown, model) if _ANTHROPIC in request.headers else shown

    async def tokenize(self, request: Request) -> Response:
        prompts = self._api.prompts
        with self._api.body_room.held() as held:
            body, version = await self._api.body(request, held, TokenizeBody)
            ids, ignored = await prompts.tokenize(
                version, body, held.num_bytes, refuses_unknown=self._api.refuses_unknown
            )
        self._api.tell_ignored(context_of(request.scope), ignored)
        names = await prompts.names(version, ids) if body.return_token_strs else None
        limit = version.model.max_model_len
        return Json(Tokenized(count=len(ids), max_model_len=limit, tokens=ids, token_strs=names))

    async def detokenize(self, request: Request) -> Response:
        with self._api.body_room.held() as held:
            body, version = await self._api.body(request, held, DetokenizeBody)
            return Json(Detokenized(prompt=await self._api.prompts.decode(version, body.tokens)))

    async def root(self) -> Response:
        """List what there is."""
        return Json(self._root)

    async def live(self) -> Response:
        """The process answers."""
        return Json({"status": "live"})

    async def ready(self) -> Response:
        """A request that came now would be answered; 503 and why not otherwise."""
        reasons = self._api.catalogue.ready()
        if self._api.in_flight.is_leaving or self._api.in_flight.is_closing:
            reasons = ["the server is shutting down"]
        if not reasons:
            return Json({"status": "ready", "reasons": []})
        error = {"message": "; ".join(reasons), "type": "server_error", "param": None, "code": "not_ready"}
        return Json({"status": "not ready", "reasons": reasons, "error": error}, 503, {"retry-after": "1"})

    async def metrics(self) -> Response:
        scrape = self._metrics.scrape(self._api.catalogue.views(), num_in_flight=len(self._api.in_flight))
        body, media_type = await asyncio.to_thread(scrape)
        return Response(body, media_type=media_type)

    async def version(self) -> Response:
        return Json({"version": __version__})


def add_routes(app: FastAPI, routes: Routes) -> None:
    app.add_api_route("/v1/completions", routes.completions, methods=["POST"], openapi_extra=_takes(CompletionBody))
    app.add_api_route("/v1/chat/completions", routes.chat_completions, methods=["POST"], openapi_extra=_takes(ChatBody))
    app.add_api_route("/v1/responses", routes.responses, methods=["POST"])
    app.add_api_route(_COUNT_RESPONSE_PATH, routes.count_response, methods=["POST"])
    app.add_api_route(_COUNT_RESPONSE_PATH, routes.only_post, methods=["GET", "DELETE"], include_in_schema=False)
    app.add_api_route("/v1/responses/compact", routes.unknown, methods=["POST"], include_in_schema=False)
    app.add_api_route("/v1/responses/{response_id}", routes.show_response, methods=["GET"])
    app.add_api_route("/v1/responses/{response_id}", routes.delete_response, methods=["DELETE"])
    app.add_api_route("/v1/responses/{response_id}/cancel", routes.cancel_response, methods=["POST"])
    app.add_api_route("/v1/responses/{response_id}/input_items", routes.kept.items, methods=["GET"])
    app.add_api_route("/v1/messages", routes.messages, methods=["POST"])
    app.add_api_route("/v1/embeddings", routes.embeddings, methods=["POST"], openapi_extra=_takes(EmbeddingBody))
    app.add_api_route(COUNT_PATH, routes.count_messages, methods=["POST"])
    app.add_api_route("/tokenize", routes.tokenize, methods=["POST"], openapi_extra=_takes(TokenizeBody))
    app.add_api_route("/detokenize", routes.detokenize, methods=["POST"], openapi_extra=_takes(DetokenizeBody))
    for path, endpoint in (
        ("/", routes.root),
        ("/v1/models", routes.models),
        ("/v1/models/{name:path}", routes.model),
        ("/live", routes.live),
        ("/ready", routes.ready),
        ("/health", routes.ready),
        ("/ping", routes.ready),
        ("/metrics", routes.metrics),
        ("/version", routes.version),
    ):
        app.add_api_route(path, endpoint, methods=["GET"])
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)  # some scrapers ask so first
    app.add_api_route("/ping", routes.ready, methods=["POST"], include_in_schema=False)  # SageMaker's name of it


def _with_anthropics(shown: Model, model: ServedModel) -> Model:
    """Return a model's entry with the fields that Anthropic's clients read beside OpenAI's."""
    shown.type, shown.display_name, shown.lifecycle = "model", shown.id, "active"
    shown.created_at = datetime.fromtimestamp(shown.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    shown.max_input_tokens = model.max_model_len if model.generates else model.max_embedded_tokens
    shown.max_tokens = model.max_model_len if model.generates else None
    return shown


@functools.cache
def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    """The body in /openapi.json. It is checked by `schemas.validate`, whose errors are in OpenAI's shape."""
    schema = kind.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
