"""The places of a chat's messages and tools in the body that it was made of: clients are told by their own names.

chat       messages[3].tool_calls[1].function.name   messages[2].tool_call_id          messages[0].content
another    messages[2].content[1].name               messages[1].content[0].tool_use_id   system
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

Message = dict[str, object]

_NAMED = re.compile(r"\bmessages\[(\d+)\](?:\.tool_calls\[(\d+)\])?((?:\.[a-z_]+)*)")


@dataclass(slots=True)
class PlacedMessage:
    """A chat's message, and where it stands in its client's body. `names` are those of its fields there."""

    message: Message
    where: str
    names: Mapping[str, str] = field(default_factory=dict)  # "" for the place itself
    calls: list[str] = field(default_factory=list)  # places


@dataclass(slots=True, frozen=True)
class Places:
    """The places of a chat's messages. `call_names` are the names of a call's fields in the client's body."""

    messages: Sequence[PlacedMessage]
    call_names: Mapping[str, str]

    def own_names(self, text: str) -> str:
        """Return the text with the client's names in place of the chat's."""
        return _NAMED.sub(self._own_name, text)

    def _own_name(self, found: re.Match[str]) -> str:
        index, call, path = int(found[1]), found[2], found[3].removeprefix(".")
        if index >= len(self.messages):
            return found[0]
        placed = self.messages[index]
        if call is None:
            return _joined(placed.where, placed.names.get(path, path))
        place = placed.calls[int(call)] if int(call) < len(placed.calls) else placed.where
        return _joined(place, self.call_names.get(path, path))


@dataclass(slots=True)
class PlacedTools:
    """A request's tools as a chat has them. `places` are those of the functions in the client's body."""

    functions: list[dict[str, object]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # places of what the model is not told of, other fields' too

    _in_chat: ClassVar[re.Pattern[str]] = re.compile(r"\btools\[(\d+)\]")

    def own_names(self, text: str) -> str:
        """Return the text with the client's places in place of the chat's."""
        return self._in_chat.sub(self._place, text)

    def _place(self, found: re.Match[str]) -> str:
        index = int(found[1])
        return self.places[index] if index < len(self.places) else found[0]


def _joined(place: str, name: str) -> str:
    return f"{place}.{name}" if name else place
