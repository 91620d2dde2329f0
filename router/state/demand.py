"""Placement policies speak these words: what a request needs of workers, where it is placed, or what it waits for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from ...common.kv_spec import KVCacheSpec
from ...kvcache.frames import handed_frames
from .adapter_use import AdapterUse
from .objectives import NO_OBJECTIVES, Objectives


class Reason(Enum):
    """The reason why a placement has, or has not, a prefill worker."""

    HANDOFF = "handoff"
    SHORT_PROMPT = "short_prompt"  # its handoff would cost more than its prefill
    COLOCATED = "colocated"  # no prefill pool is configured
    NO_PREFILL_WORKER = "no_prefill_worker"  # a fallback: none lives that can hold the prompt
    FAILED_HANDOFF = "failed_handoff"  # a fallback: with every pair a handoff has failed
    ALONE = "alone"  # it may kill workers (isolation.py)
    EMBEDDING = "embedding"  # a prefill worker computes it to its end
    SOONER = "sooner"  # its first token comes sooner so, and the streams there keep their pace

    @property
    def is_fallback(self) -> bool:
        return self in (Reason.NO_PREFILL_WORKER, Reason.FAILED_HANDOFF)


class Lack(Enum):
    """The thing that a request that cannot be placed waits for."""

    DECODE_WORKER = "decode_worker"  # none is ready
    PREFILL_WORKER = "prefill_worker"  # none is ready, and the decode workers may not stand in
    DECODE_ROOM = "decode_room"
    PREFILL_ROOM = "prefill_room"
    PAIR = "pair"  # with every pair of ready workers a handoff has failed
    FIT = "fit"  # no worker can ever hold it


@dataclass(slots=True, frozen=True)
class Prediction:
    """A policy's expectation of a placement."""

    ttft_s: float  # from the placement on
    tpot_s: float
    prefill_s: float = 0.0  # of the first, computing the prompt
    wait_s: float = 0.0  # of the first, for prompts ahead
    cached_tokens: int = 0
    bare_s: float = 0.0  # of the first, the steps that compute the prompt, with what they do for streams beside it


@dataclass(slots=True, frozen=True)
class Placement:
    prefill_worker: str | None
    decode_worker: str  # of an embedding: whoever computes it
    reason: Reason
    fetch_from: str | None = None  # a worker from which whoever computes the prompt reads its beginning
    prediction: Prediction | None = field(default=None, compare=False)

    @property
    def computing_worker(self) -> str:
        """Return the worker that computes the prompt."""
        return self.prefill_worker or self.decode_worker


@dataclass(slots=True, frozen=True)
class Wait:
    """No placement now. `claim`: the decode session whose room is kept for this request from those behind it."""

    lack: Lack
    claim: int | None = None


@dataclass(slots=True, frozen=True)
class Demand:
    """One request's needs, and what it has learned about workers (session numbers)."""

    num_prompt_tokens: int
    num_tokens: int  # prompt and the longest choice's accepted tokens
    max_num_tokens: int  # prompt and the longest answer
    num_choices: int
    busy: frozenset[int] = frozenset()  # said no since their last heartbeat, or kept for an older request
    unfit: frozenset[int] = frozenset()  # can never hold it
    ungranted: frozenset[int] = frozenset()  # decode workers that can only compute it themselves
    failed_pairs: frozenset[tuple[int, int]] = frozenset()  # (prefill, decode)
    computed_on: int | None = None  # the prefill worker that has the prompt's KV in its cache
    queue_if_full: bool = False  # it has waited: a worker that others fill is asked all the same
    cached: Mapping[int, int] = field(default_factory=dict)  # session: tokens of the prompt's beginning that it holds
    objectives: Objectives = NO_OBJECTIVES
    priority: int = 0  # lower goes first
    ttft_limit_s: float | None = None  # of its objectives, for a prompt as long as this
    waited_s: float = 0.0  # since it came
    expected_output: int = 0  # tokens of each choice
    adapter: AdapterUse | None = None
    tokens_behind: int = 0  # of other prompts that wait, for each worker of the pool that computes prompts
    has_prefill_pool: bool = False  # that pool is the prefill workers', not the decode workers'
    is_embedding: bool = False  # it ends with its prompt: one worker of either role is all that it needs
    may_miss: bool = False  # its first token comes too late whatever is done, or it has got one: no hurry for it

    @property
    def local_tokens_behind(self) -> int | None:
        """Return those that wait for each decode worker; None: they wait for prefill workers."""
        return None if self.has_prefill_pool else self.tokens_behind

    def load_s(self, loaded: Collection[str]) -> float:
        """Return how long its adapter takes to load where these are; 0 where it is one of them, or there is none."""
        return 0.0 if self.adapter is None or self.adapter.digest in loaded else self.adapter.load_s

    def blocks_now(self, spec: KVCacheSpec) -> int:
        """Return the blocks for the prompt, and a first block of its own for each choice after the first. Of what a
        handoff brings thin: as many whole ones as have the memory.
        """
        num_blocks = spec.num_blocks_for(self.num_tokens) + self.num_choices - 1
        return handed_frames(spec, num_blocks, self.num_prompt_tokens) if self.has_prefill_pool else num_blocks

    def blocks_to_end(self, spec: KVCacheSpec) -> int:
        """Full prompt blocks are shared by the choices, the rest is each one's own."""
        shared = self.num_prompt_tokens // spec.block_size
        return shared + self.num_choices * (spec.num_blocks_for(self.max_num_tokens) - shared)


class Promise(NamedTuple):
    """The expectation with which a request was admitted."""

    at_s: float
    expected_s: float
    limit_s: float | None  # within which it had to be
