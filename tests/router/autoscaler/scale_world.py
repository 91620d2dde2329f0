"""A made-up fleet for the autoscaler: linear step times, steady or changing load, workers that start after a while."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from kvferry.router.autoscaler.autoscaler import Autoscaler
from kvferry.router.autoscaler.scale_types import (
    AnswerLengths,
    AutoscalerSettings,
    Bounds,
    Counts,
    Kept,
    LoadSnapshot,
    Member,
    MemberState,
    Pool,
    ScaleDecision,
    WorkerLimits,
)
from kvferry.router.state.objectives import Objectives

INTERVAL_S = 5.0
_DICE = random.Random(0)
_PROMPTS = [int(_DICE.lognormvariate(6.5, 0.8)) + 1 for _ in range(1024)]
_OUTPUTS = [int(_DICE.lognormvariate(5.0, 0.8)) + 1 for _ in range(1024)]
LIMITS = WorkerLimits(kv_tokens=200_000, max_num_seqs=128)


class LinearTimes:
    """A prompt token takes 0.1 ms, a decode step 10 ms and 0.2 ms for each row."""

    def prefill_s(self, new_tokens: int, context: int) -> float:
        return 0.005 + 1e-4 * new_tokens + 1e-9 * new_tokens * context

    def decode_step_s(self, rows: int, context: int) -> float:
        return 0.01 + 2e-4 * rows + 1e-8 * context


def settings(**changes: object) -> AutoscalerSettings:
    values: dict[str, object] = {
        "prefill": Bounds(1, 50),
        "decode": Bounds(1, 50),
        "total": 100,
        "objectives": Objectives(ttft_s=1.0, tpot_s=0.03),
        **changes,
    }
    return AutoscalerSettings(**values)  # type: ignore[arg-type]


@dataclass
class World:
    """Time passes in intervals; what the autoscaler decides is carried out."""

    settings: AutoscalerSettings
    rate: Callable[[float], float]  # requests/s at a time
    prefill: int = 1
    decode: int = 1
    start_s: float = 30.0
    seed: int = 0
    prompt: Callable[[random.Random, float], int] = lambda dice, now: _PROMPTS[int(dice.random() * 1024)]
    output: Callable[[random.Random, float], int] = lambda dice, now: _OUTPUTS[int(dice.random() * 1024)]
    kept: Callable[[Counts], tuple[Kept, Kept]] = lambda counts: (Kept(), Kept())
    can_flip: bool = True
    week_s: float = 0.0
    queued_tokens: int = 0
    now_s: float = 1000.0
    decisions: list[tuple[float, ScaleDecision, Counts]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.autoscaler = Autoscaler(self.settings, LinearTimes())
        self._dice = random.Random(self.seed)
        self._number = 0
        self.members: dict[str, tuple[Pool, float]] = {}  # by worker id: its pool, when it is ready
        self.add("prefill", self.prefill, 0.0)
        self.add("decode", self.decode, 0.0)

    def add(self, pool: Pool, count: int, ready_s: float) -> None:
        for _ in range(count):
            self.members[f"{pool[0]}-{self._number}"] = (pool, ready_s)
            self._number += 1

    def counts(self, *, ready: bool = False) -> Counts:
        pools = [pool for pool, ready_s in self.members.values() if not ready or ready_s <= self.now_s]
        return Counts(pools.count("prefill"), pools.count("decode"))

    def snapshot(self) -> LoadSnapshot:
        dice, now = self._dice, self.now_s
        count = _poisson(dice, self.rate(now) * INTERVAL_S)
        prompts = [self.prompt(dice, now) for _ in range(count)]
        ttft, tpot = self.kept(self.counts(ready=True))
        return LoadSnapshot(
            now_s=now,
            interval_s=INTERVAL_S,
            week_s=self.week_s + now,
            prompts=tuple(prompts),
            answers=tuple(AnswerLengths(prompt, 0, self.output(dice, now)) for prompt in prompts),
            members=tuple(self._member(name) for name in self.members),
            limits=LIMITS,
            queued_tokens=self.queued_tokens,
            start_s=self.start_s,
            ttft=ttft,
            tpot=tpot,
        )

    def _member(self, name: str) -> Member:
        pool, ready_s = self.members[name]
        state = MemberState.READY if ready_s <= self.now_s else MemberState.PENDING
        return Member(name, pool, state, load=float(int(name[2:]) % 7), can_change_role=self.can_flip)

    def step(self) -> ScaleDecision:
        self.now_s += INTERVAL_S
        decision = self.autoscaler.decide(self.snapshot())
        for worker_id, pool in decision.flips:
            self.members[worker_id] = (pool, self.members[worker_id][1])
        for worker_id in decision.removals:
            del self.members[worker_id]
        self.add("prefill", decision.additions.prefill, self.now_s + self.start_s)
        self.add("decode", decision.additions.decode, self.now_s + self.start_s)
        self.decisions.append((self.now_s, decision, self.counts()))
        return decision

    def run(self, seconds: float) -> World:
        for _ in range(round(seconds / INTERVAL_S)):
            self.step()
        return self

    def ups_after_downs(self, within_s: float) -> list[tuple[float, float]]:
        """Times of a smaller and then a larger fleet, not further apart than this."""
        totals = [(when, counts.total) for when, _, counts in self.decisions]
        changes = [(when, after - before) for (_, before), (when, after) in itertools.pairwise(totals)]
        downs = [when for when, change in changes if change < 0]
        ups = [when for when, change in changes if change > 0]
        return [(down, up) for down in downs for up in ups if 0 < up - down <= within_s]


def _poisson(dice: random.Random, mean: float) -> int:
    if mean > 200:
        return max(0, round(dice.gauss(mean, mean**0.5)))
    count, left = 0, dice.expovariate(1.0)
    while left < mean:
        count, left = count + 1, left + dice.expovariate(1.0)
    return count
