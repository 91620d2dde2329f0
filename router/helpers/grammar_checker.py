"""Grammars of clients, compiled before anybody is asked to follow them, in processes that can be killed.

    known from before ─> at once
    small             ─> the quick process: milliseconds
    large, or what was too much for the quick one ─> the long process: what is left of two seconds, or a refusal

Workers compile a grammar again, on threads that nothing can end: what has come through here in bounded time and memory
does there, too.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import msgspec

from ...common.errors import CapacityError, RequestError
from ...common.grammar import Grammar
from .helper import Helper, HelperLost
from .wire import COMPILE_GRAMMAR, REFUSAL, SET_VOCABULARY, HelperRefusal, VocabularySetup

TIME_LIMIT_S = 2.0  # of a grammar, in both processes
QUICK_BYTES = 4 * 2**10  # a schema of some dozen properties: a few milliseconds
QUICK_LIMIT_S = 0.3  # larger: one costly grammar holds up more small ones; smaller: more processes are ended
_LONG_NICENESS = 10  # larger: streams notice less of large grammars; smaller: fewer are refused on a busy machine
MAX_KNOWN = 4096  # grammars that compiled: agents ask with the same tools again and again


class GrammarChecker(Protocol):
    """Tells whether a grammar can be followed."""

    async def check(self, grammar: Grammar, param: str) -> None:
        """Raises RequestError, about the field `param` of the body, for a grammar that cannot."""
        ...

    def close(self) -> None: ...


class GrammarCompilers:
    """Implements `GrammarChecker` for one model's vocabulary. Belongs to one loop.

    The processes are started, and read the vocabulary, when the first grammar comes: many servers never see one.
    """

    def __init__(self, model_dir: Path, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        def helper(niceness: int) -> Helper:
            setup = VocabularySetup(str(model_dir), vocab_size, sorted(eos_token_ids), niceness)
            return Helper((SET_VOCABULARY, msgspec.msgpack.encode(setup)))

        self.quick, self.long = helper(0), helper(_LONG_NICENESS)
        self._known: OrderedDict[bytes, None] = OrderedDict()  # by digest, the latest used last

    async def check(self, grammar: Grammar, param: str) -> None:
        payload = msgspec.msgpack.encode(grammar)
        digest = hashlib.blake2b(payload, digest_size=16).digest()
        if digest in self._known:
            self._known.move_to_end(digest)
            return
        is_small = len(payload) <= QUICK_BYTES
        if not (is_small and await self._is_quick(payload, param)):
            try:
                await _ask(self.long, payload, param, TIME_LIMIT_S - QUICK_LIMIT_S * is_small)
            except _TooMuch as error:
                raise RequestError(f"'{param}' {error}", param=param, code="unsupported_grammar") from None
        self._known[digest] = None
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    async def _is_quick(self, payload: bytes, param: str) -> bool:
        """False: it was too much for the quick process."""
        try:
            await _ask(self.quick, payload, param, QUICK_LIMIT_S)
        except _TooMuch:
            return False
        return True

    def close(self) -> None:
        self.quick.close()
        self.long.close()


class _TooMuch(Exception):
    """The process was killed at the limit, or has ended by the grammar."""


async def _ask(helper: Helper, payload: bytes, param: str, limit_s: float) -> None:
    """Have a process compile the grammar. Raises _TooMuch where it does not."""
    try:
        kind, answer = await helper.ask(COMPILE_GRAMMAR, payload, limit_s)
    except HelperLost as error:
        if error.is_late:
            raise _TooMuch(f"takes more than {TIME_LIMIT_S:g} s to compile") from None
        if error.has_ended:
            raise _TooMuch("takes more memory, or a deeper stack, than there is to compile it") from None
        raise CapacityError(f"'{param}' could not be compiled: {error}", status=503) from None
    if kind != REFUSAL:
        return
    refusal = msgspec.msgpack.decode(answer, type=HelperRefusal)
    if refusal.kind == "model":
        raise RequestError(f"'{param}': {refusal.message}", param=param, code="unsupported_grammar")
    where = f"{param}{refusal.param or ''}"
    raise RequestError(f"'{param}' {refusal.message}", param=where[:128], code=refusal.code, status=refusal.status)
