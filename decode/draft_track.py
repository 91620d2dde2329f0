"""A `Track` knows what was drafted last for one sequence, and how often drafts for it were right.

A proposal is judged by the tokens that come, whether it was verified or not. A draft model's is not known before the
step in which it is verified, so that alone judges it; while it is not asked, past failures are forgiven slowly.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from ..common.batch import BatchRow, RowOutput
from .ngrams import MAX_INDEXED, Proposer

_FIRST_RATE = 0.6  # of a sequence whose drafts were not judged yet: high enough to try one
_RATE_SMOOTHING = 0.15  # weight of one judged token: some seven tokens back
# Of the distance from _FIRST_RATE, with each step in which a draft model is not asked. Where it fails, its trials take
# half a percent of the time. Closer to 1: less, and a text that became easier is noticed later.
FORGIVING = 0.998


@dataclass(slots=True, eq=False)
class Track:
    """`Track` follows one sequence's drafts."""

    proposer: Proposer
    number: int  # of those that came: trials are spread over steps by it
    rate: float = _FIRST_RATE  # of drafted tokens that were right, all before them being right
    proposed: tuple[int, ...] = ()  # and not judged yet
    proposed_at: int = 0  # the position of the first of them
    num_read: int = 0  # tokens that the proposer has taken in
    is_reading: bool = True  # it had not taken in all of them when it was asked last: a long prompt takes several times

    def propose(self, token_ids: Tokens[int], num_tokens: int) -> tuple[int, ...]:
        """Return a draft of up to so many tokens, in place of what was proposed before."""
        self.proposed, self.proposed_at = self.proposer.propose(token_ids, num_tokens), len(token_ids)
        self.num_read = min(len(token_ids), self.num_read + MAX_INDEXED)
        self.is_reading = self.num_read < len(token_ids)
        return self.proposed

    def judge(self, token_ids: Tokens[int]) -> None:
        """Compare what was proposed with what has come of it by now."""
        came = token_ids[self.proposed_at : self.proposed_at + len(self.proposed)]
        for drafted, token in zip(self.proposed, came, strict=False):
            self._weigh(is_right=drafted == token)
            if drafted != token:
                self.proposed = ()
                return
        self.proposed, self.proposed_at = self.proposed[len(came) :], self.proposed_at + len(came)

    def judge_verified(self, row: BatchRow, result: RowOutput) -> None:
        """Judge what a draft model said by what came of it, where it said something."""
        if not row.draft:
            self.rate += (1 - FORGIVING) * (_FIRST_RATE - self.rate)
            return
        for drafted, token in zip(row.draft, result.runs[0] if result.runs else (), strict=False):
            self._weigh(is_right=drafted == token.token_id)

    def _weigh(self, *, is_right: bool) -> None:
        self.rate += _RATE_SMOOTHING * (is_right - self.rate)
