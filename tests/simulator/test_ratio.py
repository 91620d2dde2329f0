"""The split of a fleet: what the search finds is what simulating every split finds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from statistics import mean

import pytest

from kvferry.common.errors import ConfigError
from kvferry.simulator import Fleet, Goals, Outcome, Router, Scenario, Traffic, simulate
from kvferry.simulator.oracle import Bound
from kvferry.simulator.ratio import LeastFleet, Split, least_fleet, matched, with_split


def scenario(trace: str, num_requests: int, rate_per_s: float | None = None) -> Scenario:
    traffic = Traffic(f"sample:{trace}", arrivals="poisson", num_requests=num_requests, rate_per_s=rate_per_s)
    fleet = Fleet(1, 1, model="llama-3.1-8b", gpus_per_worker=1)
    return Scenario(traffic, fleet, Router(policy="slo"), Goals(0.3, 2.0, 0.03))


def test_rates_are_matched_as_nearly_as_whole_workers_do() -> None:
    rates = Bound(1.0, 1.0, prefill_s=0.3, decode_s=0.1, hit_rate=0.0)
    assert [matched(rates, count) for count in (1, 2, 4, 8)] == [Split(0, 1), Split(1, 1), Split(3, 1), Split(6, 2)]


# Prompts that are long beside their answers: how the workers are split shows in how many requests are good.
OFFERED = scenario("azure-2023-code", 150, rate_per_s=60.0)


@pytest.fixture(scope="module")
def simulated() -> Callable[[Scenario], Outcome]:
    """Remembers outcomes: the search has simulated most of what it is held against."""
    return functools.cache(simulate)


@pytest.fixture(scope="module")
def found(simulated: Callable[[Scenario], Outcome]) -> LeastFleet:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvferry.simulator.ratio.simulate", simulated)
        return least_fleet(OFFERED)


def test_the_split_is_the_best_of_all_by_simulation(
    found: LeastFleet, simulated: Callable[[Scenario], Outcome]
) -> None:
    num_workers = sum_of(found.split)
    shares = {}
    for split in (Split(prefill, num_workers - prefill) for prefill in range(1, num_workers)):
        of_split = with_split(OFFERED, split)
        draws = [replace(of_split, traffic=replace(OFFERED.traffic, seed=seed), seed=seed) for seed in range(4)]
        shares[split] = mean(simulated(draw).attainment for draw in draws)
    assert shares[found.split] >= max(shares.values()) - 0.01
    assert min(shares.values()) < max(shares.values()) - 0.01, "there is a choice"


def test_the_least_fleet_keeps_the_objectives_and_one_fewer_does_not(found: LeastFleet) -> None:
    assert found.outcome.attainment >= 0.9
    fewer = [good for split, good in found.tried if sum_of(split) == sum_of(found.split) - 1]
    assert fewer and max(fewer) < 0.9


def sum_of(split: Split) -> int:
    return split.prefill + split.decode


def test_objectives_that_no_number_of_workers_keeps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.simulator.ratio.MOST_WORKERS", 4)
    possible = scenario("azure-2023-conv", 30, rate_per_s=1.0)
    with pytest.raises(ConfigError, match=r"with 4 workers .* no number of workers makes a step, or a lone pro"):
        least_fleet(replace(possible, goals=Goals(1e-6, 1.0, 0.05)))


def test_a_pace_that_no_lone_answer_has_is_refused_before_a_fleet_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("kvferry.simulator.ratio.simulate")
    possible = scenario("azure-2023-conv", 30, rate_per_s=1.0)
    with pytest.raises(ConfigError, match=r"alone an answer has a token every .* ms, where the objective is 1 ms"):
        least_fleet(replace(possible, goals=Goals(0.3, 2.0, 0.001)))
