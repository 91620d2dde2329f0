"""Tokens from workers into the requests' streams: each index once, in order, nothing after the finish reason.

A prefill worker's first token and the decode worker's repetition of it may come in either order or one of them not at
all; the index decides. What is not accepted is counted by cause.
"""

from __future__ import annotations

import msgspec

from ..common.messages import ChoiceTokens, PromptLogprobs
from .live import Live
from .observer import Observer
from .request import Drops, is_natural

HELD_LIMIT_S = 1.0  # prompt logprobs that have not come by then do not hold back tokens any longer


class Relay:
    """Changes accepted tokens and nothing else of a request."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def accept(self, live: Live, updates: tuple[ChoiceTokens, ...], now_s: float) -> str | None:
        """Take the tokens. Returns the finish reason of a choice that a worker gave up, if there is one."""
        request = live.request
        before = request.num_output_tokens
        given_up = None
        for update in updates:
            if update.choice not in live.sent_choices:
                self._observer.on_dropped("unknown_choice")
                continue
            if update.finish is not None and not is_natural(update.finish):
                given_up = update.finish
                update = msgspec.structs.replace(update, finish=None)
            self._count(request.choices[update.choice].accept(update))
        if request.num_output_tokens > before:
            request.timestamps.setdefault("first_token", now_s)
            request.timestamps["last_token"] = now_s
            live.gap_s = None
        live.stream.wake()
        return given_up

    def _count(self, drops: Drops) -> None:
        for kind, number in (
            ("duplicate", drops.duplicate),
            ("mismatch", drops.mismatch),
            ("overflow", drops.overflow),
        ):
            for _ in range(number):
                self._observer.on_dropped(kind)

    def accept_prompt_logprobs(self, live: Live, message: PromptLogprobs) -> None:
        """Prompt token 0 has none: the list begins with token 1."""
        request = live.request
        known = request.prompt_logprobs
        skip = len(known) + 1 - message.start
        room = request.num_prompt_tokens - 1 - len(known)
        if skip < 0 or request.sampling.prompt_logprobs is None:
            self._observer.on_dropped("prompt_logprobs")
            return
        known.extend(message.tokens[skip:][: max(0, room)])
        if len(known) >= request.num_prompt_tokens - 1:
            self.release(live)

    def hold(self, live: Live) -> None:
        """Prompt logprobs were asked for: they come before the first update."""
        live.stream.is_held = live.request.sampling.prompt_logprobs is not None and live.request.num_prompt_tokens > 1

    def release(self, live: Live) -> None:
        live.stream.is_held = False
        live.stream.wake()

    def check_held(self, live: Live, now_s: float) -> None:
        """Called at each tick."""
        first_token_s = live.request.timestamps.get("first_token")
        if live.stream.is_held and first_token_s is not None and now_s - first_token_s > HELD_LIMIT_S:
            self.release(live)
