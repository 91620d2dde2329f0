"""One client call in the router: its state and its accepted tokens.

    QUEUED ──> RESERVED ──> PREFILLING ──> DECODING ──> FINISHED
       │ ^         │            │  ^           │           ^
       │ └─────────┴────────────┼──┼───────────┘           │ from every live state: the choices have ended
       └────────────────────────┼──┘ (local prefill)       │
                                └──────────────────────────┘     ABORTED, FAILED: from every live state

An embedding goes from PREFILLING to FINISHED.

The accepted tokens of its choices (`choice_state.py`) are what a resumed attempt starts from, and the only ones that
`TokenStream` yields. This module knows no worker, no socket and no placement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from ...common.errors import InvalidTransition
from ...common.grammar import CheckedGrammar
from ...common.request import FinishReason, Pooling, RequestSpec, SampledToken, SamplingParams, pack_ids, reuses_prefix
from .adapter_use import AdapterUse
from .choice_state import ChoiceState
from .decisions import Decision
from .objectives import DEFAULT_CLASS, NO_OBJECTIVES, Objectives, Pace


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
RUN_MARK = "+"  # in a request's name, before what tells runs of one answer by several routers apart


@dataclass(slots=True, eq=False)
class RouterRequest:
    """One prompt with its `n` choices. The fields up to `takes_less` are the caller's, the rest the dispatcher's.

    `timestamps` (seconds of the dispatcher's clock): queued, reserved (a decode worker was asked), prefill_start (the
    task was sent), first_token, arrived (the KV is on the decode worker), first_decode, last_token, finished. The
    ones before first_token are those of the attempt that yielded it; later ones of the first attempt that got so far.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    n: int = 1
    priority: int = 0  # lower runs first
    cache_salt: bytes = b""
    timeout_s: float | None = None  # from its submission on
    allowed_s: float | None = None  # that, and what had passed of it before; None: nothing had
    request_class: str = DEFAULT_CLASS
    objectives: Objectives = NO_OBJECTIVES  # of its class
    tenant: str = ""  # who it is from, as far as fairness goes
    model: str = ""  # the served name; empty: whatever the workers serve
    adapter: AdapterUse | None = None  # None: the model as it is
    grammar: CheckedGrammar | None = None  # that the answers follow
    pooling: Pooling | None = None  # the prompt's embedding is wanted, pooled so, and no token; None: an answer is
    is_background: bool = False  # it makes way for all others
    takes_less: bool = False  # an answer that is as long as a worker holds will do, where none holds its longest
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
    embedding: bytes = b""  # float32 in little-endian order, of length 1; empty until the request ends with it
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
    def num_longest_tokens(self) -> int:
        return max(len(choice.tokens) for choice in self.choices)

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

    def shorten(self, max_tokens: int) -> None:
        """Let its answers be no longer than this. No token of them has come yet."""
        assert not self.is_resume
        self.sampling = msgspec.structs.replace(self.sampling, max_tokens=max_tokens)
        for choice in self.choices:
            choice.max_tokens = max_tokens

    @property
    def pace(self) -> Pace | None:
        """The pace that its stream is to keep; None: it has no objective, or is no stream."""
        tpot_s = None if self.pooling is not None else self.objectives.tpot_s
        return None if tpot_s is None else (self.priority, tpot_s)

    @property
    def reuses_prefix(self) -> bool:
        """Tell whether it needs nothing of the part of its prompt that a prefix cache has."""
        return reuses_prefix(self.sampling, self.pooling)

    def end_embedded(self, vector: bytes, now_s: float) -> None:
        """Take the embedding, which is all of its answer."""
        self.embedding = vector
        self.timestamps.setdefault("first_token", now_s)
        self.choices[0].end_now(FinishReason.STOP)

    @property
    def first_mask(self) -> bytes:
        """Return which tokens an answer may begin with, as it is sent; empty: any, or answers go on."""
        return b"" if self.grammar is None or self.is_resume else self.grammar.first_mask

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
            model=self.model,
            adapter="" if self.adapter is None else self.adapter.digest,
            adapter_path="" if self.adapter is None else self.adapter.path,
            grammar=None if self.grammar is None else self.grammar.grammar,
        )
