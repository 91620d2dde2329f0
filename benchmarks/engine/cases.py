"""Which cases the engine is measured in, and how often. Pure."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvferry.common.errors import ConfigError

WARM_UP_TOKENS = 64  # of a first prompt that does not count
_GROWTH_TOKENS = 64  # what warm-up and profiled steps add to a context, rounded up


class DecodeCase(NamedTuple):
    """Steps of so many rows."""

    num_rows: int
    context: int  # tokens
    num_drafts: int = 0  # wrong tokens that each row checks beside its next one


@dataclass(slots=True, frozen=True)
class Cases:
    """What is measured, and how often."""

    decode: tuple[DecodeCase, ...]
    prefill: tuple[int, ...]  # tokens
    num_steps: int = 64  # of a decode case, in each round
    num_rounds: int = 3
    max_case_s: float = 60.0  # no new round of a case after so long

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self._num_tokens(), default=WARM_UP_TOKENS)

    def num_blocks(self, block_size: int) -> int:
        """Blocks that hold any one case; cached prompts of others are evicted for it."""
        rows = [*(case.num_rows for case in self.decode), *(1 for _ in self.prefill)]
        sizes = [num_rows * -(-tokens // block_size) for num_rows, tokens in zip(rows, self._num_tokens(), strict=True)]
        return max(sizes, default=0) + -(-WARM_UP_TOKENS // block_size)

    def _num_tokens(self) -> list[int]:
        grown = self.num_steps + _GROWTH_TOKENS
        drafted = [case.context + grown + case.num_drafts for case in self.decode]
        return [*drafted, *(tokens + 1 for tokens in self.prefill)]


def decode_cases(text: str) -> tuple[tuple[int, int], ...]:
    """`1@128,8@512`: rows @ tokens of context."""
    try:
        cases = [_decode_case(part) for part in text.split(",") if part]
        return tuple((case.num_rows, case.context) for case in cases if _is_positive(not case.num_drafts))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: rows@tokens, as in 1@128,8@512") from None


def drafting_cases(text: str) -> tuple[DecodeCase, ...]:
    """`1@128,8@512+4`: rows @ tokens of context + drafted tokens that each row checks."""
    try:
        return tuple(_decode_case(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: rows@tokens+drafts, as in 1@128,8@512+4") from None


def _decode_case(text: str) -> DecodeCase:
    pair, plus, drafts = text.partition("+")
    rows, context = map(int, pair.split("@"))
    case = DecodeCase(rows, context, int(drafts) if plus else 0)
    _is_positive(*(case if plus else (rows, context)))
    return case


def prefill_cases(text: str) -> tuple[int, ...]:
    """`128,8192`: tokens."""
    try:
        return tuple(tokens for part in text.split(",") if part and _is_positive(tokens := int(part)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers from 1 on, as in 128,8192") from None


def check_cases(*given: Sequence[object]) -> None:
    """Raises ConfigError where nothing is to be measured."""
    if not any(given):
        raise ConfigError("no case is left to be measured: name a decode step or a prompt")


def _is_positive(*values: int) -> bool:
    if any(value < 1 for value in values):
        raise ValueError(values)
    return True
