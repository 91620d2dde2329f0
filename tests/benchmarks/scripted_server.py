"""A loopback server that answers each request with the bytes of a script, piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

DONE = b"data: [DONE]\n\n"


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text_chunk(text: str, *, token_ids: list[int] | None = None, finish_reason: str | None = None) -> bytes:
    choice: dict[str, object] = {"index": 0, "text": text, "finish_reason": finish_reason}
    if token_ids is not None:
        choice["token_ids"] = token_ids
    return event(object="text_completion", choices=[choice])


def prompt_chunk(num_tokens: int) -> bytes:
    """What kvferry says of the prompt, before the first token, where token ids are asked for."""
    choice = {"index": 0, "text": "", "finish_reason": None, "prompt_token_ids": [3] * num_tokens}
    return event(object="text_completion", choices=[choice])


def chat_chunk(*, finish_reason: str | None = None, **delta: object) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return event(object="chat.completion.chunk", choices=[choice])


def usage(
    num_prompt_tokens: int, num_output_tokens: int, *, num_cached: int | None = None, num_thoughts: int | None = None
) -> bytes:
    counts: dict[str, object] = {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_output_tokens}
    if num_cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": num_cached}
    if num_thoughts is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": num_thoughts}
    return event(choices=[], usage=counts)


def answer(num_tokens: int, num_prompt_tokens: int = 5) -> list[bytes]:
    """A whole and correct stream: what is said of the prompt, then a chunk for each token."""
    chunks = [text_chunk(" word", token_ids=[7]) for _ in range(num_tokens)]
    return [prompt_chunk(num_prompt_tokens), *chunks, usage(num_prompt_tokens, num_tokens), DONE]


@dataclass(slots=True)
class Script:
    """One answer. `pieces` are body bytes, each sent in an HTTP chunk of its own."""

    pieces: Sequence[bytes]
    status: int = 200
    content_type: str = "text/event-stream"
    is_cut: bool = False  # the connection ends without the last HTTP chunk
    is_chunked: bool = True  # False: the close is the end of the body
    is_stuck: bool = False  # nothing comes after the pieces
    raw: bytes | None = None  # instead of an HTTP answer; then the connection ends
    after_s: float = 0.0  # nothing comes before


@dataclass(slots=True)
class Received:
    """One request that the server read."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, object]


@dataclass(slots=True)
class ScriptedServer:
    base_url: str = ""
    requests: list[Received] = field(default_factory=list)
    num_connections: int = 0


@asynccontextmanager
async def scripted_server(script_of: Callable[[Received], Script]) -> AsyncIterator[ScriptedServer]:
    server = ScriptedServer()
    connections: set[asyncio.Task[None]] = set()

    async def serve_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        server.num_connections += 1
        try:
            while (request := await _read(reader)) is not None:
                server.requests.append(request)
                if not await _write(writer, script_of(request)):
                    return
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client left, or the test is over
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    listener = await asyncio.start_server(serve_connection, "127.0.0.1", 0)
    server.base_url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _read(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Received(method, path, headers, json.loads(body) if body else {})


async def _write(writer: asyncio.StreamWriter, script: Script) -> bool:
    """Whether the connection can be used again."""
    await asyncio.sleep(script.after_s)
    if script.raw is not None:
        writer.write(script.raw)
        return False
    writer.write(f"HTTP/1.1 {script.status} X\r\ncontent-type: {script.content_type}\r\n".encode())
    writer.write(b"transfer-encoding: chunked\r\n\r\n" if script.is_chunked else b"connection: close\r\n\r\n")
    for piece in script.pieces:
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if script.is_chunked else piece)
        await writer.drain()
    if script.is_stuck:
        await asyncio.Event().wait()
    if script.is_cut or not script.is_chunked:
        return False
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    return True
