"""One client call in the router: its state, its accepted tokens, and the stream that the API reads.

    QUEUED ──> RESERVED ──> PREFILLING ──> DECODING ──> FINISHED
       │ ^         │            │  ^           │           ^
       │ └─────────┴────────────┼──┼───────────┘           │ from every live state: the choices have ended
       └────────────────────────┼──┘ (local prefill)       │
                                └──────────────────────────┘     ABORTED, FAILED: from every live state

Tokens have an index in their choice. Index n is accepted after n-1 and once; what comes early is kept (bounded),
what comes again is dropped. The accepted tokens are what a resumed attempt starts from, and the only ones that
`TokenStream` yields. This module knows no worker, no socket and no placement.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from ...common.errors import InvalidTransition
from ...common.messages import ChoiceTokens
from ...common.request import FinishReason, RequestSpec, SampledToken, SamplingParams, pack_ids
from .decisions import Decision
from .errors import StreamError
from .objectives import DEFAULT_CLASS, NO_OBJECTIVES, Objectives

MAX_TOKENS_AT_ONCE = 2**20  # in one update: more than an answer has
MAX_EARLY_TOKENS = 64  # kept for each choice while an earlier one is missing


class RequestStatus(Enum):
    QUEUED = "queued"  # waits in the router for a placement
    RESERVED = "reserved"  # a decode worker was asked for blocks
    PREFILLING = "prefilling"  # the prompt is being computed, or its KV is on the way
    DECODING = "decoding"  # the decode worker has all of the KV
    FINISHED = "finished"  # every choice has a finish reason
    ABORTED = "aborted"  # the client left
    FAILED = "failed"  # the client was told an error


_TERMINAL = frozenset({RequestStatus.FINISHED, RequestStatus.ABORTED, RequestStatus.FAILED})

_NEXT: dict[RequestStatus, frozenset[RequestStatus]] = {
    RequestStatus.QUEUED: frozenset({RequestStatus.RESERVED, RequestStatus.PREFILLING}) | _TERMINAL,
    RequestStatus.RESERVED: frozenset({RequestStatus.QUEUED, RequestStatus.PREFILLING}) | _TERMINAL,
    RequestStatus.PREFILLING: frozenset({RequestStatus.QUEUED, RequestStatus.DECODING}) | _TERMINAL,
    RequestStatus.DECODING: frozenset({RequestStatus.QUEUED}) | _TERMINAL,
    RequestStatus.FINISHED: frozenset(),
    RequestStatus.ABORTED: frozenset(),
    RequestStatus.FAILED: frozenset(),
}

_STAMP = {
    RequestStatus.QUEUED: "queued",
    RequestStatus.RESERVED: "reserved",
    RequestStatus.PREFILLING: "prefill_start",
    RequestStatus.DECODING: "arrived",
}


@dataclass(slots=True)
class Drops:
    """Tokens of one message that were not accepted, by cause."""

    duplicate: int = 0  # had it already
    mismatch: int = 0  # had another token at that index
    overflow: int = 0  # too far ahead, or past the end


NO_DROPS = Drops()  # of nearly every message; not to be changed


@dataclass(slots=True)
class ChoiceState:
    """The answer of one choice so far. `tokens` only grows, and not after `finish` is set."""

    max_tokens: int
    tokens: list[SampledToken] = field(default_factory=list)
    finish: str | None = None
    early: dict[int, SampledToken] = field(default_factory=dict)
    end: tuple[int, str] | None = None  # (count, reason): finish once so many are accepted

    def accept(self, update: ChoiceTokens) -> Drops:
        """Take what continues `tokens`, keep what comes early, drop the rest."""
        if self._is_next(update):
            self.tokens.extend(update.tokens)
            self.finish = update.finish
            return NO_DROPS
        drops = Drops()
        for index, token in enumerate(update.tokens, update.first_index):
            self._accept_one(index, token, drops)
        if update.finish is not None and self.finish is None:
            self.end = (update.first_index + len(update.tokens), update.finish)
        self._close_gap()
        return drops

    def _is_next(self, update: ChoiceTokens) -> bool:
        """Nothing is missing before it, nothing waits for it, and there is room for all of it."""
        start = len(self.tokens)
        is_in_turn = update.first_index == start and start + len(update.tokens) <= self.max_tokens
        return is_in_turn and self.finish is None and self.end is None and not self.early

    def _accept_one(self, index: int, token: SampledToken, drops: Drops) -> None:
        known = self.tokens[index] if index < len(self.tokens) else self.early.get(index)
        if known is not None:
            drops.duplicate += known.token_id == token.token_id
            drops.mismatch += known.token_id != token.token_id
        elif self.finish is not None or index >= self.max_tokens:
            drops.overflow += 1
        elif index == len(self.tokens):
            self.tokens.append(token)
            self._close_gap()
        elif len(self.early) < MAX_EARLY_TOKENS:
            self.early[index] = token
        else:
            drops.overflow += 1

    def _close_gap(self) -> None:
        while self.finish is None:
            if self.end is not None and len(self.tokens) >= self.end[0]:
                self.finish = self.end[1]
                self.early.clear()
            elif (token := self.early.pop(len(self.tokens), None)) is not None:
                self.tokens.append(token)
            else:
                return

    @property
    def has_gap(self) -> bool:
        """Something came that cannot be accepted yet."""
        return self.finish is None and (bool(self.early) or self.end is not None)

    def end_now(self, reason: str) -> None:
        """The router itself ends the choice."""
        self.finish = reason
        self.forget_early()

    def forget_early(self) -> None:
        """A new attempt begins: only accepted tokens carry over."""
        self.early.clear()
        self.end = None


@dataclass(slots=True, eq=False)
class RouterRequest:
    """One prompt with its `n` choices. The fields up to `tenant` are the caller's, the rest the dispatcher's.

    `timestamps` (seconds of the dispatcher's clock): queued, reserved (a decode worker was asked), prefill_start (the
    task was sent), first_token, arrived (the KV is on the decode worker), first_decode, last_token, finished. The
    ones before first_token are those of the attempt that yielded it; later ones of the first attempt that got so far.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    n: int = 1
    priority: int = 0  # lower runs first
    cache_salt: bytes = b""
    timeout_s: float | None = None
    request_class: str = DEFAULT_CLASS
    objectives: Objectives = NO_OBJECTIVES  # of its class
    tenant: str = ""  # who it is from, as far as fairness goes
    status: RequestStatus = RequestStatus.QUEUED
    timestamps: dict[str, float] = field(default_factory=dict)
    arrival: int = 0  # the router's counter
    attempt_number: int = 0  # placements of this request, in every message
    num_failures: int = 0  # attempts that failed: bounded
    num_cached_tokens: int = 0  # prompt tokens that came from a prefix cache
    prefill_worker: str | None = None  # of the latest attempt; None: the decode worker computes the prompt
    decode_worker: str | None = None
    prefill_s: float = 0.0  # the prefill worker's own measure: first chunk to first token
    prefill_wait_s: float = 0.0  # the prefill worker's measure: receipt of the task to first chunk
    unloaded_s: float = 0.0  # predicted time to its first token on empty workers
    block_hashes: list[bytes] = field(default_factory=list)  # of the prompt's full blocks, as workers know them
    decisions: list[Decision] = field(default_factory=list)  # where its attempts were placed, and why
    waiting_for: str = ""  # what it lacked when it was looked at last
    error_code: str = ""  # why it failed
    prompt_logprobs: list[SampledToken] = field(default_factory=list)  # entry i is about prompt token i + 1
    is_finished: bool = field(init=False, default=False)  # `status` is a terminal one
    choices: list[ChoiceState] = field(init=False)
    _prompt: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.choices = [ChoiceState(self.sampling.max_tokens) for _ in range(self.n)]
        self._prompt = pack_ids(self.prompt_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices)

    @property
    def is_resume(self) -> bool:
        """The next attempt goes on from accepted tokens."""
        return self.num_output_tokens > 0

    @property
    def unfinished(self) -> tuple[int, ...]:
        return tuple(index for index, choice in enumerate(self.choices) if choice.finish is None)

    def advance(self, to: RequestStatus, now_s: float) -> None:
        """The one way to change `status`."""
        if to not in _NEXT[self.status]:
            raise InvalidTransition(f"request {self.request_id}: {self.status.name} -> {to.name}")
        self.status = to
        if to in _TERMINAL:
            self.is_finished = True
            self.timestamps["finished"] = now_s
        elif to is RequestStatus.QUEUED:
            return  # again: it has been in the queue's time since it came
        elif to is RequestStatus.DECODING or "first_token" in self.timestamps:
            self.timestamps.setdefault(_STAMP[to], now_s)
        else:
            self.timestamps[_STAMP[to]] = now_s

    def spec(self, remaining_s: float | None) -> RequestSpec:
        """Return this attempt as workers get it: the unfinished choices with their accepted tokens."""
        choices = self.unfinished
        outputs: tuple[bytes, ...] = ()
        if self.is_resume:
            outputs = tuple(pack_ids([token.token_id for token in self.choices[c].tokens]) for c in choices)
        return RequestSpec(
            request_id=self.request_id,
            attempt=self.attempt_number,
            prompt=self._prompt,
            sampling=self.sampling,
            choices=choices,
            outputs=outputs,
            cache_salt=self.cache_salt,
            priority=self.priority,
            arrival=self.arrival,
            remaining_s=remaining_s,
        )


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
        self._sent = [0] * request.n  # tokens yielded of each choice
        self._closed = [False] * request.n  # the finish reason was yielded, or the reader set it
        self._next_choice = 0
        self._error: StreamError | None = None
        self._wake = asyncio.Event()
        self.wake: Callable[[], object] = self._wake.set  # for the dispatcher: there is something new

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


def is_natural(finish: str | None) -> bool:
    """An end that the client asked for, not one that a worker was forced to."""
    return finish in (FinishReason.STOP, FinishReason.LENGTH)
