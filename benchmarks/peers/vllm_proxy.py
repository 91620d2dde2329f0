"""The front of a disaggregated vLLM: asks the prefill server for the KV, then lets the decode server answer.

    1. the request goes to prefill with max_tokens 1 and `do_remote_decode`; its answer names the blocks it holds
    2. the request goes to decode with these `kv_transfer_params`; its bytes are passed on as they come

Kept light (bytes are not parsed on the way back) so that it does not hold vLLM back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from kvferry.tools.load.http_client import HttpClient, HttpError, ResponseHead

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Body = dict[str, object]

# What the prefill server must not see: it answers once, with one token.
_DECODE_ONLY = ("stream_options", "min_tokens", "min_completion_tokens")
_ASK_FOR_KV: Body = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class Proxy:
    """An ASGI application over one prefill and one decode server."""

    def __init__(self, prefill_url: str, decode_url: str) -> None:
        self._prefill = HttpClient(prefill_url)
        self._decode = HttpClient(decode_url)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/health":
            await _answer(send, 200, b"{}")
            return
        request = asyncio.ensure_future(self._forward(scope, await _read_body(receive), send))
        gone = asyncio.ensure_future(_client_gone(receive))
        await asyncio.wait((request, gone), return_when=asyncio.FIRST_COMPLETED)
        for task in (request, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _forward(self, scope: Message, body: bytes, send: Send) -> None:
        method, path = str(scope["method"]), str(scope["path"])
        headers = {"x-request-id": str(uuid.uuid4())}
        has_begun = False

        async def send_noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            if method == "POST":
                status, body = await self._prefilled(path, body, headers)
                if status != 200:
                    await _answer(send, status, body)
                    return
            await self._pass_on(method, path, body, headers, send_noting)
        except HttpError as error:
            if has_begun:
                raise  # too late for a status: the answer breaks off
            await _answer(send, 502, msgspec.json.encode({"error": {"message": str(error)}}))

    async def _prefilled(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        """The body for decode; or the status and body with which prefill refused."""
        wanted = msgspec.json.decode(body, type=Body)
        asked = {key: value for key, value in wanted.items() if key not in _DECODE_ONLY}
        asked |= {"stream": False, "max_tokens": 1, "kv_transfer_params": _ASK_FOR_KV}
        if "max_completion_tokens" in asked:
            asked["max_completion_tokens"] = 1
        head, answer = await self._prefill.read("POST", path, body=msgspec.json.encode(asked), headers=headers)
        if head.status != 200:
            return head.status, answer
        params = msgspec.json.decode(answer, type=Body).get("kv_transfer_params")
        if not params:
            return 502, b'{"error": {"message": "the prefill server gave no kv_transfer_params"}}'
        return 200, msgspec.json.encode(wanted | {"kv_transfer_params": params})

    async def _pass_on(self, method: str, path: str, body: bytes, headers: dict[str, str], send: Send) -> None:
        pieces: asyncio.Queue[ResponseHead | bytes | None] = asyncio.Queue()
        put = pieces.put_nowait
        fetch = asyncio.ensure_future(
            self._decode.request(method, path, body=body, headers=headers, on_head=put, on_body=put)
        )
        fetch.add_done_callback(lambda _: put(None))
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, ResponseHead):
                    kind = piece.headers.get("content-type", "application/json").encode()
                    await send(_start(piece.status, kind))
                else:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await fetch
        finally:
            fetch.cancel()
        await send({"type": "http.response.body", "body": b""})


async def _read_body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(send: Send, status: int, body: bytes) -> None:
    await send(_start(status, b"application/json"))
    await send({"type": "http.response.body", "body": body})


def _start(status: int, content_type: bytes) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]}


def main(argv: list[str] | None = None) -> int:
    import uvicorn

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill", required=True, metavar="URL")
    parser.add_argument("--decode", required=True, metavar="URL")
    flags = parser.parse_args(argv)
    proxy = Proxy(flags.prefill, flags.decode)
    uvicorn.run(proxy, host="127.0.0.1", port=flags.port, log_level="warning", access_log=False, lifespan="off")
    return 0


if __name__ == "__main__":
    sys.exit(main())
