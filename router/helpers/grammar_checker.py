"""Grammars of clients, compiled before anybody is asked to follow them, in processes that can be killed.

    known from before ─> at once
    small             ─> the quick process: milliseconds
    large, or what was too much for the quick one ─> the long process: what is left of two seconds, or a refusal

Decode workers compile a grammar again, on threads that nothing can end: what has come through here in bounded time and
memory does there, too. Prefill workers do not: they get the mask of first tokens that was found here.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import msgspec

from ...common.errors import CapacityError, RequestError
from ...common.grammar import CheckedGrammar, Grammar
from .helper import Helper, HelperLost
from .wire import COMPILE_GRAMMAR, REFUSAL, SET_VOCABULARY, HelperRefusal, VocabularySetup

TIME_LIMIT_S = 2.0  # of a grammar, in both processes
QUICK_BYTES = 4 * 2**10  # a schema of some dozen properties: a few milliseconds
QUICK_LIMIT_S = 0.3  # larger: one costly grammar holds up more small ones; smaller: more processes are ended
MAX_KNOWN = 4096  # grammars that compiled: agents ask with the same tools again and again


class GrammarChecker(Protocol):
    """Tells whether a grammar can be followed."""

    async def check(self, grammar: Grammar, param: str) -> CheckedGrammar:
        """Return the grammar. Raises RequestError, about the field `param` of the body, for one that cannot."""
        ...

    def close(self) -> None: ...


class GrammarCompilers:
    """Implements `GrammarChecker` for one model's vocabulary. Belongs to one loop.

    The processes are started, and read the vocabulary, when the first grammar comes: many servers never see one.
    """

    def __init__(self, model_dir: Path, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        def helper(*, gives_way: bool) -> Helper:
            setup = VocabularySetup(str(model_dir), vocab_size, sorted(eos_token_ids), gives_way)
            return Helper((SET_VOCABULARY, msgspec.msgpack.encode(setup)))

        self.quick, self.long = helper(gives_way=False), helper(gives_way=True)
        self._known: OrderedDict[bytes, bytes] = OrderedDict()  # digest -> packed first mask, the latest used last

    async def check(self, grammar: Grammar, param: str) -> CheckedGrammar:
        payload = msgspec.msgpack.encode(grammar)
        digest = hashlib.blake2b(payload, digest_size=16).digest()
        if (mask := self._known.get(digest)) is None:
            mask = self._known[digest] = await self._first_mask(payload, param)
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        self._known.move_to_end(digest)
        return CheckedGrammar(grammar, mask)

    async def _first_mask(self, payload: bytes, param: str) -> bytes:
        limit_s = TIME_LIMIT_S
        if len(payload) <= QUICK_BYTES:
            try:
                return await _ask(self.quick, payload, param, QUICK_LIMIT_S)
            except _TooMuch:
                limit_s -= QUICK_LIMIT_S
        try:
            return await _ask(self.long, payload, param, limit_s)
        except _TooMuch as error:
            raise RequestError(f"'{param}' {error}", param=param, code="unsupported_grammar") from None

    def close(self) -> None:
        self.quick.close()
        self.long.close()


class _TooMuch(Exception):
    """The process was killed at the limit, or has ended by the grammar."""


async def _ask(helper: Helper, payload: bytes, param: str, limit_s: float) -> bytes:
    """Have a process compile the grammar, and return its packed first mask. Raises _TooMuch where it does not."""
    try:
        kind, answer = await helper.ask(COMPILE_GRAMMAR, payload, limit_s)
    except HelperLost as error:
        if error.is_late:
            raise _TooMuch(f"takes more than {TIME_LIMIT_S:g} s to compile") from None
        if error.has_ended:
            raise _TooMuch("takes more memory, or a deeper stack, than there is to compile it") from None
        raise CapacityError(f"'{param}' could not be compiled: {error}", status=503) from None
    if kind != REFUSAL:
        return answer
    refusal = msgspec.msgpack.decode(answer, type=HelperRefusal)
    if refusal.kind == "model":
        raise RequestError(f"'{param}': {refusal.message}", param=param, code="unsupported_grammar")
    where = f"{param}{refusal.param or ''}"
    raise RequestError(f"'{param}' {refusal.message}", param=where[:128], code=refusal.code, status=refusal.status)
