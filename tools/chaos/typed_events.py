"""/v1/responses and /v1/messages as events of a chaos run: their streams have typed events, whose end is one of them.

Each tells its answer twice: in pieces, and what it has become. Both must be the same, and none may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from .chunks import Chunks, Error, Surface, call_begin
from .events import Delta, RequestEvent

_FINISHES = {
    "completed": "stop", "incomplete": "length",
    "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls",
}  # fmt: skip


class _Part(msgspec.Struct):
    """A part of a message, or of thoughts."""

    type: str = ""
    text: str = ""
    thinking: str = ""
    name: str = ""
    input: object = None
    partial_json: str = ""
    stop_reason: str | None = None
    stop_sequence: str | None = None

    @property
    def all_text(self) -> str:
        return self.text or self.thinking


class _Item(msgspec.Struct):
    type: str
    content: list[_Part] = []
    name: str = ""
    arguments: str = ""


class _Usage(msgspec.Struct):
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_input_tokens: int = 0


class _Response(msgspec.Struct):
    id: str
    status: str
    background: bool = False
    output: list[_Item] = []
    usage: _Usage | None = None
    error: Error | None = None


class _ResponseEvent(msgspec.Struct):
    type: str = ""
    sequence_number: int | None = None
    response: _Response | None = None
    output_index: int = 0
    item: _Item | None = None
    delta: str = ""
    error: Error | None = None
    message: str = ""  # of an event `error`
    code: str | int | None = None
    object: str = ""


_read_event = msgspec.json.Decoder(_ResponseEvent).decode
_read_response = msgspec.json.Decoder(_Response).decode


class Responses(Surface):
    """`Responses` reads /v1/responses."""

    done = b""

    def __init__(self, request: int) -> None:
        super().__init__(request)
        self._number = -1  # of the last event
        self._name = ""  # of a response that goes on without its client, and streams
        self._text = self._calls = ""  # so far
        self.going_on = ""

    def read(self, data: bytes, at_s: float, status: int) -> Iterator[RequestEvent]:
        event = _read_event(data)
        if event.object == "response":
            yield from self._whole(_read_response(data), at_s)
        elif event.type == "error" and self.going_on:
            return  # its router ends: the client comes back
        elif event.error is not None or event.type == "error":
            error = event.error or Error(event.message, "error", event.code)
            yield self.failed(at_s, status, error.name, error.message)
        else:
            yield from self._event(event, at_s, status)

    def _event(self, event: _ResponseEvent, at_s: float, status: int) -> Iterator[RequestEvent]:
        if event.sequence_number != self._number + 1:
            yield self.failed(at_s, status, "", f"event {event.sequence_number} after {self._number}")
            return
        self._number = event.sequence_number
        response = event.response
        if response is not None:
            self.answer_id = self.answer_id or _last_part(response.id)
            self._name = response.id if response.background else ""
        if self._name:
            self.going_on = f"/{self._name}?stream=true&starting_after={self._number}"
        if event.type in ("response.output_text.delta", "response.reasoning_text.delta"):
            self._text += event.delta
            yield Delta(request=self.request, at_s=at_s, choice=0, text=event.delta)
        elif event.type == "response.function_call_arguments.delta":
            self._calls += event.delta
            yield Delta(request=self.request, at_s=at_s, choice=0, calls=event.delta)
        elif event.type == "response.output_item.added" and event.item is not None and event.item.name:
            begin = call_begin(event.output_index, event.item.name)
            self._calls += begin
            yield Delta(request=self.request, at_s=at_s, choice=0, calls=begin)
        elif event.type == "response.failed":
            error = (response and response.error) or Error("", "failed")
            yield self.failed(at_s, status, error.name, error.message)
        elif event.type in ("response.completed", "response.incomplete") and response is not None:
            if (self._text, self._calls) != _said(response):
                yield self.failed(at_s, status, "", f"{self._text!r} {self._calls!r} is not {_said(response)!r}")
                return
            yield from self._end(response, at_s, text="", calls="")
            yield self.end(at_s)

    def _whole(self, response: _Response, at_s: float) -> Iterator[RequestEvent]:
        self.answer_id = _last_part(response.id)
        self.going_on = f"/{response.id}" if response.status == "in_progress" else ""
        if self.going_on:
            return
        if response.error is not None:
            yield self.failed(at_s, 200, response.error.name, response.error.message)
            return
        text, calls = _said(response)
        yield from self._end(response, at_s, text=text, calls=calls)

    def _end(self, response: _Response, at_s: float, *, text: str, calls: str) -> Iterator[RequestEvent]:
        finish = _FINISHES.get(response.status, response.status)
        yield Delta(request=self.request, at_s=at_s, choice=0, text=text, calls=calls, finish=finish)
        if response.usage is not None:
            yield self.usage(at_s, response.usage.input_tokens, response.usage.output_tokens)


def _said(response: _Response) -> tuple[str, str]:
    """Return the text and the calls of a response."""
    text = "".join(part.all_text for item in response.output for part in item.content)
    calls = [call_begin(at, item.name) + item.arguments for at, item in enumerate(response.output) if item.name]
    return text, "".join(calls)


class _MessageEvent(msgspec.Struct):
    type: str
    id: str = ""
    index: int = 0
    message: _MessageStart | None = None
    content_block: _Part | None = None
    delta: _Part | None = None
    usage: _Usage | None = None
    error: Error | None = None
    content: list[_Part] = []  # of a whole message, as the following
    stop_reason: str | None = None
    stop_sequence: str | None = None


class _MessageStart(msgspec.Struct):
    id: str


_read_message = msgspec.json.Decoder(_MessageEvent).decode


class Messages(Surface):
    """`Messages` reads /v1/messages."""

    done = b""

    def __init__(self, request: int) -> None:
        super().__init__(request)
        self._open: int | None = None  # the block that grows
        self._num_blocks = 0

    def read(self, data: bytes, at_s: float, status: int) -> Iterator[RequestEvent]:
        event = _read_message(data)
        if event.error is not None:
            yield self.failed(at_s, status, event.error.name, event.error.message)
        elif event.type == "message":
            self.answer_id = _last_part(event.id)
            text = "".join(part.all_text for part in event.content)
            calls = [_call(at, part) for at, part in enumerate(event.content) if part.name]
            yield self._delta(at_s, text, "".join(calls), event.stop_reason, event.stop_sequence)
            yield from self._usage(event.usage, at_s)
        elif wrong := self._misplaced(event):
            yield self.failed(at_s, status, "", wrong)
        else:
            yield from self._event(event, at_s)

    def _misplaced(self, event: _MessageEvent) -> str:
        """Return what is wrong with an event's place; empty: nothing. One block at a time begins, grows and stops."""
        number, was_open = event.index, self._open
        if event.type == "content_block_start":
            self._open, self._num_blocks = number, self._num_blocks + 1
            return "" if (was_open, number) == (None, self._num_blocks - 1) else f"block {number} begins in {was_open}"
        if event.type in ("content_block_delta", "content_block_stop"):
            self._open = number if event.type == "content_block_delta" else None
            return "" if number == was_open else f"{event.type} of {number}, {was_open} is open"
        return f"{event.type} in block {was_open}" if event.type == "message_delta" and was_open is not None else ""

    def _event(self, event: _MessageEvent, at_s: float) -> Iterator[RequestEvent]:
        block, delta = event.content_block, event.delta
        match event.type:
            case "message_start" if event.message is not None:
                self.answer_id = _last_part(event.message.id)
            case "content_block_start" if block is not None and block.name:
                yield self._delta(at_s, calls=call_begin(event.index, block.name))
            case "content_block_delta" if delta is not None:
                yield self._delta(at_s, delta.all_text, delta.partial_json)
            case "message_delta" if delta is not None:
                yield self._delta(at_s, "", "", delta.stop_reason, delta.stop_sequence)
                yield from self._usage(event.usage, at_s)
            case "message_stop":
                yield self.end(at_s)

    def _delta(
        self, at_s: float, text: str = "", calls: str = "", reason: str | None = None, sequence: str | None = None
    ) -> Delta:
        finish = None if reason is None else _FINISHES.get(reason, reason)
        return Delta(
            request=self.request, at_s=at_s, choice=0, text=text, calls=calls, finish=finish, stop_reason=sequence
        )

    def _usage(self, usage: _Usage | None, at_s: float) -> Iterator[RequestEvent]:
        if usage is not None:
            yield self.usage(at_s, usage.input_tokens + usage.cache_read_input_tokens, usage.output_tokens)


def _call(index: int, part: _Part) -> str:
    return call_begin(index, part.name) + msgspec.json.encode(part.input).decode()


def _last_part(answer_id: str) -> str:
    return answer_id.rpartition("_")[2]


_BY_PATH = {"/v1/responses": Responses, "/v1/messages": Messages}


def surface_of(path: str, request: int) -> Surface:
    """Return what reads an endpoint's answer."""
    return _BY_PATH.get(path, Chunks)(request)
