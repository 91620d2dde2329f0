"""The split that the search finds, beside every split simulated whole, as each trace's capacity tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvferry.simulator import Fleet, Goals, Router, Scenario, Traffic, capacity
from kvferry.simulator.ratio import Split, best_split, with_split

TRACES = ("sample:azure-2023-conv", "sample:azure-2023-code")
PRECISION = 0.02  # of a rate: splits that are nearer to each other are equally good


@dataclass(slots=True, frozen=True)
class Ratio:
    """One trace's splits."""

    trace: str
    matched: str
    chosen: str
    rates: tuple[tuple[str, float], ...]  # of every split: the highest rate that keeps the objectives

    @property
    def is_best(self) -> bool:
        rates = dict(self.rates)
        return rates[self.chosen] >= max(rates.values()) * (1 - PRECISION)


def ratio_of(trace: str, num_workers: int, num_requests: int, tell: Callable[[str], None]) -> Ratio:
    """Search, then simulate every split from one guess, whatever the search has found."""
    scenario = Scenario(
        Traffic(trace, arrivals="poisson", num_requests=num_requests),
        Fleet(1, 1, model="llama-3.1-8b", gpus_per_worker=1),
        Router(policy="slo"),
        Goals(ttft_s=0.3, ttft_stretch=2.0, tpot_s=0.03),
    )
    tell(f"{trace}: search")
    found = best_split(scenario, num_workers, precision=PRECISION)
    rates = []
    for prefill in range(1, num_workers):
        split = Split(prefill, num_workers - prefill)
        tell(f"{trace}: {split}")
        whole = capacity(with_split(scenario, split), precision=PRECISION / 2, start_per_s=10.0 * num_workers)
        rates.append((str(split), whole.rate_per_s))
    return Ratio(trace, str(found.matched), str(found.split), tuple(rates))
