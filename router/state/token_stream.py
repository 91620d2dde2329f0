"""The stream of a request's accepted tokens, which the API reads while the dispatcher appends to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ...common.request import SampledToken
from .errors import StreamError
from .request import RouterRequest

MAX_TOKENS_AT_ONCE = 2**20  # in one update: more than an answer has


class ChoiceUpdate(NamedTuple):
    """New tokens of one choice, in order. With `finish` they are its last."""

    choice: int
    tokens: tuple[SampledToken, ...]
    finish: str | None


class TokenStream:
    """A stream yields what one request gets, to one reader. Belongs to the dispatcher's loop.

    Nothing is stored twice: the stream reads the request's accepted tokens, so a slow reader costs at most
    `n * max_tokens` tokens, which the request holds anyway.
    """

    def __init__(
        self, request: RouterRequest, on_abort: Callable[[], None], on_finish_choice: Callable[[int], None]
    ) -> None:
        self.request = request
        self.is_held = False  # by the dispatcher: something must come before the first update
        self._on_abort = on_abort
        self._on_finish_choice = on_finish_choice
        # What a request has from the start (`ChoiceState.restore`) its reader has from elsewhere.
        self._sent = [len(choice.tokens) for choice in request.choices]  # tokens yielded of each choice
        # The finish reason was yielded, or the reader set it.
        self._closed = [choice.finish is not None for choice in request.choices]
        self._next_choice = 0
        self._error: StreamError | None = None
        self._wake = asyncio.Event()
        self.wake: Callable[[], object] = self._wake.set  # for the dispatcher: there is something new

    @classmethod
    def ended(cls, request: RouterRequest) -> TokenStream:
        """Make the stream of a request of which nothing is to come."""
        return cls(request, _ignore, _ignore_choice)

    @property
    def prompt_logprobs(self) -> list[SampledToken]:
        """Complete when the first update is yielded, if they were asked for."""
        return self.request.prompt_logprobs

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> ChoiceUpdate:
        """The next update; ends after every choice has ended, raises StreamError after the last accepted token."""
        while True:
            self._wake.clear()
            update = self.next_nowait()
            if update is not None:
                return update
            if self.is_exhausted():
                raise StopAsyncIteration
            await self._wake.wait()

    def next_nowait(self) -> ChoiceUpdate | None:
        """An update that is there already, or None. Choices take turns."""
        for choice in self._in_turn():
            update = self._take(choice)
            if update is not None:
                return update
        return None

    def listen(self, on_change: Callable[[], object]) -> None:
        """Call this at every change from now on, instead of waking who iterates; `take` tells what there is."""
        self.wake = on_change

    def take(self, most: int) -> list[ChoiceUpdate]:
        """Take what is there already: an update of each choice at most, of so many tokens in all."""
        updates = []
        for choice in self._in_turn():
            update = self._take(choice, most)
            if update is not None:
                updates.append(update)
                most -= len(update.tokens)
                if most <= 0:
                    break
        return updates

    def middle(self, most: int) -> Sequence[SampledToken]:
        """New tokens of the one choice that neither begin nor end it, unread. None where there is anything else."""
        state, start = self.request.choices[0], self._sent[0]
        if state.finish is not None or self._error is not None or self.is_held or self.request.is_finished:
            return ()
        tokens = state.tokens[start:]
        return tokens if len(tokens) <= most else ()

    def skip(self, num_tokens: int) -> None:
        """So many tokens of the one choice, as `middle` gave them, have been read."""
        self._sent[0] += num_tokens

    def is_exhausted(self) -> bool:
        """Return whether no update comes any more, where none is there now. Raises StreamError after a failure."""
        if self._error is not None:
            raise self._error
        return all(self._closed) or self.request.is_finished

    def _in_turn(self) -> Sequence[int]:
        num_choices, first = self.request.n, self._next_choice
        if self.is_held and not self.request.is_finished:
            return ()
        if num_choices == 1:
            return (0,)
        return [(first + offset) % num_choices for offset in range(num_choices)]

    def _take(self, choice: int, most: int = MAX_TOKENS_AT_ONCE) -> ChoiceUpdate | None:
        state, start = self.request.choices[choice], self._sent[choice]
        end = len(state.tokens)
        finish = state.finish
        if self._closed[choice] or (start == end and finish is None):
            return None
        if end - start > most:
            end, finish = start + most, None
        elif finish is not None:
            self._closed[choice] = True
        self._sent[choice] = end
        self._next_choice = choice + 1
        return ChoiceUpdate(choice, tuple(state.tokens[start:end]), finish)

    def finish_choice(self, choice: int) -> None:
        """The reader found a stop string: the choice has ended and nothing more of it is yielded. Idempotent."""
        if not self._closed[choice]:
            self._closed[choice] = True
            self._on_finish_choice(choice)

    def abort(self) -> None:
        """The client left: everything that the request holds is given back. Idempotent."""
        self._on_abort()

    def fail(self, error: StreamError) -> None:
        """Dispatcher: the request failed; accepted tokens are yielded before the error."""
        self._error = error
        self.wake()


def _ignore() -> None:
    """Nobody works on the request."""


def _ignore_choice(choice: int) -> None:
    """Nobody works on the choice."""
