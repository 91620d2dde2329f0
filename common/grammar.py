"""The grammar that the answers of a request follow, as its tokens derive where each of them stands in it.

    Grammar ─> Grammars.get ─> CompiledGrammar ─(ready)─> a Matcher for each answer ─> the mask of its next token

A matcher is the state of one answer, and no state of the system: one that has not taken all tokens of its sequence is
brought up to them, and one of another attempt or worker is made anew from them. So a preemption, several choices, a
handoff after the first token and a resume after a worker's death need no message about grammars. What compiles them is
in `grammar/`; this module knows no library and no tokenizer.

The mask of first tokens was found where the grammar was checked, and comes with the task. So a prefill worker, which
chooses first tokens and no others, compiles nothing, and on a decode worker no new prompt waits for its grammar.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence as TokenIds
from typing import Annotated, NamedTuple, Protocol

import msgspec

from .errors import KVFerryError

# Between the parts of a JSON text: one space, or a line's end with at most 32 spaces behind it.
WHITE_SPACE = r"\x20|\n\x20{0,32}"
COMPACT = "compact_"  # begins the name of a kind of JSON in which there is none
TOKEN_KINDS = ("any", "tokens")  # whose answers are tokens in any order, an end like others: no grammar ends them
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
MAX_MASK_BYTES = 1 << 17  # of a vocabulary of a million tokens
MAX_GRAMMAR_BYTES = 1 << 16  # JSON schemas of tools are some kilobytes; a frame has room for more (wire/frames.py)


class Thoughts(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A model's thoughts before what follows a grammar."""

    around: Annotated[str, msgspec.Meta(max_length=1024)]  # a grammar of all in Lark, where that one is `@answer`
    begin: TokenId | None = None  # None: they have begun in the prompt
    end: TokenId | None = None  # None: it is several tokens, and there is no budget
    budget: Annotated[int, msgspec.Meta(ge=0)] | None = None  # tokens, behind which the end comes; None: any number


class Grammar(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A grammar that every answer of a request follows."""

    kind: Annotated[str, msgspec.Meta(max_length=64)]  # one of `grammar.source.KINDS`
    text: Annotated[bytes, msgspec.Meta(max_length=MAX_GRAMMAR_BYTES)]  # UTF-8, or tokens (`pack_mask`)
    thoughts: Thoughts | None = None  # None: it begins with the first token


class CheckedGrammar(NamedTuple):
    """A grammar that can be followed."""

    grammar: Grammar
    first_mask: bytes  # which tokens an answer may begin with (`pack_mask`)


class GrammarBroken(KVFerryError):
    """A matcher cannot go on: a token does not fit, none can follow, or the grammar is too much to match."""


class Matcher(Protocol):
    """One answer's place in a grammar. Used by one thread at a time."""

    def accept(self, token_ids: TokenIds[int]) -> None:
        """Take the next tokens of the answer. Raises GrammarBroken where they do not fit."""
        ...

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens. Raises GrammarBroken."""
        ...

    def mask(self) -> bytes:
        """Return which tokens may come next: bit i of the little-endian 32-bit words is token i's.

        End tokens may where the answer may end, and alone where nothing else can follow. Raises GrammarBroken.
        """
        ...

    def forced(self) -> int | None:
        """Return the one token that the mask has, as far as that is known without finding it. Raises GrammarBroken."""
        ...


class CompiledGrammar(Protocol):
    """A grammar on one worker. Its properties may be read from any thread."""

    @property
    def is_ready(self) -> bool:
        """Tell whether answers may be matched. Never again false."""
        ...

    @property
    def is_late(self) -> bool:
        """Tell whether it takes so long that prompts are computed meanwhile, at the price of one step more."""
        ...

    @property
    def is_costly(self) -> bool:
        """Tell whether it takes milliseconds to match a token, during which no other thread runs Python."""
        ...

    @property
    def failure(self) -> str:
        """Say why it never will be ready; empty: it is, or will be."""
        ...

    def matcher(self) -> Matcher:
        """Make a matcher for an answer without a token. Only of a grammar that is ready."""
        ...


class Grammars(Protocol):
    """The grammars of a worker."""

    def get(self, grammar: Grammar, *, is_awaited: bool) -> CompiledGrammar:
        """Return the grammar at once, and begin to compile it if nobody has. Who waits for it is woken.

        `is_awaited`: an answer cannot go on without it. Until then it is compiled where a core is idle.
        """
        ...


def white_space(kind: str) -> dict[str, object]:
    """Return the options of a kind of JSON about white space between its parts, in the words of what compiles it."""
    return {"whitespace_flexible": False} if kind.startswith(COMPACT) else {"whitespace_pattern": WHITE_SPACE}


def pack_mask(mask: bytes) -> bytes:
    """Compress a mask (`Matcher.mask`): most of them let a few tokens through, or all but a few."""
    return zlib.compress(mask, 1)


def unpack_mask(packed: bytes) -> bytes:
    """Return the mask. Raises ValueError for bytes that are none, or for one of more than MAX_MASK_BYTES."""
    inflater = zlib.decompressobj()
    try:
        mask = inflater.decompress(packed, MAX_MASK_BYTES)
    except zlib.error as error:
        raise ValueError(f"no mask: {error}") from None
    if not inflater.eof or len(mask) % 4:
        raise ValueError("no mask: it is cut short, too long, or no words of 32 bits")
    return mask
