"""A request leaves nothing for the collector of garbage: what it held goes with its last user.

A collection stops every stream: with cycles in each request they took tens of milliseconds, the full one a third of a
second.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvferry.benchmarks.fuzz.target import MODEL, SECRET, InstantWorker
from kvferry.common.clock import SystemClock
from kvferry.common.router_config import RouterConfig
from kvferry.router.app import build_app
from kvferry.router.catalogue.version import ServedModel
from kvferry.router.dispatch.control import ControlServer
from kvferry.router.dispatch.dispatcher import Dispatcher
from kvferry.router.http.http_server import HttpServer
from kvferry.router.metrics.metrics import RouterMetrics
from kvferry.router.placement import make_policy
from kvferry.router.state.predictor import Predictor
from kvferry.settings.sockets import listen
from kvferry.wire.address import Address
from kvferry.wire.credentials import SharedSecret

from .fakes import MAX_MODEL_LEN, VOCAB_SIZE, catalogue_of

OF_A_REQUEST = {
    "Answer", "Attempt", "ChunkEncoder", "ChatTurns", "Connection", "Reply", "RequestContext", "RequestResponseCycle",
    "ResponseForm", "RouterRequest", "Search", "TokenStream", "TrackedRequest",
}  # fmt: skip
STREAM = {"prompt": "hi", "stream": True}
LONG = {"prompt": "hi", "stream": True, "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module", autouse=True)
def _own_objects_alone() -> None:
    """Objects of what ran before in this process stay out of collections and lists of objects: each looks at all."""
    gc.collect()
    gc.freeze()


@asynccontextmanager
async def _serving() -> AsyncIterator[tuple[str, int]]:
    """A whole router with a worker that makes tokens up."""
    config = RouterConfig(model_dir=Path("/"), served_model_name=MODEL, expect_prefill=False)
    predictor, metrics, clock = Predictor(), RouterMetrics(MODEL), SystemClock()
    dispatcher = Dispatcher(config, make_policy(config, predictor), clock, metrics, predictor=predictor)
    model = ServedModel(MODEL, MAX_MODEL_LEN, VOCAB_SIZE)
    catalogue = catalogue_of(dispatcher, model)
    app = build_app(catalogue, metrics, clock=clock)
    control = ControlServer(catalogue, router_id="router-x", secret=SharedSecret(SECRET.encode()))
    address = await control.start(Address("127.0.0.1", 0))
    worker = await InstantWorker.join(address, MAX_MODEL_LEN)
    working = asyncio.create_task(worker.work())
    sock = listen(Address("127.0.0.1", 0))
    try:
        async with HttpServer(app).serving(sock):
            while dispatcher.ready():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            yield sock.getsockname()
    finally:
        working.cancel()
        worker.leave()
        await control.close()
        app.api.close()


async def _ask(address: tuple[str, int], body: dict[str, object], path: str = "/v1/completions") -> bytes:
    """A connection of its own, and all that comes."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    reader, writer = await asyncio.open_connection(*address)
    writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data)
    answer = await reader.read()
    writer.close()
    return answer


async def _leave(address: tuple[str, int], body: dict[str, object]) -> None:
    data = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    reader, writer = await asyncio.open_connection(*address)
    writer.write(head + b"content-length: %d\r\n\r\n" % len(data) + data)
    await reader.readuntil(b"data: ")
    writer.transport.abort()


def _living(but: Sequence[object] = ()) -> list[object]:
    known = set(map(id, but))
    return [each for each in gc.get_objects() if type(each).__name__ in OF_A_REQUEST and id(each) not in known]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["whole", "stream", "chat", "tools", "responses", "messages", "refused", "unknown", "left"]
)
async def test_what_a_request_held_is_gone_without_a_collection(kind: str) -> None:
    async with _serving() as address:
        gc.collect()
        others = _living()  # of other tests
        gc.disable()
        try:
            for _ in range(3):
                match kind:
                    case "whole":
                        assert b'"finish_reason"' in await _ask(address, {"prompt": "hi"})
                    case "stream":
                        assert b"[DONE]" in await _ask(address, STREAM)
                    case "chat":
                        chat: dict[str, object] = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
                        assert b"[DONE]" in await _ask(address, chat, "/v1/chat/completions")
                    case "tools":
                        tool = {"type": "function", "function": {"name": "f"}}
                        called = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool], "max_tokens": 4}
                        assert b'"finish_reason"' in await _ask(address, called, "/v1/chat/completions")
                    case "responses":
                        asked: dict[str, object] = {"input": "hi", "stream": True, "max_output_tokens": 4}
                        assert b"response.incomplete" in await _ask(address, asked, "/v1/responses")
                    case "messages":
                        said: list[object] = [{"role": "user", "content": "hi"}]
                        message = {"messages": said, "max_tokens": 4, "stream": True}
                        assert b"message_stop" in await _ask(address, message, "/v1/messages")
                    case "refused":
                        assert b" 400 " in await _ask(address, {"prompt": "hi", "n": 1000})
                    case "unknown":
                        assert b" 404 " in await _ask(address, {}, "/v1/unknown")
                    case "left":
                        await _leave(address, LONG)
            async with asyncio.timeout(30):
                while _living(others):  # noqa: ASYNC110  # some are held until their next look is due
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pytest.fail(f"these wait for a collection: {_living(others)}")
        finally:
            gc.enable()
