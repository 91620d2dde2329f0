"""Tokens that a worker has yielded and that its router need not hear of yet.

They leave when somebody can tell the difference: the first one, the first decoded one, and all others with the last.
A worker that dies says before what it would have streamed by then.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

import msgspec

from ..common.request import Sequence
from ..wire.results import ChoiceTokens, RequestTokens, StepTokens
from .jobs import TOKEN

_TOLD_AT_ONCE = 2  # tokens of an answer


@dataclass(slots=True)
class _Answer:
    """An attempt's tokens. Requests have one choice here."""

    attempt: int
    num_told: int
    held: list[RequestTokens] = field(default_factory=list)


class HeldTokens:
    """`HeldTokens` stands between a core and its router."""

    def __init__(self) -> None:
        self._answers: dict[str, _Answer] = {}  # by request id

    def pass_on(self, message: StepTokens, *, is_adoption: bool) -> StepTokens | None:
        """Return what of the message, and of those before it, is to be said now; None: nothing.

        `is_adoption`: it repeats the first tokens of the prefill workers, which the first decoded ones follow.
        """
        due = [whole for update in message.updates if (whole := self._take(update, is_adoption)) is not None]
        return StepTokens(updates=tuple(due)) if due else None

    def _take(self, update: RequestTokens, is_adoption: bool) -> RequestTokens | None:
        if not update.choices:
            return update
        first_index, finish = update.choices[0].first_index, update.choices[-1].finish
        answer = self._answers.get(update.request_id)
        if answer is None or answer.attempt != update.attempt:
            answer = self._answers[update.request_id] = _Answer(update.attempt, first_index)
        answer.held.append(update)
        if finish is not None:
            del self._answers[update.request_id]
        elif answer.num_told >= _TOLD_AT_ONCE or is_adoption:
            return None
        return _joined(answer)

    def tell_early(self, seq: Sequence) -> RequestTokens | None:
        """Return the first token that a step has decoded, where the core hears of it later; None: it is told."""
        answer = self._answers.get(seq.request_id)
        if answer is None or answer.attempt != seq.attempt or answer.num_told >= _TOLD_AT_ONCE:
            return None
        token = ChoiceTokens(seq.choice, 1, (TOKEN,), None)
        answer.held.append(RequestTokens(seq.request_id, seq.attempt, (token,), seq.num_cached_tokens))
        return _joined(answer)

    def flush(self) -> StepTokens | None:
        """Return all that is held; None: nothing is."""
        held = tuple(_joined(answer) for answer in self._answers.values() if answer.held)
        self._answers.clear()
        return StepTokens(updates=held) if held else None

    def forget(self, request_id: str) -> None:
        """Drop what is held of a request that nobody waits for."""
        self._answers.pop(request_id, None)


def _joined(answer: _Answer) -> RequestTokens:
    """Make one update of what is held, without the tokens that are told already."""
    updates, answer.held = answer.held, []
    last = updates[-1]
    if len(updates) == 1 and last.choices[0].first_index == answer.num_told:
        answer.num_told += len(last.choices[0].tokens)
        return last
    parts = [choice for update in updates for choice in update.choices]
    num_old = answer.num_told - parts[0].first_index
    tokens = tuple(chain.from_iterable(part.tokens for part in parts))[num_old:]
    joined = ChoiceTokens(parts[0].choice, answer.num_told, tokens, parts[-1].finish)
    answer.num_told += len(tokens)
    return msgspec.structs.replace(last, choices=(joined,))
