"""The autoscaler reads and says these values.

    LoadSnapshot (one per interval) ─> Autoscaler.decide ─> ScaleDecision

All times are seconds of one clock that the caller passes in; `week_s` alone is the time of the week, for schedules and
for what is learned about days.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NamedTuple, Protocol

from ...common.kv_spec import KVCacheSpec
from ..state.objectives import Objectives

Pool = Literal["prefill", "decode"]
POOLS: tuple[Pool, Pool] = ("prefill", "decode")
DAY_S = 86400.0


class StepTimes(Protocol):
    """The time of an engine step on a typical worker of the fleet."""

    def prefill_s(self, new_tokens: int, context: int) -> float:
        """Return the time to compute `new_tokens` behind `context` tokens that have their KV, alone on a worker."""
        ...

    def decode_step_s(self, rows: int, context: int) -> float:
        """Return the time of one token for each of `rows` sequences that hold `context` tokens together."""
        ...


class MemberState(Enum):
    PENDING = "pending"  # wanted: it starts, or waits for a node
    READY = "ready"  # takes work
    DRAINING = "draining"  # takes nothing new and will leave: no capacity any more


@dataclass(slots=True, frozen=True)
class Member:
    """A worker, or one that will be."""

    worker_id: str
    pool: Pool
    state: MemberState
    load: float = 0.0  # what it holds, in any unit that orders workers: the emptiest changes or leaves first
    can_change_role: bool = True


class AnswerLengths(NamedTuple):
    """The lengths of one finished request, in tokens, and what it was to get."""

    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt: from a prefix cache
    num_output_tokens: int  # of all its choices
    objectives: Objectives | None = None  # of its class; None: of the class "default"
    num_choices: int = 1  # that ran side by side, behind one prompt


@dataclass(slots=True, frozen=True)
class Kept:
    """The number of requests that met an objective, of those that ended."""

    num_met: int = 0
    num_seen: int = 0


@dataclass(slots=True, frozen=True)
class WorkerLimits:
    """The most that one worker of a pool holds: a decode worker answers, a prefill worker prompts."""

    kv_tokens: int  # in a decode worker's KV cache
    max_num_seqs: int  # of a decode worker
    max_num_batched_tokens: int = 8192  # of a prefill worker
    spec: KVCacheSpec | None = None  # of KV that is handed over, and takes what that brings; None: all of it


@dataclass(slots=True, frozen=True)
class LoadSnapshot:
    """The load since the snapshot before, and the fleet as it is now."""

    now_s: float
    interval_s: float  # since the snapshot before; 0: a decision was asked for in between
    week_s: float  # since Monday's midnight, in the operator's zone
    prompts: tuple[int, ...]  # tokens of each request that came, refused ones included
    answers: tuple[AnswerLengths, ...]  # of requests that ended; an even choice of them is enough
    members: tuple[Member, ...]
    limits: WorkerLimits | None  # None: these or the step times are not known, so no load can be sized
    queued_tokens: int = 0  # prompt tokens that wait in the central queue
    ttft: Kept = Kept()
    tpot: Kept = Kept()
    start_s: float = 60.0  # from the request for a worker until it takes work, as measured
    desired: Counts | None = None  # as decided last, here or by another router

    @property
    def day_s(self) -> float:
        return self.week_s % DAY_S

    @property
    def weekday(self) -> int:
        """0 is Monday."""
        return int(self.week_s // DAY_S) % 7


@dataclass(slots=True, frozen=True)
class Bounds:
    """The least and the most workers that a pool may have."""

    at_least: int
    at_most: int

    def clamp(self, count: int) -> int:
        return max(self.at_least, min(self.at_most, count))


@dataclass(slots=True, frozen=True)
class Counts:
    """Workers of each pool."""

    prefill: int
    decode: int

    @property
    def total(self) -> int:
        return self.prefill + self.decode

    def in_pool(self, pool: Pool) -> int:
        return self.prefill if pool == "prefill" else self.decode

    def __str__(self) -> str:
        return f"{self.prefill} prefill + {self.decode} decode"


@dataclass(slots=True, frozen=True)
class AutoscalerSettings:
    """The settings that an operator decides. `total` bounds both pools together."""

    prefill: Bounds
    decode: Bounds
    total: int
    objectives: Objectives  # of the class "default"
    schedule: tuple[str, ...] = ()  # "HH:MM-HH:MM prefill>=4 decode>=2", see settings/windows.py
    spare_workers: int = 0  # ready beyond the need
    target: float = 0.99  # share of requests that are to meet each objective
    headroom: float = 0.08  # a smaller fleet must carry so much more than the forecast
    jump: float = 1.3  # a need so many times a pool is a jump: known less well than a slow rise, and with a backlog
    jump_headroom: float = 0.20  # so it is answered with this much more
    shrink_after_s: float = 300.0  # the smaller fleet must have been enough for so long
    flip_after_s: float = (
        15.0  # a smaller pool must have been enough for so long before a worker is taken for the other
    )
    settle_s: float = 30.0  # after a change, what is measured tells nothing about the fleet as it is
    confirm_s: float = 30.0  # a need little above the fleet must last so long, else it is noise
    clear: float = 0.15  # a need that even so much less load would have is no noise
    backlog_s: float = 30.0  # what waits in the queue is to be gone after so long


@dataclass(slots=True, frozen=True)
class ScaleForecast:
    """The figures that a decision rests on."""

    requests_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    needed: Counts = Counts(0, 0)  # for the forecast load, noise left out
    after_jump: Counts = Counts(0, 0)  # as `needed`, with more room in a pool that is far too small
    with_headroom: Counts = Counts(0, 0)  # for the load with headroom, largest of the time before a shrink
    correction: tuple[float, float] = (1.0, 1.0)  # of prefill and decode load, from missed objectives


@dataclass(slots=True, frozen=True)
class ScaleDecision:
    """The number of workers that each pool should have, and the way there: flips, then additions and removals."""

    prefill: int
    decode: int
    reason: str
    flips: tuple[tuple[str, Pool], ...] = ()  # (worker id, its new pool)
    removals: tuple[str, ...] = ()  # worker ids: drained, then gone
    additions: Counts = Counts(0, 0)
    forecast: ScaleForecast = field(default_factory=ScaleForecast)
