"""Completions and chats as events of a chaos run: what one chunk of a stream tells, or a whole body."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from .events import Delta, Done, Failed, RequestEvent, Usage


class Surface:
    """`Surface` reads the answer to one request: JSON in, events out. Raises msgspec.MsgspecError.

    Nothing is repaired, joined or left out, so that what a client could have noticed is in the history.
    """

    done = b"[DONE]"  # the data that ends a stream; empty: an event does

    going_on = ""  # how to ask for more of an answer that goes on without its client, behind its path

    def __init__(self, request: int) -> None:
        self.request = request
        self.answer_id = ""

    def read(self, data: bytes, at_s: float, status: int) -> Iterator[RequestEvent]:
        """Yield what an event, or a whole body, tells. `at_s`: when it came."""
        raise NotImplementedError

    def end(self, at_s: float) -> Done:
        return Done(request=self.request, at_s=at_s, answer_id=self.answer_id)

    def failed(self, at_s: float, status: int, code: str, message: str) -> Failed:
        """Return a refusal, or an error; `code` is empty for what is not a proper one."""
        return Failed(
            request=self.request, at_s=at_s, status=status, code=code, message=message, answer_id=self.answer_id
        )

    def usage(self, at_s: float, num_prompt_tokens: int, num_completion_tokens: int) -> Usage:
        return Usage(
            request=self.request,
            at_s=at_s,
            num_prompt_tokens=num_prompt_tokens,
            num_completion_tokens=num_completion_tokens,
        )


class Error(msgspec.Struct):
    """An error in OpenAI's shape, or in Anthropic's."""

    message: str
    type: str = ""
    code: str | int | None = None

    @property
    def name(self) -> str:
        return str(self.code or self.type)


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
        return ("" if name is None else call_begin(self.index, name)) + self.function.arguments


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


class _Chunk(msgspec.Struct):
    id: str = ""
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Error | None = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Chunks(Surface):
    """`Chunks` reads /v1/completions and /v1/chat/completions."""

    def read(self, data: bytes, at_s: float, status: int) -> Iterator[RequestEvent]:
        chunk = _decode(data)
        self.answer_id = self.answer_id or chunk.id.rpartition("-")[2]
        if chunk.error is not None:
            yield self.failed(at_s, status, chunk.error.name, chunk.error.message)
            return
        for choice in chunk.choices:
            yield self._delta(choice, at_s)
        if chunk.usage is not None:
            yield self.usage(at_s, chunk.usage.prompt_tokens, chunk.usage.completion_tokens)

    def _delta(self, choice: _Choice, at_s: float) -> Delta:
        logprobs = choice.logprobs
        return Delta(
            request=self.request,
            at_s=at_s,
            choice=choice.index,
            text=choice.all_text,
            calls=choice.all_calls,
            token_ids=choice.token_ids or [],
            logprobs=logprobs.of_tokens() if logprobs is not None else [],
            offsets=logprobs.text_offset if logprobs is not None else [],
            finish=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )


def call_begin(index: int, name: str) -> str:
    """Return how a call of a tool begins in a history."""
    return f"\n{index} {name} "
