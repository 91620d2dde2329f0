"""Server-sent events: bytes as they arrive in, the data of whole events out. Knows neither HTTP nor JSON.

Chunks of the network fall anywhere: inside a line, between the two newlines that end an event, inside a
character. The splitter keeps the unfinished rest and gives each event's data once, when its empty line is there.
"""

from __future__ import annotations


class EventSplitter:
    """One stream's splitter. Comments and the fields `event` and `retry` are skipped."""

    __slots__ = ("_data", "_id", "_rest", "last_id")

    def __init__(self) -> None:
        self.last_id = ""  # of the events that are complete
        self._id = ""
        self._rest = b""  # the line that has no newline yet
        self._data: list[bytes] = []  # `data:` lines of the event that has no empty line yet

    def push(self, received: bytes) -> list[bytes]:
        """Events completed by these bytes, in order."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif line.startswith(b"id:"):
                self._id = line[3:].strip().decode("latin-1")
            elif not line and self._data:
                self.last_id = self._id
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data = []
        return events
