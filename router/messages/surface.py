"""/v1/messages: Anthropic's surface of a chat."""

from __future__ import annotations

from ..api.chat_turns import ChatTurns
from ..api.form import Form, FormContext
from ..api.prompts import ChatPrompt
from ..api.schemas import ChatBody
from .form import MESSAGE_EVENTS, MessageForm
from .translate import FIELD_NAMES, chat_body


class MessagesSurface:
    """Translates any call. For counting, a body may leave its limit out."""

    id_prefix = "msg_"
    events = MESSAGE_EVENTS
    field_names = FIELD_NAMES

    def __init__(self, *, counts_only: bool = False) -> None:
        self._counts_only = counts_only

    def chat_body(self, raw: dict[str, object], ignored: list[str] | None) -> dict[str, object]:
        return chat_body(raw, ignored, needs_max_tokens=not self._counts_only)

    def form(self, context: FormContext, turns: ChatTurns, body: ChatBody, chat: ChatPrompt) -> Form:
        return MessageForm(context, turns)
