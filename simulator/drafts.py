"""Drafts of a simulated fleet: how often a drafted token is the one that comes.

Which tokens of an answer a draft gets right is drawn once for each request, so that it depends on neither the worker
nor the steps in which they are drafted.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from random import Random
from typing import TYPE_CHECKING

from ..common.request import Sequence
from .jobs import END, TOKEN, Job

if TYPE_CHECKING:
    from .scenario import Drafts

_WRONG = 2  # a token that no answer has


class SimDrafts:
    """One sequence's drafts, as long as may be. Implements `decode.ngrams.Proposer`."""

    def __init__(self, drafts: Drafts, job: Job, seq: Sequence, seed: int) -> None:
        self._acceptance = drafts.acceptance
        self._job = job
        self._random = Random(f"drafts {seed} {job.number} {seq.choice}")
        self._answer: list[int] = []  # what a draft says of each token so far, were it asked

    def propose(self, tokens: Tokens[int], num_tokens: int) -> tuple[int, ...]:
        first = len(tokens) - self._job.num_prompt_tokens
        last = min(first + num_tokens, self._job.num_output_tokens)
        while len(self._answer) < last:
            token = END if len(self._answer) == self._job.num_output_tokens - 1 else TOKEN
            self._answer.append(token.token_id if self._random.random() < self._acceptance else _WRONG)
        return tuple(self._answer[first:last])
