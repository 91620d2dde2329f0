"""Stop strings in streamed text: found across pieces, never shown in part.

    push("Hello, wor")  -> "Hello, "      "wor" may become the stop string "world": held back
    push("ld!")         -> ""  stopped    the text ends before "world"
    push("k")           -> "work"         it did not: what was held is let go

The result does not depend on how the text is cut into pieces: the match that ends first wins, and of those that
end together the one that began first.
"""

from __future__ import annotations


class StopMatcher:
    """One choice's text on its way to the client."""

    __slots__ = ("_held", "_include", "_stops", "matched")

    def __init__(self, stops: tuple[str, ...], *, include_stop: bool = False) -> None:
        self._stops = stops
        self._include = include_stop
        self._held = ""  # shorter than the longest stop string
        self.matched: str | None = None  # the stop string that ended the text

    def push(self, text: str) -> str:
        """The text that may be shown now. After a match: what stands before it, then nothing more."""
        assert self.matched is None, self.matched
        text = self._held + text
        found = self._first_match(text)
        if found is not None:
            end, start, self.matched = found
            self._held = ""
            return text[: end if self._include else start]
        keep_from = self._first_beginning(text)
        self._held = text[keep_from:]
        return text[:keep_from]

    def release(self) -> str:
        """Return what was held back, where the text ends without a match or must not be matched yet."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, int, str] | None:
        matches = ((text.find(stop), stop) for stop in self._stops)
        return min(((start + len(stop), start, stop) for start, stop in matches if start >= 0), default=None)

    def _first_beginning(self, text: str) -> int:
        """Return where the earliest suffix of `text` starts that is the beginning of a stop string; else its end."""
        earliest = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1), earliest)
            while start >= 0 and not stop.startswith(text[start:]):
                start = text.find(stop[0], start + 1, earliest)
            if start >= 0:
                earliest = start
        return earliest
