"""Grammars of tokens instead of texts: the same ones may come at every place of an answer."""

from __future__ import annotations

from collections.abc import Sequence

from ..common.errors import RequestError
from ..common.grammar import TOKEN_KINDS, Grammar, unpack_mask

# Every token, which is asked for where thoughts have a budget; and those that a client names.
ANY, TOKENS = TOKEN_KINDS


class SameTokens:
    """Implements `thinking.FirstMatcher`. It has no state: the tokens that an answer has change nothing."""

    def __init__(self, mask: bytes) -> None:
        self._mask = mask
        self._only = only_token(mask)

    def fork(self) -> SameTokens:
        return self

    def accept(self, token_ids: Sequence[int]) -> None: ...

    def rollback(self, num_tokens: int) -> None: ...

    def mask(self) -> bytes:
        return self._mask

    def forced(self) -> int | None:
        return self._only


def tokens_mask(grammar: Grammar, vocab_size: int, mask_bytes: int) -> bytes:
    """Return which tokens may come, of a vocabulary; none: the grammar's text is no mask.

    Raises RequestError for one that is not the vocabulary's.
    """
    all_tokens = (1 << vocab_size) - 1
    if grammar.kind == ANY:
        return all_tokens.to_bytes(mask_bytes, "little")
    try:
        named = int.from_bytes(unpack_mask(grammar.text), "little")
    except ValueError:
        named = 0
    if named > all_tokens:
        text = f"has id {named.bit_length() - 1}, which is not below the vocabulary's {vocab_size}"
        raise RequestError(text, param="", code="invalid_value")
    return named.to_bytes(mask_bytes, "little")


def only_token(mask: bytes) -> int | None:
    """Return the one token that a mask has; None: it has none, or several."""
    bits = int.from_bytes(mask, "little")
    return bits.bit_length() - 1 if bits.bit_count() == 1 else None
