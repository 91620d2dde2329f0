"""A turn is what a model says before it is answered: reasoning, then content and calls of tools."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Protocol

from .call_reader import Arguments, CallReader
from .parts import CallPiece, Part, Thought, TurnDelta
from .reasoning import DraftReader, ReasoningReader

_ID_CHARS = 24


class TurnReader(Protocol):
    """A reader takes the text of one choice, piece by piece."""

    @property
    def is_plain(self) -> bool:
        """Tell whether all text is content."""
        ...

    @property
    def has_called(self) -> bool: ...

    @property
    def is_beside_text(self) -> bool:
        """Tell whether what came last is a call, a thought, or the form of one: no stop string counts in it."""
        ...

    @property
    def is_unclear(self) -> bool:
        """Tell whether what came last may turn out to be one."""
        ...

    def push(self, text: str, *, is_final: bool = False) -> TurnDelta:
        """Take what comes next; the last text is final."""
        ...


class TaggedReader:
    """Reads reasoning in tags, then calls in their own form. Without readers all text is content."""

    def __init__(
        self,
        reasoning: ReasoningReader | None = None,
        calls: CallReader | None = None,
        drafts: DraftReader | None = None,
        *,
        has_one_call: bool = False,
        has_calls_alone: bool = False,
    ) -> None:
        """`has_one_call`: no call after the first is told; `has_calls_alone`: what is no call is a part of one."""
        self._reasoning = reasoning
        self._drafts = drafts
        self._calls = calls
        self._has_one_call = has_one_call
        self._has_calls_alone = has_calls_alone
        self._was_in_call = False  # what came last may have ended it
        self.has_called = False

    @property
    def is_plain(self) -> bool:
        return self._reasoning is None and self._calls is None

    @property
    def is_beside_text(self) -> bool:
        is_inside = any(reader is not None and reader.is_inside for reader in (self._reasoning, self._calls))
        return is_inside or self._was_in_call

    @property
    def is_unclear(self) -> bool:
        return any(reader is not None and reader.is_unclear for reader in (self._reasoning, self._calls))

    def push(self, text: str, *, is_final: bool = False) -> TurnDelta:
        delta = TurnDelta()
        self._was_in_call = self._calls is not None and self._calls.is_inside
        if self._reasoning is not None:
            reasoning, text = self._reasoning.push(text, is_final=is_final)
            if self._drafts is not None:
                reasoning, text = self._without_answer(self._drafts, reasoning, text, is_final=is_final)
            if reasoning:
                delta.parts.append(Thought(reasoning))
        if self._calls is None:
            delta.say(text)
            return delta
        parts = self._calls.push(text, is_final=is_final).parts
        delta.ends_call = self._calls.has_finished
        delta.parts += [part for part in parts if self._is_told(part)]
        self.has_called = self.has_called or bool(delta.calls)
        return delta

    def _without_answer(self, drafts: DraftReader, reasoning: str, text: str, *, is_final: bool) -> tuple[str, str]:
        """Return the thoughts, and the text with the calls that thoughts without an end tag end with."""
        assert self._reasoning is not None
        reasoning = drafts.push(reasoning)
        if self._reasoning.is_outside:
            return reasoning + drafts.release(), text
        if not is_final:
            return reasoning, text
        rest, answer = drafts.end()
        return reasoning + rest, answer

    def _is_told(self, part: Part) -> bool:
        if isinstance(part, CallPiece):
            return part.index == 0 or not self._has_one_call
        return not self._has_calls_alone  # else it is cut within a call that nobody could read


class WholeCharacters:
    """Keeps one choice's arguments to whole characters, whatever form its calls have (call_reader.py)."""

    def __init__(self) -> None:
        self._arguments = Arguments()  # of the last call
        self._index: int | None = None  # of that call

    def push(self, parts: Sequence[Part], *, is_final: bool) -> list[Part]:
        """Return the parts as they are told; what a call holds back is told before what comes behind the call."""
        told: list[Part] = []
        for part in parts:
            if not isinstance(part, CallPiece):
                told += [*self._end(), part]
                continue
            if part.index != self._index:
                told += self._end()
                self._index = part.index
            arguments = self._arguments.push(part.arguments)
            if arguments or part.name is not None:
                told.append(CallPiece(part.index, part.name, arguments))
        return [*told, *self._end()] if is_final else told

    def _end(self) -> list[Part]:
        rest = self._arguments.end()
        return [CallPiece(self._index, None, rest)] if rest and self._index is not None else []


def call_id(seed: int, prompt_token_ids: Sequence[int], choice: int, index: int, *, is_short: bool = False) -> str:
    """Return a call's id: the same in every stream of the same request, another one after another prompt.

    Short: nine letters and digits, as Mistral's templates demand.
    """
    digest = hashlib.blake2b(array("I", prompt_token_ids).tobytes(), digest_size=16)
    digest.update(b"%d.%d.%d" % (seed, choice, index))
    return digest.hexdigest()[:9] if is_short else "call_" + digest.hexdigest()[:_ID_CHARS]
