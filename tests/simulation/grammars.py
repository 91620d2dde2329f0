"""Grammars without a library: which tokens may come next is a residue class, chosen by all tokens of the answer so far.

So a matcher that has missed a token, or has taken those of another choice, gives another mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as TokenIds
from random import Random
from typing import TYPE_CHECKING

from kvferry.common.grammar import CheckedGrammar, Grammar, GrammarBroken, pack_mask

from .oracle import VOCAB_SIZE, allowed_after, next_state

if TYPE_CHECKING:
    from .workers import Worker

LATE_S = 0.01
_LATE_SHARE = 0.1  # of masks
AWAITED_S = 0.002  # is compiled within
MAX_COMPILE_S = 0.05  # some steps: requests overtake those whose grammar is not ready


def checked_grammar(start: int) -> CheckedGrammar:
    """Return the grammar that begins in this state, as a router's helper hands it on."""
    return CheckedGrammar(Grammar("sim", b"%d" % start), pack_mask(mask_of(allowed_after(start))))


def mask_of(tokens: TokenIds[int]) -> bytes:
    """Return the mask that lets these tokens come."""
    return sum(1 << token for token in tokens).to_bytes(VOCAB_SIZE // 8, "little")


class SimMatcher:
    """Implements `common.grammar.Matcher`."""

    def __init__(self, start: int, seen: Counter[str]) -> None:
        self._state = start
        self._seen = seen
        self._past: list[int] = []

    def rollback(self, num_tokens: int) -> None:
        self._seen["tokens of drafts taken back from matchers"] += num_tokens
        if num_tokens:
            self._state = self._past[-num_tokens]
            del self._past[-num_tokens:]

    def accept(self, token_ids: TokenIds[int]) -> None:
        self._seen["matchers brought up"] += len(token_ids) > 1
        for token in token_ids:
            if token not in allowed_after(self._state):
                raise GrammarBroken(f"token {token} is not in {allowed_after(self._state)}")
            self._past.append(self._state)
            self._state = next_state(self._state, token)

    def mask(self) -> bytes:
        return mask_of(allowed_after(self._state))

    def forced(self) -> int | None:
        allowed = allowed_after(self._state)
        self._seen["forced tokens"] += len(allowed) == 1
        return allowed[0] if len(allowed) == 1 else None


class SimGrammar:
    """Implements `common.grammar.CompiledGrammar`."""

    failure = ""

    def __init__(self, start: int, seen: Counter[str]) -> None:
        self.is_ready = self.is_late = False
        self.is_costly = start % 4 == 0
        self._start = start
        self._seen = seen

    def matcher(self) -> SimMatcher:
        assert self.is_ready, "a grammar is matched before it is compiled"
        self._seen["matchers"] += 1
        return SimMatcher(self._start, self._seen)


class SimGrammars:
    """Implements `common.grammar.Grammars` for one life of a worker: compiling takes a while."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._known: dict[Grammar, SimGrammar] = {}

    def get(self, grammar: Grammar, *, is_awaited: bool) -> SimGrammar:
        if grammar not in self._known:
            known = self._known[grammar] = SimGrammar(int(grammar.text), self._worker.world.tally.seen)
            takes_s = self._worker.world.kernel.random.uniform(0, MAX_COMPILE_S)
            self._worker.process.after(takes_s, self._compiled, known)
            self._worker.process.after(LATE_S, self._late, known)
        found = self._known[grammar]
        if is_awaited and not found.is_ready:
            self._worker.world.tally.seen["grammars that an answer waited for"] += 1
            self._worker.process.after(AWAITED_S, self._compiled, found)
        return found

    def _late(self, known: SimGrammar) -> None:
        known.is_late = not known.is_ready
        self._worker.wake()

    def _compiled(self, known: SimGrammar) -> None:
        known.is_ready = True
        self._worker.wake()


class LateMasks:
    """Some masks are late, as those are that take the library a tenth of a second."""

    def __init__(self, seed: str, seen: Counter[str]) -> None:
        self._random = Random(seed)
        self._seen = seen

    def __call__(self) -> bool:
        is_late = self._random.random() < _LATE_SHARE
        self._seen["rows postponed"] += is_late
        return is_late
