"""Answers behind a model's thoughts: a grammar of both, and thoughts that end behind so many tokens.

The library's own bound of tokens (`max_tokens`) does not come back when tokens are taken back, as those of drafts are.
Here the state follows from how many tokens were taken, and at which of them the thoughts began and ended.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol, Self

from ..common.grammar import Matcher, Thoughts

_BEGIN_WITHIN = 2  # tokens: white space may come before the thoughts


def behind_thoughts(thoughts: Thoughts, source: str) -> str:
    """Return a grammar, as the library takes it, in which the source's answer comes behind the thoughts."""
    answers = json.loads(source)["grammars"] if source.startswith("{") else [{"lark_grammar": source}]
    before = {"name": "start", "lark_grammar": thoughts.around}
    return json.dumps({"grammars": [before, answers[0] | {"name": "answer"}, *answers[1:]]}, ensure_ascii=False)


class FirstMatcher(Matcher, Protocol):
    """A matcher at the start of an answer, of which others are made."""

    def fork(self) -> Self:
        """Make another one at the same place."""
        ...


class BudgetedThoughts:
    """Implements `FirstMatcher`: the end of the thoughts comes behind so many tokens, if not before."""

    __slots__ = ("_began", "_begin", "_budget", "_end", "_end_mask", "_ended", "_matcher", "_num_tokens")

    def __init__(self, matcher: FirstMatcher, thoughts: Thoughts, mask_bytes: int) -> None:
        """`matcher`: of all, thoughts of any length included."""
        assert thoughts.end is not None and thoughts.budget is not None
        self._matcher = matcher
        self._begin, self._end, self._budget = thoughts.begin, thoughts.end, thoughts.budget
        self._end_mask = (1 << thoughts.end).to_bytes(mask_bytes, "little")
        self._num_tokens = 0
        self._began = 0 if thoughts.begin is None else None  # tokens before the thoughts' first one
        self._ended: int | None = None  # tokens up to their end

    def fork(self) -> BudgetedThoughts:
        made = object.__new__(BudgetedThoughts)
        for name in self.__slots__:
            setattr(made, name, getattr(self, name))
        made._matcher = self._matcher.fork()
        return made

    def accept(self, token_ids: Sequence[int]) -> None:
        self._matcher.accept(token_ids)
        for token_id in token_ids:
            self._num_tokens += 1
            if self._began is None:
                if token_id == self._begin and self._num_tokens <= _BEGIN_WITHIN:
                    self._began = self._num_tokens
            elif self._ended is None and token_id == self._end:
                self._ended = self._num_tokens

    def rollback(self, num_tokens: int) -> None:
        self._matcher.rollback(num_tokens)
        self._num_tokens -= num_tokens
        if self._ended is not None and self._num_tokens < self._ended:
            self._ended = None
        if self._began is not None and self._num_tokens < self._began:
            self._began = None

    @property
    def _has_used_all(self) -> bool:
        is_inside = self._began is not None and self._ended is None
        return is_inside and self._num_tokens - (self._began or 0) >= self._budget

    def mask(self) -> bytes:
        return self._end_mask if self._has_used_all else self._matcher.mask()

    def forced(self) -> int | None:
        return self._end if self._has_used_all else self._matcher.forced()
