"""Tokens from workers into the requests' streams: each index once, in order, nothing after the finish reason.

A prefill worker's first token and the decode worker's repetition of it may come in either order or one of them not at
all; the index decides. What is not accepted is counted by cause.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ...wire.results import ChoiceTokens, PromptLogprobs
from ..state.attempt import Attempt
from ..state.choice_state import NO_DROPS, Drops, is_natural
from ..state.observer import Observer
from ..state.tracked_request import TrackedRequest
from .deadlines import GAP_LIMIT_S, HELD_LIMIT_S
from .due_times import DueTimes


@dataclass(slots=True)
class Accepted:
    """The news of one message."""

    num_new: int = 0  # tokens
    is_first: bool = False  # the request's first ones
    has_end: bool = False  # a choice that it was about has ended
    is_odd: bool = False  # something did not follow what was there
    given_up: str | None = None  # the finish reason of a choice that the worker gave up


class Relay:
    """Changes accepted tokens and nothing else of a request."""

    def __init__(self, observer: Observer, due_times: DueTimes) -> None:
        self._observer = observer
        self._due_times = due_times

    def accept(
        self, tracked: TrackedRequest, attempt: Attempt, updates: tuple[ChoiceTokens, ...], now_s: float
    ) -> Accepted:
        """Take what is new of the current attempt's tokens."""
        request = tracked.request
        accepted = Accepted()
        for update in updates:
            if update.choice not in attempt.choices:
                self._observer.on_dropped("unknown_choice")
                continue
            if update.finish is not None and not is_natural(update.finish):
                accepted.given_up = update.finish
                update = msgspec.structs.replace(update, finish=None)
            choice = request.choices[update.choice]
            accepted.num_new -= len(choice.tokens)
            drops = choice.accept(update)
            accepted.num_new += len(choice.tokens)
            accepted.has_end = accepted.has_end or choice.finish is not None
            if drops is not NO_DROPS:
                accepted.is_odd = True
                self._count(drops)
        if accepted.num_new:
            stamps = request.timestamps
            if "first_token" not in stamps:
                stamps["first_token"] = now_s
                accepted.is_first = True
            stamps["last_token"] = now_s
        if accepted.is_odd or attempt.gap_s is not None:
            self._note_gap(tracked, attempt, accepted, now_s)
        tracked.stream.wake()
        return accepted

    def _note_gap(self, tracked: TrackedRequest, attempt: Attempt, accepted: Accepted, now_s: float) -> None:
        """Note since when a token is missing before others that have come: since the last progress."""
        if accepted.num_new:
            attempt.gap_s = None
        if any(choice.has_gap for choice in tracked.request.choices):
            if attempt.gap_s is None:
                attempt.gap_s = now_s
            self._due_times.schedule(tracked, attempt.gap_s + GAP_LIMIT_S)

    def _count(self, drops: Drops) -> None:
        for kind, number in (
            ("duplicate", drops.duplicate),
            ("mismatch", drops.mismatch),
            ("overflow", drops.overflow),
        ):
            for _ in range(number):
                self._observer.on_dropped(kind)

    def accept_prompt_logprobs(self, tracked: TrackedRequest, message: PromptLogprobs) -> None:
        """Prompt token 0 has none: the list begins with token 1."""
        request = tracked.request
        known = request.prompt_logprobs
        skip = len(known) + 1 - message.start
        room = request.num_prompt_tokens - 1 - len(known)
        if skip < 0 or request.sampling.prompt_logprobs is None:
            self._observer.on_dropped("prompt_logprobs")
            return
        known.extend(message.tokens[skip:][:room])
        if len(known) >= request.num_prompt_tokens - 1:
            self.release(tracked)

    def hold(self, tracked: TrackedRequest) -> None:
        """Prompt logprobs were asked for: they come before the first update."""
        tracked.stream.is_held = (
            tracked.request.sampling.prompt_logprobs is not None and tracked.request.num_prompt_tokens > 1
        )

    def release(self, tracked: TrackedRequest) -> None:
        tracked.stream.is_held = False
        tracked.stream.wake()

    def check_held(self, tracked: TrackedRequest, now_s: float) -> None:
        first_token_s = tracked.request.timestamps.get("first_token")
        if tracked.stream.is_held and first_token_s is not None and now_s - first_token_s > HELD_LIMIT_S:
            self.release(tracked)
