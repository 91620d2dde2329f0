"""One request of a chaos run, told as events: what came, when, and how it ended. Judges nothing.

A client with a key comes back when its connection ends too early, and says what it has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from time import perf_counter

import msgspec

from ..load.http_client import HttpClient, HttpError, ResponseHead
from ..load.sse import EventSplitter
from .events import Cut, Done, Failed, Left, RequestEvent, Sent
from .requests import Ask, Body
from .typed_events import surface_of

_TIMEOUT_S = 120.0
_BACK_AFTER_S = 0.05
_encode = msgspec.json.Encoder().encode


class _Reader:
    """Body bytes to events. Runs in the socket's callback: an answer that cannot be read is an event, too."""

    def __init__(self, request: int, ask: Ask, tell: Callable[[RequestEvent], None], began_s: float) -> None:
        self._request = request
        self._ask = ask
        self._tell = tell
        self._began_s = began_s
        self._surface = surface_of(ask.path, request)
        self._splitter = EventSplitter()
        self._body: list[bytes] = []
        self._status = 0
        self.has_ended = False
        self.last_event = ""  # its number, where events have one

    @property
    def going_on(self) -> str:
        """Return how to ask for more of an answer that goes on without its client; empty: nothing is known of one."""
        return self._surface.going_on

    @property
    def _is_streaming(self) -> bool:
        return self._status == 200 and self._ask.is_stream

    def begin_again(self) -> None:
        """The connection has ended; what comes by another goes on behind the last whole event."""
        self.last_event = self._splitter.last_id or self.last_event
        self._splitter = EventSplitter()
        self._body.clear()
        self._status = 0

    def on_head(self, head: ResponseHead) -> None:
        self._status = head.status

    def on_body(self, data: bytes) -> None:
        if not self._is_streaming:
            self._body.append(data)
            return
        for event in self._splitter.push(data):
            if event == self._surface.done:
                self._end(self._surface.end(self._now()))
            else:
                self._take(event)

    def finish(self) -> None:
        """The body is over."""
        if not self._is_streaming:
            self._take(b"".join(self._body))
        if self.has_ended or self.going_on:
            return
        if self._status != 200:
            self.cut(f"status {self._status} without an error")
        elif self._is_streaming:
            self.cut("ended in the middle")
        else:
            self._end(self._surface.end(self._now()))

    def leave(self) -> None:
        self._end(Left(request=self._request, at_s=self._now()))

    def cut(self, why: str) -> None:
        self._end(Cut(request=self._request, at_s=self._now(), why=why))

    def _take(self, data: bytes) -> None:
        try:
            for event in self._surface.read(data, self._now(), self._status):
                if isinstance(event, Done | Failed):
                    self._end(event)
                else:
                    self._tell(event)
        except msgspec.MsgspecError as error:
            message = f"unreadable ({error}): {data[:200].decode(errors='replace')}"
            self._end(self._surface.failed(self._now(), self._status, "", message))

    def _end(self, event: RequestEvent) -> None:
        self.has_ended = True
        self._tell(event)

    def _now(self) -> float:
        return perf_counter() - self._began_s


async def send(
    client: HttpClient,
    request: int,
    ask: Ask,
    body: Body,
    tell: Callable[[RequestEvent], None],
    *,
    began_s: float,
    is_reference: bool = False,
    headers: Mapping[str, str] | None = None,
    key: str | None = None,
    leave_after_s: float | None = None,
) -> None:
    """Runs one request to its end; what happens is told as it happens. `began_s`: of the run, by perf_counter.

    `key`: the client comes back with it as often as its connection ends too early. `leave_after_s`: by then it has
    had enough, wherever the answer is.
    """
    reader = _Reader(request, ask, tell, began_s)
    tell(
        Sent(
            request=request,
            at_s=perf_counter() - began_s,
            ask=ask.number,
            kind=ask.kind,
            num_choices=ask.num_choices,
            max_tokens=ask.max_tokens,
            is_stream=ask.is_stream,
            tells_tokens=ask.tells_tokens,
            is_background=ask.is_background,
            is_reference=is_reference,
        )
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S if leave_after_s is None else leave_after_s):
            while True:
                own = {} if key is None or ask.is_background else {"idempotency-key": key}
                if reader.last_event:
                    own["last-event-id"] = reader.last_event
                to = reader.going_on
                try:
                    await client.request(
                        "GET" if to else "POST",
                        ask.path + to,
                        body=b"" if to else _encode(body),
                        headers={**(headers or {}), **own},
                        on_head=reader.on_head,
                        on_body=reader.on_body,
                    )
                    reader.finish()
                    if reader.has_ended:
                        return
                except HttpError:
                    if key is None or reader.has_ended:
                        raise
                await asyncio.sleep(_BACK_AFTER_S)
                reader.begin_again()
    except HttpError as error:
        if not reader.has_ended:
            reader.cut(str(error))
    except TimeoutError:
        if reader.has_ended:
            return  # in the last moment
        if leave_after_s is not None:
            reader.leave()
        else:
            reader.cut(f"no end within {_TIMEOUT_S:g} s")
