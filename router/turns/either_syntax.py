"""Two forms of calls at once: the model's own, and the one that it was told of where its template knows no tools."""

from __future__ import annotations

from .json_syntaxes import HERMES_TAGS, HermesSyntax
from .syntax import Place, Progress, Segment, Syntax, first_place
from .values.json_text import skip_gap

_JSON = ("{", "[", "`")  # or a fence around it


class EitherSyntax:
    """Hermes' form (told.py tells it), and another one that an operator has named."""

    def __init__(self, own: Syntax) -> None:
        self._own, self._told = own, HermesSyntax()
        self.marks = own.marks | self._told.marks

    def find(self, text: str, *, is_start: bool) -> Place | None:
        return first_place(syntax.find(text, is_start=is_start) for syntax in (self._own, self._told))

    def read(self, text: str, progress: Progress, *, is_final: bool) -> Segment:
        """Read it as Hermes' where JSON follows the tag, which Qwen3-Coder's form and GLM's begin with, too."""
        if not text.startswith(HERMES_TAGS.begin):
            return self._own.read(text, progress, is_final=is_final)
        at = skip_gap(text, len(HERMES_TAGS.begin))
        if at == len(text) and not is_final:
            return Segment()
        syntax = self._told if text.startswith(_JSON, at) else self._own
        return syntax.read(text, progress, is_final=is_final)
