"""The split that the search for a fleet finds, beside every split of as many workers: what each keeps at that load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import mean

from kvferry.simulator import Fleet, Goals, Router, Scenario, Traffic, simulate
from kvferry.simulator.oracle import bound
from kvferry.simulator.ratio import Split, least_fleet, matched, with_split

TRACES = ("sample:azure-2023-conv", "sample:azure-2023-code")
PRECISION = 0.01  # of the requests: splits that are nearer to each other are equally good
DRAWS = 8  # of arrivals, in which a split's good requests are counted: one alone is off by a hundredth
JUDGE_SEED = 1000  # of these draws: none that the search has seen


@dataclass(slots=True, frozen=True)
class Ratio:
    """One trace's splits."""

    trace: str
    rate_per_s: float  # for which the fleet was searched
    matched: str
    chosen: str
    shares: tuple[tuple[str, float], ...]  # of every split: of requests that keep the objectives

    @property
    def is_best(self) -> bool:
        shares = dict(self.shares)
        return shares[self.chosen] >= max(shares.values()) - PRECISION


def ratio_of(trace: str, rate_per_s: float, num_requests: int, tell: Callable[[str], None]) -> Ratio:
    """Search, then measure every split of as many workers by other arrivals, whatever the search has found."""
    scenario = Scenario(
        Traffic(trace, arrivals="poisson", num_requests=num_requests, rate_per_s=rate_per_s),
        Fleet(1, 1, model="llama-3.1-8b", gpus_per_worker=1),
        Router(policy="slo"),
        Goals(ttft_s=0.3, ttft_stretch=2.0, tpot_s=0.03),
    )
    tell(f"{trace}: search for {rate_per_s:g} requests/s")
    found = least_fleet(scenario).split
    num_workers = found.prefill + found.decode
    shares = []
    for prefill in range(num_workers):  # from none on: workers that do both
        split = Split(prefill, num_workers - prefill)
        tell(f"{trace}: {split}")
        goods = [simulate(_drawn(with_split(scenario, split), number)).attainment for number in range(DRAWS)]
        shares.append((str(split), mean(goods)))
    return Ratio(trace, rate_per_s, str(matched(bound(scenario), num_workers)), str(found), tuple(shares))


def _drawn(scenario: Scenario, number: int) -> Scenario:
    seed = JUDGE_SEED + number
    return replace(scenario, traffic=replace(scenario.traffic, seed=seed), seed=seed)
