"""`BatchUsage` adds up the tokens that a batch's answers tell of, which they do by two sets of names."""

from __future__ import annotations

from typing import Self

import msgspec


class BatchUsage(msgspec.Struct, frozen=True):
    """Tokens of a batch's answers."""

    input_tokens: int = 0
    cached_tokens: int = 0  # of the input
    output_tokens: int = 0
    reasoning_tokens: int = 0  # of the output

    @classmethod
    def of_answer(cls, answer: bytes) -> Self:
        """Return what one line's answer tells; nothing where it is an error, or tells nothing."""
        try:
            response = msgspec.json.decode(answer, type=_Line).response
        except msgspec.DecodeError:
            return cls()
        told = None if response is None or response.body is None else response.body.usage
        if told is None:
            return cls()
        inner = told.prompt_tokens_details or told.input_tokens_details or _Details()
        outer = told.completion_tokens_details or told.output_tokens_details or _Details()
        return cls(
            told.prompt_tokens + told.input_tokens,
            inner.cached_tokens,
            told.completion_tokens + told.output_tokens,
            outer.reasoning_tokens,
        )

    def plus(self, other: Self) -> Self:
        return type(self)(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )

    def shown(self) -> dict[str, object]:
        """Return OpenAI's object."""
        return {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self.input_tokens + self.output_tokens,
        }


class _Details(msgspec.Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _Told(msgspec.Struct):
    prompt_tokens: int = 0  # chats, completions and embeddings
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: int = 0  # responses
    output_tokens: int = 0
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Body(msgspec.Struct):
    usage: _Told | None = None


class _Response(msgspec.Struct):
    body: _Body | None = None


class _Line(msgspec.Struct):
    response: _Response | None = None
