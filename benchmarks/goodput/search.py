"""What each system can do with the same GPUs: its best split, at the highest rate that keeps the objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kvferry.benchmarks.goodput.setup import GoodputSetup
from kvferry.simulator import Capacity, Fleet, Goals, Router, Scenario, Traffic, capacity
from kvferry.simulator.oracle import bound

Part = Literal["whole", "first", "second"]
_PRECISION = 0.04  # of a rate


@dataclass(slots=True, frozen=True)
class System:
    """A policy on a split of the workers."""

    policy: str
    prefill: int
    decode: int
    chunk: int = 2048  # tokens of a decode worker's step
    admits: bool = True  # the router knows the objectives: it refuses what cannot make them

    @property
    def name(self) -> str:
        kind = "colocated" if self.prefill == 0 and self.policy != "slo" else self.policy
        return kind if self.admits else f"{kind}, all admitted"

    @property
    def split(self) -> str:
        return f"{self.prefill}+{self.decode}" if self.prefill else f"{self.decode}, chunks of {self.chunk:,}"


@dataclass(slots=True, frozen=True)
class Best:
    """A system at its goodput."""

    system: System
    rate_per_s: float
    goodput_per_s: float
    tried: tuple[tuple[System, float], ...]  # each split and its goodput


@dataclass(slots=True, frozen=True)
class Bench:
    """One trace, one half of it."""

    setup: GoodputSetup
    trace: str
    part: Part
    num_requests: int | None = None  # None: all of the half

    def scenario(self, system: System, rate_per_s: float | None = None) -> Scenario:
        setup = self.setup
        tokens = system.chunk if not system.prefill else Fleet(1, 1).decode_tokens
        return Scenario(
            traffic=Traffic(self.trace, part=self.part, rate_per_s=rate_per_s, num_requests=self.num_requests),
            fleet=Fleet(
                prefill=system.prefill,
                decode=system.decode,
                gpu=setup.gpu,
                model=setup.model,
                gpus_per_worker=setup.tensor_parallel_size,
                decode_tokens=tokens,
            ),
            router=Router(policy=system.policy, knows_objectives=system.admits),
            goals=Goals(setup.ttft_s, setup.ttft_stretch, setup.tpot_s),
            seed=setup.seed,
        )

    def ceiling_per_s(self) -> float:
        """Of goodput, for an oracle on the same GPUs."""
        whole = self.scenario(System("slo", self.setup.num_workers - 1, 1))
        return bound(whole, share=self.setup.share).goodput_per_s

    def capacity(self, system: System, guess_per_s: float) -> Capacity:
        """The highest rate that keeps the objectives. Raises ConfigError where none is too high for so few requests."""
        return capacity(self.scenario(system), share=self.setup.share, precision=_PRECISION, start_per_s=guess_per_s)

    def best_split(self, make: Callable[[int], System], starts: Sequence[int], guess_per_s: float) -> Best:
        """Of the splits (prefill workers), uphill from each of `starts`."""
        found: dict[int, Capacity] = {}

        def goodput(prefill: int) -> float:
            if not 1 <= prefill < self.setup.num_workers:
                return -1.0
            if prefill not in found:
                guess = max((one.rate_per_s for one in found.values()), default=0.0) or guess_per_s
                found[prefill] = self.capacity(make(prefill), guess)
            return found[prefill].goodput_per_s

        def top(at: int) -> int:
            better = max((at - 1, at, at + 1), key=lambda split: (goodput(split), split == at))
            return at if better == at else top(better)

        at = max((top(start) for start in starts), key=goodput)
        tried = tuple((make(prefill), one.goodput_per_s) for prefill, one in sorted(found.items()))
        return Best(make(at), found[at].rate_per_s, found[at].goodput_per_s, tried)

    def best_chunk(self, guess_per_s: float, *, admits: bool) -> Best:
        """Of the colocated workers' step sizes."""
        found: dict[System, Capacity] = {}
        for chunk in self.setup.colocated_chunks:
            system = System("least_loaded", 0, self.setup.num_workers, chunk, admits)
            guess = max((one.rate_per_s for one in found.values()), default=0.0) or guess_per_s
            found[system] = self.capacity(system, guess)
        best = max(found, key=lambda system: found[system].goodput_per_s)
        tried = tuple((system, one.goodput_per_s) for system, one in found.items())
        return Best(best, found[best].rate_per_s, found[best].goodput_per_s, tried)
