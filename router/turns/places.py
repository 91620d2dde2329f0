"""The places of a chat's messages in the body that it was made of: what is wrong is told by the client's own names.

chat       messages[3].tool_calls[1].function.name   messages[2].tool_call_id          messages[0].content
another    messages[2].content[1].name               messages[1].content[0].tool_use_id   system
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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


def _joined(place: str, name: str) -> str:
    return f"{place}.{name}" if name else place
