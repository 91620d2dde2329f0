"""Grammars that are ready when a test says so."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.common.grammar import Grammar


class FakeMatcher:
    """Any token may come after any other."""

    def accept(self, token_ids: Sequence[int]) -> None:
        """All fit."""

    def rollback(self, num_tokens: int) -> None:
        """There is nothing to forget."""

    def mask(self) -> bytes:
        return b"\xff" * 64

    def forced(self) -> int | None:
        return None


class FakeGrammar:
    """Implements `common.grammar.CompiledGrammar`."""

    def __init__(self, *, is_ready: bool) -> None:
        self.is_ready = is_ready
        self.is_late = self.is_costly = False
        self.failure = ""

    def matcher(self) -> FakeMatcher:
        assert self.is_ready
        return FakeMatcher()


class FakeGrammars:
    """Implements `common.grammar.Grammars`. `asked`: the grammars, in order, each once for every question; `awaited`:
    those that an answer could not go on without."""

    def __init__(self, *, are_ready: bool = False) -> None:
        self.asked: list[Grammar] = []
        self.awaited: list[Grammar] = []
        self.known: dict[Grammar, FakeGrammar] = {}
        self._are_ready = are_ready

    def get(self, grammar: Grammar, *, is_awaited: bool) -> FakeGrammar:
        self.asked.append(grammar)
        if is_awaited:
            self.awaited.append(grammar)
        return self.known.setdefault(grammar, FakeGrammar(is_ready=self._are_ready))
