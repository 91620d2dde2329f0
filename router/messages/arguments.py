r"""Pieces of a call's arguments as clients of /v1/messages read them: each beginning of the JSON is parsed at once.

\ud83d ─> held back ─> \ud83d\ude00       a character, told in one piece
                    └> ?                 half of one, with which their parser fails; whole answers say so, too
"""

from __future__ import annotations

import re

_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_OPEN = r"\\(?:u[0-9a-fA-F]{0,3})?\Z"  # an escape that may go on
# What no later piece changes. Possessive: one pass.
_SETTLED = re.compile(
    rf"(?:[^\\]++|{_HIGH}{_LOW}|{_HIGH}(?!\Z|{_OPEN})|(?!{_HIGH}|{_OPEN})\\(?:u[0-9a-fA-F]{{4}}|.))*+", re.DOTALL
)
_ESCAPE = re.compile(rf"{_HIGH}{_LOW}|({_HIGH}|{_LOW})|\\.", re.DOTALL)


class Arguments:
    """One call's."""

    def __init__(self) -> None:
        self._held = ""  # begins at an escape

    def push(self, text: str) -> str:
        """Take more of them, and return what can be told."""
        text = self._held + text
        settled = _SETTLED.match(text)
        assert settled is not None
        self._held = text[settled.end() :]
        return _mended(settled[0])

    def end(self) -> str:
        """Return what was held back."""
        return _mended(self._held)


def _mended(text: str) -> str:
    return _ESCAPE.sub(lambda found: "?" if found[1] else found[0], text)
