"""A stub OpenAI server that streams and computes nothing: what a router that only forwards is put in front of.

    python -m kvferry.benchmarks.overhead.openai_stub PORT [PORT ...] --records FILE [--step-ms MS]

Each port is a worker: all of its streams advance together, one token and one event each at every step. Everything
but a completion is answered with 200 and a model's name. Ends with SIGTERM, and writes when each token left.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import cast

import httptools
import msgspec
import uvloop

from kvferry.benchmarks.overhead.steps import MODEL, Records, Steps, StubStream

_ABOUT = {
    "status": "ready",
    "model_id": MODEL,
    "model_path": MODEL,
    "served_model_name": MODEL,
    "object": "list",
    "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "stub", "max_model_len": 1 << 17}],
}
_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_EVENT = (
    b'data: {"id":"%b","object":"text_completion","created":0,"model":"overhead","choices":'
    b'[{"index":0,"text":"%c","logprobs":null,"finish_reason":%b}]}\n\n'
)
_LETTERS = b"abcdefghijklmnopqrstuvwxyz"


class _Asked(msgspec.Struct):
    max_tokens: int = 16


class Worker:
    """One port's streams."""

    def __init__(self, step_s: float, records: Records, phase: float) -> None:
        self.steps = Steps(step_s, self._emit, phase=phase)
        self.records = records
        self._transports: dict[str, asyncio.Transport] = {}

    def open(self, name: str, num_tokens: int, transport: asyncio.Transport, received_s: float) -> None:
        """The first token at once, as from a prefill that takes no time."""
        self._transports[name] = transport
        stream = self.records.open(name, num_tokens)
        transport.write(_HEAD)
        stream.own_s = perf_counter() - received_s
        self._write(stream)
        self.steps.add(stream)

    def leave(self, transport: asyncio.Transport) -> None:
        for name in [name for name, other in self._transports.items() if other is transport]:
            self._transports.pop(name)
            self.steps.drop(name)

    def _emit(self, streams: list[StubStream]) -> None:
        for stream in streams:
            self._write(stream)

    def _write(self, stream: StubStream) -> None:
        index = len(stream.emitted_s)
        stream.emitted_s.append(perf_counter())
        event = _EVENT % (stream.name.encode(), _LETTERS[index % 26], b'"length"' if stream.is_over else b"null")
        if stream.is_over:
            event += b"data: [DONE]\n\n"
        chunk = b"%x\r\n%b\r\n" % (len(event), event)
        transport = self._transports[stream.name]
        if stream.is_over:
            chunk += b"0\r\n\r\n"
            del self._transports[stream.name]
        transport.write(chunk)


class Connection(asyncio.Protocol):
    """One of the router's connections."""

    _names = count()

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._received_s = 0.0
        self._url = b""
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._worker.leave(self._transport)

    def data_received(self, data: bytes) -> None:
        self._received_s = perf_counter()
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url, self._body = url, b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        assert self._transport is not None
        if self._url.startswith(b"/v1/completions"):
            asked = msgspec.json.decode(self._body, type=_Asked)
            name = f"cmpl-{next(self._names)}"
            self._worker.open(name, asked.max_tokens, self._transport, self._received_s)
        else:
            body = msgspec.json.encode(_ABOUT)
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
            self._transport.write(head + body)


async def _serve(flags: argparse.Namespace) -> None:
    records = Records()
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    steps = []
    for number, port in enumerate(flags.ports):
        worker = Worker(flags.step_ms / 1e3, records, number / len(flags.ports))
        await loop.create_server(partial(Connection, worker), "127.0.0.1", port)
        steps.append(asyncio.ensure_future(worker.steps.run()))
    await ended.wait()
    for step in steps:
        step.cancel()
    records.write(flags.records)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ports", type=int, nargs="+")
    parser.add_argument("--step-ms", type=float, default=0.0, help="0: at once")
    parser.add_argument("--records", type=Path, required=True)
    uvloop.run(_serve(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
