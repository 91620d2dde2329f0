"""/v1/messages: Anthropic's surface of a chat."""

from __future__ import annotations

from collections.abc import Sequence

from ..api.chat_turns import ChatTurns
from ..api.form import Form, FormContext
from ..api.prompts import ChatPrompt
from ..api.surface import ChatSurface, renamed
from ..bodies.schemas import ChatBody
from ..turns.places import PlacedTools, Places
from .form import MESSAGE_EVENTS, MessageForm
from .tools import message_tools
from .translate import FIELD_NAMES, chat_body


class MessagesSurface(ChatSurface):
    """Translates one call. For counting, a body may leave its limit out."""

    id_prefix = "msg_"
    events = MESSAGE_EVENTS

    def __init__(self, *, counts_only: bool = False) -> None:
        self._counts_only = counts_only
        self._tools = PlacedTools()
        self._places: Places | None = None  # while this surface's own names are looked at
        self._has_effort = False  # of its own: else it is thinking's

    def chat_body(self, raw: dict[str, object], ignored: list[str] | None) -> dict[str, object]:
        self._tools = message_tools(raw.get("tools"))
        body, self._places = chat_body(raw, ignored, self._tools, needs_max_tokens=not self._counts_only)
        config = raw.get("output_config")
        self._has_effort = isinstance(config, dict) and config.get("effort") is not None
        return body

    def own_names(self, text: str) -> str:
        if text == "reasoning_effort" and not self._has_effort:
            return "thinking"
        return renamed(self._tools.own_names(text), FIELD_NAMES, self._places)

    @property
    def left_out(self) -> Sequence[str]:
        return self._tools.left_out

    def form(self, context: FormContext, turns: ChatTurns, body: ChatBody, chat: ChatPrompt) -> Form:
        return MessageForm(context, turns)
