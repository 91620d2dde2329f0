"""A chat has several surfaces: OpenAI's chat completions, and others that are translated to them.

another body ─> chat_body ─> a chat's body ─> checked, admitted, answered as every chat ─> form ─> the other's words
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .chat import ChatForm
from .chat_turns import ChatTurns
from .events import OPENAI_EVENTS, EventFormat
from .form import Form, FormContext
from .prompts import ChatPrompt
from .schemas import ChatBody

# A body as a chat's body. Unknown fields are refused, unless there is a list that takes their names.
Translation = Callable[[dict[str, object], list[str] | None], dict[str, object]]


class ChatSurface(Protocol):
    """One call's translator."""

    @property
    def id_prefix(self) -> str:
        """The beginning of the answer's id."""
        ...

    @property
    def events(self) -> EventFormat: ...

    def chat_body(self, raw: dict[str, object], ignored: list[str] | None) -> dict[str, object]:
        """Return the same request as a chat's body. Raises RequestError."""
        ...

    def form(self, context: FormContext, turns: ChatTurns, body: ChatBody, chat: ChatPrompt) -> Form: ...


class OpenAISurface:
    """Chat completions as they are."""

    id_prefix = "chatcmpl-"
    events = OPENAI_EVENTS

    def chat_body(self, raw: dict[str, object], ignored: list[str] | None) -> dict[str, object]:
        return raw

    def form(self, context: FormContext, turns: ChatTurns, body: ChatBody, chat: ChatPrompt) -> Form:
        last = chat.messages[-1]
        echoed = str(last["content"]) if body.echo and last["role"] == "assistant" else ""
        return ChatForm(context, turns, echoed=echoed)
