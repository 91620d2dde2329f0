"""A turn is what a model says before it is answered: reasoning, then content and calls of tools."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from .call_reader import CallDelta, CallPiece, CallReader
from .reasoning import ReasoningReader

_ID_CHARS = 24


@dataclass(slots=True)
class TurnDelta(CallDelta):
    """The parts of a turn by which a piece of text lets it grow."""

    reasoning: str = ""
    ends_call: bool = False  # the first call is over

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.parts)


class TurnReader:
    """The state of one choice. Without readers all text is content."""

    def __init__(
        self, reasoning: ReasoningReader | None = None, calls: CallReader | None = None, *, has_one_call: bool = False
    ) -> None:
        """`has_one_call`: no call after the first is told."""
        self.reasoning = reasoning
        self._calls = calls
        self._has_one_call = has_one_call
        self.has_called = False

    @property
    def is_plain(self) -> bool:
        return self.reasoning is None and self._calls is None

    @property
    def is_in_call(self) -> bool:
        return self._calls is not None and self._calls.is_in_call

    @property
    def is_unclear(self) -> bool:
        return self._calls is not None and self._calls.is_unclear

    def push(self, text: str, *, is_final: bool = False) -> TurnDelta:
        reasoning = ""
        if self.reasoning is not None:
            reasoning, text = self.reasoning.push(text, is_final=is_final)
        if self._calls is None:
            return TurnDelta([text] if text else [], reasoning)
        parts = self._calls.push(text, is_final=is_final).parts
        ends_call = self._calls.has_finished
        if self._has_one_call:
            parts = [part for part in parts if isinstance(part, str) or part.index == 0]
        self.has_called = self.has_called or any(isinstance(part, CallPiece) for part in parts)
        return TurnDelta(parts, reasoning, ends_call)


def call_id(seed: int, prompt_token_ids: Sequence[int], choice: int, index: int, *, is_short: bool = False) -> str:
    """Return a call's id: the same in every stream of the same request, another one after another prompt.

    Short: nine letters and digits, as Mistral's templates demand.
    """
    digest = hashlib.blake2b(array("I", prompt_token_ids).tobytes(), digest_size=16)
    digest.update(b"%d.%d.%d" % (seed, choice, index))
    return digest.hexdigest()[:9] if is_short else "call_" + digest.hexdigest()[:_ID_CHARS]
