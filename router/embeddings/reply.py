"""The way of vectors to the client: many are written one after the other, as far as the client takes them.

all are there ─> a thread encodes the next few ─> written ─> ...

Whole, their JSON would be several times as large as they are, and encoding it would hold up every stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

from starlette.types import Receive, Scope, Send

from ..api.answer import Answer
from ..api.generation import Api
from ..api.middleware import RequestContext
from ..api.reply import Reply, write_in_parts
from .form import EmbeddingForm

_BYTES_INLINE = 2**16  # of vectors that are encoded where they are: some milliseconds
_GROUP_BYTES = 2**18  # of JSON that a thread makes in one go


class VectorsReply(Reply):
    """`VectorsReply` owns `room`, what the call has of the room for vectors, as it owns the answer."""

    def __init__(self, api: Api, answer: Answer, form: EmbeddingForm, room: ExitStack) -> None:
        super().__init__(
            answer, form, stream=False, include_usage=False, in_flight=api.in_flight, observer=api.observer
        )
        self._vectors = form
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._room:
            await super().__call__(scope, receive, send)

    async def _send_whole(self, context: RequestContext, send: Send) -> None:
        pieces = await self._pieces()
        if self._vectors.num_bytes <= _BYTES_INLINE:
            await self._send_body(context, send, await self._whole(pieces))
            return
        await self._send_head(context, send)
        parts = self._vectors.parts()
        while group := await asyncio.to_thread(_next_group, parts):
            await write_in_parts(context.write, group)
        await send({"type": "http.response.body", "body": b""})


def _next_group(parts: Iterator[bytes]) -> bytes:
    group: list[bytes] = []
    num_bytes = 0
    for part in parts:
        group.append(part)
        num_bytes += len(part)
        if num_bytes >= _GROUP_BYTES:
            break
    return b"".join(group)
