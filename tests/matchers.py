"""What a matcher lets come, for tests."""

from __future__ import annotations

from kvferry.common.grammar import Matcher

END = 1  # among the end tokens of `checkpoints.write_tokenizer`


def may_come(matcher: Matcher) -> set[int]:
    """Return the tokens that may come next."""
    mask = int.from_bytes(matcher.mask(), "little")
    return {token_id for token_id in range(mask.bit_length()) if mask >> token_id & 1}


def may_end(matcher: Matcher) -> bool:
    """Tell whether the answer may end here."""
    return bool(matcher.mask()[END >> 3] >> (END & 7) & 1)
