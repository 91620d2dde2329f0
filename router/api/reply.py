"""The way of an answer to the client: as one JSON body or as server-sent events.

    reads the answer, sends ─> its end, or an error that the client is told
      └─ cut: by a client that left (the answer is aborted), or by the server's end (an error)

A stream's head goes out with the first token, so that what fails before is a plain HTTP error. After that a failure
is one event `data: {"error": ...}`, and the stream ends without [DONE]: a client never mistakes a cut for an end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import msgspec
import structlog
from starlette.types import Receive, Scope, Send

from ...common.errors import RequestError
from ...common.request import FinishReason
from ..http.in_flight import InFlight, UnderWay
from ..http.ways_out import send_failure
from ..kept.asking import REPEATED_HEADER
from ..state.errors import StreamError, failure_of
from .answer import Answer
from .choice import TextPiece
from .events import OPENAI_EVENTS, EventFormat, EventNumbers, EventWriter
from .form import Form
from .middleware import CLIENT_CLOSED, RequestContext, WritePart, context_of, log_fault, send_part
from .timing import phases_ms, server_timing

_WRITE_BYTES = 64 * 2**10  # handed to the connection at a time: it waits before the next when it is full
_NAMED_INLINE = 2048  # tokens and alternatives whose texts are looked up where they are: some milliseconds
_CHOICES_INLINE = 256  # choices up to which an answer is encoded where it is

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy in front must not collect the events
]

log = structlog.get_logger(__name__)


class AnswerObserver(Protocol):
    def on_answer(self, num_prompt_tokens: int, num_completion_tokens: int, finishes: Sequence[str]) -> None:
        """An answer has ended: what its client got."""
        ...

    def on_repeated(self) -> None:
        """A client came back for an answer of which it had been told something."""
        ...


class Reply(UnderWay):
    """`Reply` owns `answer` from its construction on."""

    def __init__(
        self,
        answer: Answer,
        form: Form,
        *,
        stream: bool,
        include_usage: bool,
        in_flight: InFlight,
        observer: AnswerObserver,
        events: EventFormat = OPENAI_EVENTS,
    ) -> None:
        super().__init__(in_flight, is_background=answer.streams[0].request.is_background)
        self._answer = answer
        self._form = form
        self._stream = stream
        self._include_usage = include_usage
        self._observer = observer
        self._events = events
        if answer.kept is not None:
            answer.kept.on_wanted = partial(self.end, _taken_over())

    @property
    def is_kept(self) -> bool:
        """The answer goes on behind what was told of it, if anything was: here, and where it is asked for again."""
        return self._answer.kept is not None and self._answer.kept.is_kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = context_of(scope)
        try:
            await self._serve(context, send)
        finally:
            self._in_flight.discard(self)
            self._answer.close()
            self._record(context, str(scope["path"]))

    async def _serve(self, context: RequestContext, send: Send) -> None:
        write = self._send_stream if self._stream else self._send_whole
        error = await self._sending.run(partial(write, context, send), context.chunk_encoder)
        if error is not None:
            await self._fail(context, send, error)
        elif self._sending.is_cut:
            context.status = CLIENT_CLOSED

    async def _send_whole(self, context: RequestContext, send: Send) -> None:
        await self._send_body(context, send, await self._whole(await self._pieces()))

    async def _send_body(self, context: RequestContext, send: Send, body: bytes) -> None:
        await self._send_head(context, send, (b"content-length", b"%d" % len(body)))
        await write_in_parts(partial(send_part, context.send), body)
        await send({"type": "http.response.body", "body": b""})

    async def _pieces(self) -> list[list[TextPiece]]:
        """Read the answer to its end. Returns the pieces of each choice."""
        pieces: list[list[TextPiece]] = [[] for _ in self._answer.choices]
        while batch := await self._answer.next():
            for index, piece in batch:
                pieces[index].append(piece)
        return pieces

    async def _send_head(self, context: RequestContext, send: Send, *headers: tuple[bytes, bytes]) -> None:
        """Send the head of a whole answer."""
        told = [(b"content-type", b"application/json"), *headers, *self._more_headers(context)]
        await send({"type": "http.response.start", "status": 200, "headers": told})

    async def _whole(self, pieces: list[list[TextPiece]]) -> bytes:
        num_named = sum(1 + len(token.top) for batch in pieces for piece in batch for token in piece.tokens)
        num_named += self._num_named_of_prompts()
        if num_named > _NAMED_INLINE or len(pieces) > _CHOICES_INLINE:
            body = await asyncio.to_thread(self._encode, pieces)
        else:
            body = self._encode(pieces)
        self._form.keep()  # not where the reply was cut meanwhile
        return body

    def _num_named_of_prompts(self) -> int:
        scored = (token for stream in self._answer.streams for token in stream.prompt_logprobs)
        return self._answer.num_choices * sum(1 + len(token.top) for token in scored)

    def _encode(self, pieces: list[list[TextPiece]]) -> bytes:
        return msgspec.json.encode(self._form.whole(list(map(TextPiece.joined, pieces))))

    async def _send_stream(self, context: RequestContext, send: Send) -> None:
        numbers = EventNumbers(self._answer.kept, self._events.num_before) if self._answer.kept is not None else None
        writer, write = EventWriter(self._form, self._events, numbers), context.write
        num_named = 0  # in what is said of the prompts where a choice begins
        while pieces := await self._answer.next():
            is_first = context.status is None
            if is_first:
                headers = [*STREAM_HEADERS, *self._more_headers(context)]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                num_named = self._num_named_of_prompts()
            if num_named > _NAMED_INLINE and writer.begins_choice(pieces):
                events = await asyncio.to_thread(writer.events, pieces)
            else:
                events = writer.events(pieces)
            if len(events) > _WRITE_BYTES:
                await write_in_parts(write, events)
            elif events:
                await write(events)
            if is_first:
                self._write_middle(context, writer)
            if numbers is not None and numbers.is_behind and not self._answer.is_repeating:
                raise _unknown_event()
        tail = self._events.encode([self._form.usage_chunk()]) if self._include_usage else b""
        await send({"type": "http.response.body", "body": tail + self._events.end})

    def _more_headers(self, context: RequestContext) -> list[tuple[bytes, bytes]]:
        timing, kept = (b"server-timing", server_timing(context, self._answer.requests)), self._answer.kept
        return [timing, REPEATED_HEADER] if kept is not None and kept.is_repeated else [timing]

    def _write_middle(self, context: RequestContext, writer: EventWriter) -> None:
        if context.chunk_encoder is not None and (fast_writer := writer.fast_writer(context.chunk_encoder)) is not None:
            self._answer.write_to(fast_writer)

    async def _fail(self, context: RequestContext, send: Send, error: Exception) -> None:
        log_fault(error, context.request_id)
        failure = failure_of(error)
        if context.status is None:
            await send_failure(send, failure, context.error_body(failure))
        elif self._stream:
            await send({"type": "http.response.body", "body": self._events.error(failure)})
        else:
            raise error
        context.status = failure.status

    def _record(self, context: RequestContext, path: str) -> None:
        """The line of a finished request. Neither prompt nor answer is in it."""
        answer = self._answer
        finishes = [choice.finish or self._unfinished_reason(context) for choice in answer.choices]
        num_prompt = sum(len(prompt.token_ids) for prompt in answer.prompts)
        num_completion = sum(choice.num_tokens for choice in answer.choices)
        requests = answer.requests
        # What was refused while it waited has cost nothing, and its client may be told to come again.
        sent = [request.num_prompt_tokens for request in requests if "prefill_start" in request.timestamps]
        num_repeated = 0 if answer.kept is None else min(num_completion, answer.kept.num_told_tokens)
        self._observer.on_answer(sum(sent), num_completion - num_repeated, finishes)
        if num_repeated:
            self._observer.on_repeated()
        if context.allowance is not None:  # what was told before was paid for then, and so was its prompt
            context.allowance.settle(num_completion - num_repeated if num_repeated else sum(sent) + num_completion)
        log.info(
            "request_finished",
            request_id=context.request_id,
            client_request_id=context.shown_id if context.shown_id != context.request_id else None,
            answer_id=None if answer.kept is None else answer.kept.begun.answer_id,
            path=path,
            status=context.status,
            finish=sorted({str(finish) for finish in finishes}),
            prompt_tokens=num_prompt,
            cached_tokens=sum(request.num_cached_tokens for request in requests),
            completion_tokens=num_completion,
            repeated_tokens=num_repeated,
            attempts=max(request.attempt_number for request in requests),
            prefill_workers=sorted({request.prefill_worker or "-" for request in requests}),
            decode_workers=sorted({request.decode_worker or "-" for request in requests}),
            **phases_ms(context, requests),
        )

    def _unfinished_reason(self, context: RequestContext) -> str:
        return FinishReason.ABORT if context.status in (None, CLIENT_CLOSED) else FinishReason.ERROR


def _taken_over() -> StreamError:
    return StreamError("the client came back with this Idempotency-Key by another connection", "taken_over", 409)


def _unknown_event() -> RequestError:
    text = "Last-Event-ID is the number of an event that this answer has not had"
    return RequestError(text, param="Last-Event-ID", code="unknown_event")


async def write_in_parts(write: WritePart, body: bytes) -> None:
    """No more than a part of it waits in the connection for a client that reads slowly."""
    view = memoryview(body)
    for start in range(0, len(body), _WRITE_BYTES):
        await write(bytes(view[start : start + _WRITE_BYTES]))
