"""A chat's answer in the words of /v1/messages: blocks of content, whole or as events.

message_start, ping ─> content_block_start, _delta …, _stop for each block ─> message_delta, message_stop
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ...common.request import FinishReason
from ..api.chat_turns import TOOL_CALLS, ChatTurns
from ..api.choice import TextPiece
from ..api.events import EventFormat, encode_typed
from ..api.form import Form, FormContext
from ..state.errors import HttpFailure
from ..turns.blocks import Block, BlockEvent, Blocks
from .full import FULL, full_context
from .translate import NO_THREADS, input_of

Fields = dict[str, object]

_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(request_id: str, failure: HttpFailure) -> bytes:
    """Return an error in Anthropic's shape; within a stream there is no id, which stands before it."""
    kind = _ERRORS.get(failure.status, "invalid_request_error" if failure.status < 500 else "api_error")
    message = full_context(failure.message) if failure.code == FULL else failure.message
    error: Fields = {"type": kind, "message": message}
    if failure.code == NO_THREADS:
        error["details"] = {"error_code": NO_THREADS, "unsupported": [failure.param]}
    told: Fields = {"request_id": request_id} if request_id else {}
    return msgspec.json.encode({"type": "error", "error": error, **told})


def _error_event(failure: HttpFailure) -> bytes:
    return b"event: error\ndata: " + error_body("", failure) + b"\n\n"


MESSAGE_EVENTS = EventFormat(encode_typed, _error_event, b"")


class MessageForm(Form):
    """One answer; it has one choice."""

    def __init__(self, context: FormContext, turns: ChatTurns) -> None:
        self._context = context
        self._turns = turns
        self._blocks = Blocks()

    def chunks(self, index: int, piece: TextPiece, *, is_first: bool) -> list[Fields]:
        events: list[Fields] = []
        if is_first:
            events += [{"type": "message_start", "message": self._message([], None, None)}, {"type": "ping"}]
        changes = list(self._blocks.push(self._turns.read(index, piece)))
        if piece.finish is not None:
            changes += self._blocks.close()
        events += [event for change in changes for event in self._events_of(change)]
        if piece.finish is not None:
            reason, sequence = self._end(piece)
            delta = {"stop_reason": reason, "stop_sequence": sequence}
            events.append({"type": "message_delta", "delta": delta, "usage": self._usage()})
            events.append({"type": "message_stop"})
        return events

    def whole(self, pieces: Sequence[TextPiece]) -> Fields:
        (piece,) = pieces
        for _ in self._blocks.push(self._turns.read(0, piece)):
            pass
        return self._message([self._content(block) for block in self._blocks.blocks], *self._end(piece))

    def _message(self, content: list[Fields], reason: str | None, sequence: str | None) -> Fields:
        return {
            "id": self._context.answer_id,
            "type": "message",
            "role": "assistant",
            "model": self._context.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": self._usage(),
        }

    def _content(self, block: Block) -> Fields:
        match block.kind:
            case "reasoning":
                return {"type": "thinking", "thinking": block.text, "signature": ""}
            case "call":
                called = {"id": self._call_id(block), "name": block.name, "input": input_of(block.text)}
                return {"type": "tool_use", **called}
        return {"type": "text", "text": block.text}

    def _events_of(self, change: BlockEvent) -> list[Fields]:
        block = change.block
        match change.action, block.kind:
            case "begin", "text":
                content: Fields = {"type": "text", "text": ""}
            case "begin", "reasoning":
                content = {"type": "thinking", "thinking": "", "signature": ""}
            case "begin", _:
                content = {"type": "tool_use", "id": self._call_id(block), "name": block.name, "input": {}}
            case "grow", "text":
                return [_delta(block, {"type": "text_delta", "text": change.text})]
            case "grow", "reasoning":
                return [_delta(block, {"type": "thinking_delta", "thinking": change.text})]
            case "grow", _:
                return [_delta(block, {"type": "input_json_delta", "partial_json": change.text})]
            case _:
                return [{"type": "content_block_stop", "index": block.index}]
        return [{"type": "content_block_start", "index": block.index, "content_block": content}]

    def _call_id(self, block: Block) -> str:
        """Return a call's id, which is made of the whole prompt: not for every piece of its arguments."""
        return self._turns.call_id(0, block.number)

    def _end(self, piece: TextPiece) -> tuple[str, str | None]:
        """Return why the answer ended, and the stop sequence where one did it."""
        if self._turns.finish(0, piece) == TOOL_CALLS:
            return "tool_use", None
        if piece.finish == FinishReason.LENGTH:
            return "max_tokens", None
        if isinstance(piece.stop_reason, str):
            return "stop_sequence", piece.stop_reason
        return "end_turn", None

    def _usage(self) -> Fields:
        """Return the tokens so far: those of the prompt that were found in a cache are not among the input's."""
        usage = self._context.usage()
        num_cached = usage.prompt_tokens_details.cached_tokens
        return {
            "input_tokens": usage.prompt_tokens - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": usage.completion_tokens,
        }


def _delta(block: Block, delta: Fields) -> Fields:
    return {"type": "content_block_delta", "index": block.index, "delta": delta}
