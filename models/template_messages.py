"""Messages as chat templates take them: with one text each, and a mark where the last one is to be continued.

Most templates take a content as a string, some (those of guards, and of models that see pictures) go over its parts and
print nothing of a string. Which form it is for whose messages is found out by a conversation that nobody means:

    both forms, or strings alone ─> strings
    parts alone                  ─> one part with the text
    neither prints it            ─> no template for chats
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..common.errors import RequestError

_CONTINUE_MARK = "\ue0f0kvferry-continue\ue0f0"  # private use: stands where a continued message ends
_WORD = "qjx"  # of nobody's template
# Some templates have no place for a system's message, some take one turn alone.
_CONVERSATIONS = (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("user",))
_PARAMETERS = {"type": "object", "properties": {}}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": _PARAMETERS}}
UNTOLD = (
    "the chat template prints nothing of what a user says, neither of a string nor of a list of parts; "
    "--chat-template FILE replaces it"
)

Messages = Sequence[Mapping[str, object]]


@dataclass(slots=True, frozen=True)
class ContentForms:
    """`ContentForms` say in which form a template takes the content of whose messages."""

    in_parts: Mapping[str, bool] = field(default_factory=dict)  # by role, as far as it is known
    tells_users: bool = True  # False: it prints nothing of what a user says, in either form

    @classmethod
    def of(cls, render: Callable[[Messages], str | None]) -> ContentForms:
        """Find them; `render` returns None for what the template refuses."""
        is_rendered = False
        for roles in _CONVERSATIONS:
            plain = render([_said(role, in_parts=False) for role in roles])
            by_string = _told(roles, plain)
            if by_string >= set(roles):
                return cls()
            in_parts = render([_said(role, in_parts=role not in by_string) for role in roles])
            by_parts = _told(roles, in_parts)
            if "user" in by_string | by_parts:
                return cls({role: role not in by_string for role in by_string | by_parts})
            is_rendered |= plain is not None or in_parts is not None
        return cls(tells_users=not is_rendered)

    def formed(self, message: dict[str, object]) -> dict[str, object]:
        """Return a message, whose content is a string, as the template takes it: an unknown role's as a user's."""
        if not self.in_parts.get(str(message.get("role")), self.in_parts.get("user", False)):
            return message
        text = message["content"]
        has_none = not text and bool(message.get("tool_calls"))  # beside calls there may be nothing that was said
        return {**message, "content": [] if has_none else [{"type": "text", "text": text}]}


def _said(role: str, *, in_parts: bool) -> dict[str, object]:
    return ContentForms({role: in_parts}).formed({"role": role, "content": _WORD + role})


def _told(roles: Sequence[str], prompt: str | None) -> set[str]:
    return {role for role in roles if prompt is not None and _WORD + role in prompt.lower()}


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
    """Put a mark behind the last message's text and return it.

    It ends with a space, by which `cut_at` sees whether the template trims.
    """
    if not messages:
        raise RequestError("there is no message to continue", param="messages")
    text, mark = str(messages[-1]["content"]), _CONTINUE_MARK
    while mark in text:
        mark += _CONTINUE_MARK
    messages[-1]["content"] = f"{text}{mark} "
    return f"{mark} "


def cut_at(text: str, mark: str) -> str:
    """Return the prompt up to the mark; where the template trims, without white space there, as `transformers` does."""
    end = text.rfind(mark.rstrip())
    if end < 0:
        raise RequestError(
            "the chat template does not print the last message: it cannot be continued", param="messages"
        )
    return text[:end] if text.startswith(mark, end) else text[:end].rstrip()
