"""The load of the overhead benchmark: connections that note when bytes come, and look into them afterwards.

It shares a core with the stub workers, so while the load runs a received chunk costs one clock reading and one append.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import cast

import httptools
import msgspec

from kvferry.common.errors import ConfigError
from kvferry.tools.load.sse import EventSplitter

_LAST_CHUNK = b"0\r\n\r\n"
_WORDS = "Lorem ipsum dolor sit amet, consectetur adipiscing elit. "


class _Choice(msgspec.Struct):
    text: str = ""


class _Event(msgspec.Struct):
    id: str = ""
    choices: list[_Choice] = []


@dataclass(slots=True)
class Exchange:
    """One request and the bytes of its answer."""

    sent_s: float
    received: list[tuple[float, bytes]] = field(default_factory=list)


@dataclass(slots=True)
class Arrivals:
    """One answer: when each of its tokens came."""

    name: str  # the answer's id
    sent_s: float
    token_s: list[float]
    num_events: int  # that had text


class Lane(asyncio.Protocol):
    """One connection with one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, port: int) -> Lane:
        _, lane = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return lane

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConfigError(f"the router closed a connection: {exc}"))

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:
            return
        self._exchange.received.append((perf_counter(), data))
        if data.endswith(_LAST_CHUNK) and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def send(self, request: bytes) -> Exchange:
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self._exchange = Exchange(perf_counter())
        self._transport.write(request)
        return self._exchange

    async def ended(self) -> None:
        assert self._done is not None
        await self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Requests:
    """The same prompt but for its beginning, so that no cache knows it."""

    def __init__(self, model: str, num_words: int, num_tokens: int, headers: Mapping[str, str]) -> None:
        self._body = {"model": model, "max_tokens": num_tokens, "stream": True, "temperature": 0.0, "ignore_eos": True}
        self._text = " ".join((_WORDS * (num_words // 8 + 1)).split()[:num_words])
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._number = 0

    def next(self) -> bytes:
        self._number += 1
        body = json.dumps({**self._body, "prompt": f"{self._number} {self._text}"}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"{self._headers}content-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


async def open_lanes(port: int, number: int) -> list[Lane]:
    return [await Lane.open(port) for _ in range(number)]


async def closed_loop(lanes: list[Lane], requests: Requests, duration_s: float) -> list[Exchange]:
    """Each lane's next request follows its last answer. Those that began in time are awaited."""
    exchanges: list[Exchange] = []
    end_s = perf_counter() + duration_s

    async def run(lane: Lane) -> None:
        while perf_counter() < end_s:
            exchanges.append(lane.send(requests.next()))
            await lane.ended()

    await asyncio.gather(*map(run, lanes))
    return exchanges


class _Reader:
    """Takes an answer's bytes apart: HTTP's chunks fall anywhere, inside an event too."""

    def __init__(self, found: Arrivals) -> None:
        self._found = found
        self._splitter = EventSplitter()
        self._parser = httptools.HttpResponseParser(self)
        self._at_s = 0.0

    def feed(self, at_s: float, data: bytes) -> None:
        self._at_s = at_s
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        found = self._found
        for event in self._splitter.push(body):
            if event == b"[DONE]":
                continue
            parsed = msgspec.json.decode(event, type=_Event)
            found.name = parsed.id
            num_tokens = len(parsed.choices[0].text) if parsed.choices else 0
            found.num_events += num_tokens > 0
            found.token_s += [self._at_s] * num_tokens


def arrivals(exchange: Exchange) -> Arrivals:
    """What the bytes say. Every letter of text is a token. Raises ConfigError for an answer that is no stream."""
    if not exchange.received or not exchange.received[0][1].startswith(b"HTTP/1.1 200 "):
        beginning = exchange.received[0][1][:300] if exchange.received else b""
        raise ConfigError(f"no stream: {beginning!r}")
    found = Arrivals("", exchange.sent_s, [], 0)
    reader = _Reader(found)
    for at_s, data in exchange.received:
        reader.feed(at_s, data)
    return found
