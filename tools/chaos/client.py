"""One request of a chaos run, told as events: what came, when, and how it ended. Judges nothing.

A chunk is taken as it stands: nothing is repaired, joined or left out here, so that what a client could have noticed
is in the history. A client with a key comes back when its connection ends too early, and says what it has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from time import perf_counter

import msgspec

from ..load.http_client import HttpClient, HttpError, ResponseHead
from ..load.sse import EventSplitter
from .events import Cut, Delta, Done, Failed, RequestEvent, Sent, Usage
from .requests import Ask, Body

_TIMEOUT_S = 120.0
_BACK_AFTER_S = 0.05
_encode = msgspec.json.Encoder().encode


class _Logprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] = []
    content: list[object] | None = None  # of a chat

    def of_tokens(self) -> list[object]:
        if self.content is not None:
            return self.content
        tops = self.top_logprobs if self.top_logprobs is not None else [None] * len(self.tokens)
        return [list(entry) for entry in zip(self.tokens, self.token_logprobs, tops, strict=True)]


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str = ""


class _Call(msgspec.Struct):
    function: _Function
    index: int = 0

    def __str__(self) -> str:
        """Return what the call says, without its id, which is another each time."""
        name = self.function.name
        return ("" if name is None else f"\n{self.index} {name} ") + self.function.arguments


class _Text(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_Call] = []


class _Choice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    delta: _Text | None = None
    message: _Text | None = None
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def all_text(self) -> str:
        part = self.delta or self.message
        return (self.text if part is None else part.content) or ""

    @property
    def all_calls(self) -> str:
        part = self.delta or self.message
        return "" if part is None else "".join(map(str, part.tool_calls))


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Error(msgspec.Struct):
    message: str
    type: str
    code: str | int | None = None


class _Chunk(msgspec.Struct):
    id: str = ""
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Chunk).decode


class _Reader:
    """Body bytes to events. Runs in the socket's callback: an answer that cannot be read is an event, too."""

    def __init__(self, request: int, ask: Ask, tell: Callable[[RequestEvent], None], began_s: float) -> None:
        self._request = request
        self._ask = ask
        self._tell = tell
        self._began_s = began_s
        self._splitter = EventSplitter()
        self._body: list[bytes] = []
        self._status = 0
        self._answer_id = ""
        self.has_ended = False
        self.last_event = ""  # its number, where events have one

    def begin_again(self) -> None:
        """The connection has ended too early; what comes by another goes on behind the last whole event."""
        self.last_event = self._splitter.last_id or self.last_event
        self._splitter = EventSplitter()
        self._body.clear()
        self._status = 0

    def on_head(self, head: ResponseHead) -> None:
        self._status = head.status

    def on_body(self, data: bytes) -> None:
        if self._status != 200 or not self._ask.is_stream:
            self._body.append(data)
            return
        for event in self._splitter.push(data):
            if event == b"[DONE]":
                self._end(Done(request=self._request, at_s=self._now(), answer_id=self._answer_id))
            else:
                self._take(event)

    def finish(self) -> None:
        """The body is over."""
        if self._status == 200 and not self._ask.is_stream:
            self._take(b"".join(self._body))
            if not self.has_ended:
                self._end(Done(request=self._request, at_s=self._now(), answer_id=self._answer_id))
        elif self._status != 200:
            self._take(b"".join(self._body))
        if not self.has_ended:
            self.cut("ended without [DONE]" if self._status == 200 else f"status {self._status} without an error")

    def cut(self, why: str) -> None:
        self._end(Cut(request=self._request, at_s=self._now(), why=why))

    def _take(self, data: bytes) -> None:
        try:
            chunk = _decode(data)
        except msgspec.MsgspecError as error:
            message = f"unreadable ({error}): {data[:200].decode(errors='replace')}"
            self._end(Failed(request=self._request, at_s=self._now(), status=self._status, code="", message=message))
            return
        self._answer_id = self._answer_id or chunk.id.rpartition("-")[2]
        if chunk.error is not None:
            self._fail(chunk.error)
            return
        for choice in chunk.choices:
            self._tell(self._delta(choice))
        if chunk.usage is not None:
            usage = chunk.usage
            self._tell(
                Usage(
                    request=self._request,
                    at_s=self._now(),
                    num_prompt_tokens=usage.prompt_tokens,
                    num_completion_tokens=usage.completion_tokens,
                )
            )

    def _delta(self, choice: _Choice) -> Delta:
        logprobs = choice.logprobs
        return Delta(
            request=self._request,
            at_s=self._now(),
            choice=choice.index,
            text=choice.all_text,
            calls=choice.all_calls,
            token_ids=choice.token_ids or [],
            logprobs=logprobs.of_tokens() if logprobs is not None else [],
            offsets=logprobs.text_offset if logprobs is not None else [],
            finish=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )

    def _fail(self, error: _Error) -> None:
        code = str(error.code or error.type)
        self._end(
            Failed(
                request=self._request,
                at_s=self._now(),
                status=self._status,
                code=code,
                message=error.message,
                answer_id=self._answer_id,
            )
        )

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
) -> None:
    """Runs one request to its end; what happens is told as it happens. `began_s`: of the run, by perf_counter.

    `key`: the client comes back with it as often as its connection ends too early.
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
            is_reference=is_reference,
        )
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            while True:
                own = {} if key is None else {"idempotency-key": key, "last-event-id": reader.last_event}
                try:
                    await client.request(
                        "POST",
                        ask.path,
                        body=_encode(body),
                        headers={**(headers or {}), **own},
                        on_head=reader.on_head,
                        on_body=reader.on_body,
                    )
                    reader.finish()
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
        reader.cut(f"no end within {_TIMEOUT_S:g} s")
