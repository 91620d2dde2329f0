"""An endpoint sends chunks of a stream, errors, and a list of its models: what is read of them."""

from __future__ import annotations

import msgspec


class Delta(msgspec.Struct):
    content: object = None  # text, or a list of parts
    reasoning_content: object = None  # thoughts; newer servers call them by the next name
    reasoning: object = None
    tool_calls: object = None
    function_call: object = None  # of older servers
    refusal: object = None
    role: str | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = 0


class CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = 0


class Usage(msgspec.Struct):
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None

    @property
    def num_cached_tokens(self) -> int:
        details = self.prompt_tokens_details
        return (details.cached_tokens if details is not None else 0) or 0

    @property
    def num_thought_tokens(self) -> int:
        details = self.completion_tokens_details
        return (details.reasoning_tokens if details is not None else 0) or 0


class Chunk(msgspec.Struct):
    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: object = None
    kind: str | None = msgspec.field(name="object", default=None)
    message: str | None = None  # where `object` is "error"


class Model(msgspec.Struct):
    id: str


class Models(msgspec.Struct):
    data: list[Model]


decode_chunk = msgspec.json.Decoder(Chunk).decode


def count_tokens(choice: Choice) -> int:
    """Return the tokens that a chunk holds, as far as it tells."""
    if choice.token_ids is not None:
        return len(choice.token_ids)
    said = (choice.text,) if choice.delta is None else _said(choice.delta)
    if any(said):
        return 1
    if choice.prompt_token_ids is not None:
        return 0  # a stream may begin with a chunk that only repeats the prompt
    if choice.delta is not None and choice.delta.role is not None:
        return 0  # chat begins with a chunk that only names the role
    # Empty text before the end: the token's characters are not complete yet. No text at all keeps a connection open.
    return 1 if choice.finish_reason is None and any(part is not None for part in said) else 0


def shows_thoughts(choice: Choice) -> bool:
    """Return whether thoughts can be seen in a chunk: as such, or within a text that holds whatever there is."""
    delta = choice.delta
    if delta is None:
        return choice.text is not None
    return bool(delta.reasoning_content or delta.reasoning) or isinstance(delta.content, list)


def _said(delta: Delta) -> tuple[object, ...]:
    thoughts = delta.reasoning_content, delta.reasoning
    return (delta.content, *thoughts, delta.tool_calls, delta.function_call, delta.refusal)


def body_message(text: str) -> str:
    """Return the sentence inside an OpenAI error body, or the body."""
    try:
        body = msgspec.json.decode(text)
    except msgspec.MsgspecError:
        return text
    return error_message(body.get("error", text) if isinstance(body, dict) else text)


def error_message(error: object) -> str:
    """Return the sentence of an error, or all of it."""
    return str(error["message"]) if isinstance(error, dict) and "message" in error else str(error)
