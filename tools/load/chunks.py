"""An endpoint sends chunks of a stream, errors, and a list of its models: what is read of them."""

from __future__ import annotations

import msgspec


class Delta(msgspec.Struct):
    content: object = None  # text, or a list of parts
    reasoning_content: object = None  # thoughts; newer servers call them by the next name
    reasoning: object = None
    role: str | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = 0


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
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
    if choice.delta is not None:
        delta = choice.delta
        text = delta.content or delta.reasoning_content or delta.reasoning
        if delta.role is not None:
            return 1 if text else 0  # chat begins with a chunk that only names the role
    else:
        text = choice.text
    # Empty text before the end: the token's characters are not complete yet.
    return 1 if text or choice.finish_reason is None else 0


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
