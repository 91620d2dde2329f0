"""Messages as chat templates take them: with one text each, and a mark where the last one is to be continued."""

from __future__ import annotations

from collections.abc import Mapping

from ..common.errors import RequestError

_CONTINUE_MARK = "\ue0f0kvferry-continue\ue0f0"  # private use: stands where a continued message ends


def with_text_content(message: Mapping[str, object], index: int) -> dict[str, object]:
    """Return the message with its content as one string: templates concatenate it."""
    content = message.get("content")
    if content is None:
        return {**message, "content": ""}
    if isinstance(content, str):
        return dict(message)
    if isinstance(content, (list, tuple)):
        texts = [_part_text(part, f"messages[{index}].content[{at}]") for at, part in enumerate(content)]
        return {**message, "content": "".join(texts)}
    raise RequestError("content is a string or a list of text parts", param=f"messages[{index}].content")


def _part_text(part: object, param: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(text := part.get("text"), str):
        raise RequestError('only parts of the form {"type": "text", "text": ...} are supported', param=param)
    return text


def mark_end(messages: list[dict[str, object]]) -> str:
    """Put a mark behind the last message's text and return it."""
    if not messages:
        raise RequestError("there is no message to continue", param="messages")
    text, mark = str(messages[-1]["content"]), _CONTINUE_MARK
    while mark in text:
        mark += _CONTINUE_MARK
    messages[-1]["content"] = text + mark
    return mark


def cut_at(text: str, mark: str) -> str:
    end = text.rfind(mark)
    if end < 0:
        raise RequestError(
            "the chat template does not print the last message: it cannot be continued", param="messages"
        )
    return text[:end]
