"""Adapters (LoRA) while the server runs, in vLLM's words.

POST /v1/load_lora_adapter     {"lora_name": ..., "lora_path": ..., "load_inplace": false, "base_model_name": ...}
POST /v1/unload_lora_adapter   {"lora_name": ...}

The admin listener has them wherever adapters are served; the public one only where clients may do this
(--allow-runtime-lora-updating): a path is read on the server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from collections.abc import Set as AbstractSet
from typing import Protocol

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ...common.errors import RequestError
from .json_body import json_body

LOAD_PATH, UNLOAD_PATH = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_LOAD_FIELDS = {"lora_name", "lora_path", "load_inplace", "base_model_name"}


class AdapterOperations(Protocol):
    """`AdapterOperations` are what these endpoints need of whoever names adapters."""

    async def load(self, name: str, path: str, *, in_place: bool, base: str | None = None) -> None: ...
    async def unload(self, name: str) -> None: ...


ReadBody = Callable[[Request, AbstractSet[str]], Awaitable[dict[str, object]]]  # with these fields and no others


class AdapterEndpoints:
    """The endpoints as methods."""

    def __init__(self, adapters: AdapterOperations, read_body: ReadBody = json_body) -> None:
        self._adapters = adapters
        self._read_body = read_body

    async def load(self, request: Request) -> Response:
        body = await self._read_body(request, _LOAD_FIELDS)
        name, path, base = _text(body, "lora_name"), _text(body, "lora_path"), body.get("base_model_name")
        in_place = body.get("load_inplace", False)
        if not isinstance(in_place, bool):
            raise RequestError("load_inplace: true or false", param="load_inplace")
        if base is not None and not isinstance(base, str):
            raise RequestError("base_model_name: a name", param="base_model_name")
        await self._adapters.load(name, path, in_place=in_place, base=base)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        body = await self._read_body(request, {"lora_name", "lora_int_id"})
        name = _text(body, "lora_name")
        await self._adapters.unload(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def adapter_routes(adapters: AdapterOperations) -> list[Route]:
    endpoints = AdapterEndpoints(adapters)
    return [
        Route(LOAD_PATH, endpoints.load, methods=["POST"]),
        Route(UNLOAD_PATH, endpoints.unload, methods=["POST"]),
    ]


def _text(body: dict[str, object], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise RequestError(f"'{name}' needs to be provided.", param=name)
    return value
