"""A chat has several surfaces: OpenAI's chat completions, and others that are translated to them.

another body ─> chat_body ─> a chat's body ─> checked, admitted, answered as every chat ─> form ─> the other's words
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from ...common.errors import RequestError
from ..bodies.schemas import ChatBody
from ..kept.kept_answer import AnswerKey
from ..turns.places import Places
from .chat import ChatForm
from .chat_turns import ChatTurns
from .events import OPENAI_EVENTS, EventFormat
from .form import Form, FormContext
from .prompts import ChatPrompt

# What the names of a chat's fields are in another body: a pattern, and what stands there.
FieldNames = Sequence[tuple[re.Pattern[str], str]]


class ChatSurface(Protocol):
    """One call's translator. What most of them have in common they inherit."""

    @property
    def id_prefix(self) -> str:
        """The beginning of the answer's id."""
        ...

    @property
    def events(self) -> EventFormat: ...

    @property
    def left_out(self) -> Sequence[str]:
        """The places of what the model is not told of, for a body that was read."""
        return ()

    @property
    def key(self) -> AnswerKey | None:
        """The server's own name for the answer to a body that was read; None: the client may give one."""
        return None

    @property
    def num_looked_up(self) -> int:
        """The number of bytes of what is kept here that are part of a body that was read."""
        return 0

    def num_to_look_up(self, raw: Mapping[str, object]) -> int:
        """Return how many they may be, of a body that is to be read."""
        return 0

    def chat_body(self, raw: dict[str, object], ignored: list[str] | None) -> dict[str, object]:
        """Return the same request as a chat's body. Raises RequestError.

        Unknown fields are refused, unless there is a list that takes their names.
        """
        ...

    def own_names(self, text: str) -> str:
        """Return the text with the names of this surface's fields in place of the chat's."""
        ...

    def form(self, context: FormContext, turns: ChatTurns, body: ChatBody, chat: ChatPrompt) -> Form: ...


class OpenAISurface(ChatSurface):
    """Chat completions as they are."""

    id_prefix = "chatcmpl-"
    events = OPENAI_EVENTS

    def chat_body(self, raw: dict[str, object], ignored: list[str] | None) -> dict[str, object]:
        return raw

    def own_names(self, text: str) -> str:
        return text

    def form(self, context: FormContext, turns: ChatTurns, body: ChatBody, chat: ChatPrompt) -> Form:
        last = chat.messages[-1]
        said = chat.continued if body.continue_final_message else str(last["content"])
        echoed = said if body.echo and last["role"] == "assistant" else ""
        return ChatForm(context, turns, echoed=echoed, is_forced=chat.use.is_forced)


@contextlib.contextmanager
def naming_fields(own_names: Callable[[str], str]) -> Iterator[None]:
    """Have what is wrong with a chat's body told by the names that its client has given."""
    try:
        yield
    except RequestError as error:
        param = None if error.param is None else own_names(error.param)
        text = own_names(str(error))
        if (text, param) == (str(error), error.param):
            raise
        raise RequestError(text, param=param, code=error.code, status=error.status, kind=error.kind) from None


def renamed(text: str, names: FieldNames, places: Places | None) -> str:
    """Return the text with other names of fields and, where they are known, of places."""
    for pattern, own in names:
        text = pattern.sub(own, text)
    return text if places is None else places.own_names(text)
