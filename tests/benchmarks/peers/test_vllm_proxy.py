from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn

from kvferry.benchmarks.peers.vllm_proxy import Proxy
from kvferry.tools.load.endpoint import Endpoint
from kvferry.tools.load.http_client import HttpClient

from ..scripted_server import Received, Script, ScriptedServer, answer, scripted_server

PARAMS = {"remote_engine_id": "e", "remote_block_ids": [1, 2]}


def prefill(_: Received) -> Script:
    body = json.dumps({"choices": [], "kv_transfer_params": PARAMS}).encode()
    return Script([body], content_type="application/json")


def decode(request: Received) -> Script:
    if request.path == "/v1/models":
        return Script([b'{"data": [{"id": "m"}]}'], content_type="application/json")
    return Script(answer(3))


@asynccontextmanager
async def proxy_over(prefill_server: ScriptedServer, decode_server: ScriptedServer) -> AsyncIterator[str]:
    config = uvicorn.Config(
        Proxy(prefill_server.base_url, decode_server.base_url), port=0, log_level="critical", lifespan="off"
    )
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await server.shutdown()


async def test_request_goes_to_prefill_and_then_with_its_blocks_to_decode() -> None:
    async with (
        scripted_server(prefill) as prefill_server,
        scripted_server(decode) as decode_server,
        proxy_over(prefill_server, decode_server) as url,
    ):
        endpoint = Endpoint(url, model="m")
        record = await endpoint.send([1, 2], 3)
        endpoint.close()
    assert record.error is None
    assert record.chunk_tokens == [1, 1, 1]
    asked, wanted = prefill_server.requests[0], decode_server.requests[0]
    assert (asked.body["stream"], asked.body["max_tokens"]) == (False, 1)
    assert "stream_options" not in asked.body
    assert asked.body["kv_transfer_params"]["do_remote_decode"] is True  # type: ignore[index]
    assert wanted.body["kv_transfer_params"] == PARAMS
    assert (wanted.body["stream"], wanted.body["max_tokens"], wanted.body["prompt"]) == (True, 3, [1, 2])
    assert asked.headers["x-request-id"] == wanted.headers["x-request-id"]


async def test_refusal_of_prefill_is_the_answer() -> None:
    refusal = Script([b'{"error": {"message": "too long"}}'], status=400)
    async with (
        scripted_server(lambda _: refusal) as prefill_server,
        scripted_server(decode) as decode_server,
        proxy_over(prefill_server, decode_server) as url,
    ):
        record = await Endpoint(url, model="m").send([1], 3)
    assert record.error == "HTTP 400: too long"
    assert decode_server.requests == []


async def test_prefill_without_blocks_is_an_error() -> None:
    async with (
        scripted_server(lambda _: Script([b"{}"])) as prefill_server,
        scripted_server(decode) as decode_server,
        proxy_over(prefill_server, decode_server) as url,
    ):
        record = await Endpoint(url, model="m").send([1], 3)
    assert record.error == "HTTP 502: the prefill server gave no kv_transfer_params"


async def test_answer_that_breaks_off_at_decode_breaks_off_here() -> None:
    async with (
        scripted_server(prefill) as prefill_server,
        scripted_server(lambda _: Script(answer(3)[:2], is_cut=True)) as decode_server,
        proxy_over(prefill_server, decode_server) as url,
    ):
        record = await Endpoint(url, model="m").send([1], 3)
    assert record.chunk_tokens == [1]
    assert record.error is not None
    assert record.error.startswith("connection closed before the end")


async def test_models_are_those_of_decode_and_health_is_its_own() -> None:
    async with (
        scripted_server(prefill) as prefill_server,
        scripted_server(decode) as decode_server,
        proxy_over(prefill_server, decode_server) as url,
    ):
        client = HttpClient(url)
        assert (await client.read("GET", "/v1/models"))[1] == b'{"data": [{"id": "m"}]}'
        assert (await client.read("GET", "/health"))[0].status == 200
        client.close()
    assert prefill_server.requests == []
