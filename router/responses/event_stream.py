"""A client follows a background response that streams: from its first event on, or behind the last that it has.

It may leave and come back, to any router; several may follow. Where this router ends, or cannot read on, the last
event is an error with the number of the one before it: behind that the client comes back. A router that leaves follows
another one's run for it, but does not wait until there is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from starlette.types import Receive, Scope, Send

from ..api.middleware import CLIENT_CLOSED, RequestContext, context_of, log_fault
from ..api.reply import STREAM_HEADERS
from ..http.in_flight import InFlight, UnderWay, shutting_down
from ..state.errors import failure_of
from .event_files import EventReader
from .form import error_event

_QUIET_S = 1.0  # without an event, in a router that leaves; others look for what nobody computes four times as often


class EventStream(UnderWay):
    """`EventStream` owns `reader`."""

    def __init__(
        self,
        reader: EventReader,
        is_over: Callable[[], bool],
        grows: Callable[[], Awaitable[None]],
        in_flight: InFlight,
    ) -> None:
        """`is_over`: no event comes any more. `grows` returns when there may be one."""
        super().__init__(in_flight)
        self._reader = reader
        self._is_over = is_over
        self._grows = grows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._serve(context_of(scope), send)
        finally:
            self._in_flight.discard(self)
            self._reader.close()

    async def _serve(self, context: RequestContext, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [*STREAM_HEADERS]})
        error = await self._sending.run(partial(self._tell, context), context.chunk_encoder)
        if error is not None:
            log_fault(error, context.request_id)
            failure = failure_of(error)
            await send({"type": "http.response.body", "body": error_event(self._reader.last, failure)})
            context.status = failure.status
        elif self._sending.is_cut:
            context.status = CLIENT_CLOSED
        else:
            await send({"type": "http.response.body", "body": b""})

    async def _tell(self, context: RequestContext) -> None:
        now = asyncio.get_running_loop().time
        heard_s = now()
        while True:
            is_over = self._is_over()  # before the last look
            while events := self._reader.read():
                await context.write(events)
                heard_s = now()
            if is_over:
                return
            if self._in_flight.is_leaving and now() > heard_s + _QUIET_S:
                raise shutting_down()
            await self._grows()
