"""Clients that leave: ten thousand at random moments, then one at a time with a clock running.

1. storm   `num_aborts` requests, each given up at a uniformly random moment of its life: while its body is sent, while
           it is queued, prefilled, shipped, decoded, or as its last chunk comes; by FIN or by RST. Afterwards every
           worker must have all blocks back.
2. clock   one stream at a time is given up in mid-answer; how long until no worker holds a block of it. Read from
           /metrics, where a worker's heartbeat may be 0.1 s old: the figure includes that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from time import perf_counter
from urllib.parse import urlsplit

from kvferry.common.errors import ConfigError
from kvferry.tools.chaos.serve_system import System
from kvferry.tools.load.http_client import HttpClient
from kvferry.tools.load.stats import Distribution, describe

_CONCURRENCY = 32
_FREE_WITHIN_S = 10.0
_INPUT_LEN = 96
_OUTPUT_LEN = 48
_LONG_ANSWER = 1500


@dataclass(slots=True, frozen=True)
class AbortResult:
    num_aborts: int
    num_ended: int  # answered before their moment came
    stages: dict[str, int]  # what the client had seen when it left
    free_after_s: float | None  # from the last abort until all blocks were free; None: never
    release_ms: Distribution  # one at a time


async def measure_aborts(system: System, *, num_aborts: int, num_timed: int, seed: int) -> AbortResult:
    source = random.Random(seed)
    client = HttpClient(system.base_url)
    try:
        life_s = await _typical_life_s(system)
        stages: Counter[str] = Counter()
        left = num_aborts

        async def keep_aborting() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                stages[await _abort_one(system, source.uniform(0, 1.1 * life_s()), source)] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(_CONCURRENCY):
                group.create_task(keep_aborting())
        free_after_s = await system.wait_until_free(client, _FREE_WITHIN_S)
        release_ms = [await _time_release(system, client, source) for _ in range(num_timed)]
        return AbortResult(num_aborts, stages.pop("ended", 0), dict(stages), free_after_s, describe(release_ms))
    finally:
        client.close()


async def _typical_life_s(system: System) -> _Life:
    """How long a request lives under this concurrency: learned as it goes, from a few that are read to their end."""
    life = _Life()
    source = random.Random(0)
    async with asyncio.TaskGroup() as group:
        for _ in range(_CONCURRENCY):
            group.create_task(_abort_one(system, 60.0, source, life))
    return life


class _Life:
    """Mean time from the first byte sent to the end of the answer."""

    def __init__(self) -> None:
        self._sum_s, self._count = 0.0, 0

    def add(self, seconds: float) -> None:
        self._sum_s += seconds
        self._count += 1

    def __call__(self) -> float:
        return self._sum_s / max(self._count, 1)


def _request(system: System, source: random.Random, num_tokens: int) -> tuple[bytes, bytes]:
    prompt = [source.randrange(4, 250) for _ in range(source.randrange(8, _INPUT_LEN))]
    body = {"model": system.model, "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    host = urlsplit(system.base_url).netloc
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode(), data


async def _abort_one(system: System, after_s: float, source: random.Random, life: _Life | None = None) -> str:
    """Send a request and leave after so long. What had been seen by then."""
    parts = urlsplit(system.base_url)
    head, body = _request(system, source, source.randrange(1, _OUTPUT_LEN))
    began_s = perf_counter()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    stage = "body"
    try:
        async with asyncio.timeout(after_s):
            half = len(body) // 2
            writer.write(head + body[:half])
            await asyncio.sleep(source.uniform(0, 0.1) * min(after_s, 1.0))
            writer.write(body[half:])
            stage = "waiting"
            while chunk := await reader.read(65536):
                if b"data: " in chunk:
                    stage = "streaming"
                if b"[DONE]" in chunk:
                    stage = "ended"
                    break
    except TimeoutError:
        pass
    if life is not None:
        life.add(perf_counter() - began_s)
    _leave(writer, by_reset=source.random() < 0.5)
    return stage


def _leave(writer: asyncio.StreamWriter, *, by_reset: bool) -> None:
    if by_reset:
        sock = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    else:
        writer.close()


async def _time_release(system: System, client: HttpClient, source: random.Random) -> float:
    """Milliseconds from closing a stream in mid-answer until nothing holds a block."""
    parts = urlsplit(system.base_url)
    head, body = _request(system, source, _LONG_ANSWER)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(head + body)
    num_chunks = 0
    while num_chunks < source.randrange(2, 40):
        num_chunks += (await reader.read(65536)).count(b"data: ")
    await asyncio.sleep(source.uniform(0, 0.2))
    _leave(writer, by_reset=source.random() < 0.5)
    free_after_s = await system.wait_until_free(client, _FREE_WITHIN_S)
    if free_after_s is None:
        raise ConfigError(f"blocks are still held {_FREE_WITHIN_S:g} s after a client left")
    return free_after_s * 1e3
