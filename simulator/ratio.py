"""The workers that a load takes: how many of each role, by matching rates first and by simulation then.

    matched(scenario)               worker seconds of a mean request in each role: what an oracle would need
    least_fleet(scenario)           the fewest workers that keep the objectives at the traffic's rate, in the best split

Rates say where to begin: lengths that vary, queues, a cache that fills up, and prompts that the policy leaves to decode
workers move the best split, which simulations find from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..common.errors import ConfigError
from ..sizing.steps import StepModel, StepWork
from ..tools.load.traces import TraceRow
from .oracle import Bound, bound
from .outcome import Outcome
from .scenario import Scenario
from .simulate import simulate
from .traffic import arrivals

_FEW = 8  # workers, of which all splits are compared
_CHANCE = 0.02  # of good requests in one draw of the arrivals. Smaller: a better split may be passed over
_DRAWS = 4  # that decide between such splits. Fewer: chance does; more: it takes longer
_GROWTH = 8  # a fleet that is too small grows by so small a part of itself: larger parts pass the least one by more
MOST_WORKERS = 512  # where the search for a fleet ends
_NO_NUMBER = "no number of workers makes a step, or a lone prompt, faster"


@dataclass(slots=True, frozen=True)
class Split:
    """Workers by role; no prefill workers: colocated ones."""

    prefill: int
    decode: int

    def __str__(self) -> str:
        return f"{self.prefill}:{self.decode}"


@dataclass(slots=True, frozen=True)
class LeastFleet:
    """The fewest workers that keep the objectives, and what was tried."""

    split: Split
    outcome: Outcome
    tried: tuple[tuple[Split, float], ...]  # with the share of requests that were good


def with_split(scenario: Scenario, split: Split) -> Scenario:
    return replace(scenario, fleet=replace(scenario.fleet, prefill=split.prefill, decode=split.decode))


def matched(rates: Bound, num_workers: int) -> Split:
    """Split workers so that both pools serve the same rate, as nearly as whole ones do."""
    if num_workers < 2:
        return Split(0, 1)

    def rate(prefill: int) -> float:
        return min(prefill / max(rates.prefill_s, 1e-12), (num_workers - prefill) / max(rates.decode_s, 1e-12))

    prefill = max(range(1, num_workers), key=rate)
    return Split(prefill, num_workers - prefill)


def least_fleet(scenario: Scenario, *, share: float = 0.9) -> LeastFleet:
    """Search the fewest workers at the traffic's rate: growing ones first, then between the last two.

    Of the splits of as many workers it is one beside which no other keeps the objectives of more requests.

    Raises ConfigError where the objectives are not kept however many there are.
    """
    assert scenario.traffic.rate_per_s is not None
    _check_possible(scenario, share)
    rates = bound(with_split(scenario, Split(1, 1)), share=share)
    tried: dict[Split, Outcome] = {}

    def outcome(split: Split) -> Outcome:
        if split not in tried:
            tried[split] = simulate(with_split(scenario, split))
        return tried[split]

    def best_of(num_workers: int) -> Split:
        """Climb until some split keeps the objectives or none beside it does better."""
        best = matched(rates, num_workers)
        while outcome(best).attainment < share:
            better = max((best, *_beside(best)), key=lambda split: outcome(split).attainment)
            if better == best:
                break
            best = better
        return best

    count = low = max(1, math.ceil(scenario.traffic.rate_per_s * share * (rates.prefill_s + rates.decode_s)))
    while outcome(found := best_of(count)).attainment < share:
        if count >= MOST_WORKERS:
            raise ConfigError(
                f"rate: with {count} workers {outcome(found).attainment:.0%} of the requests keep the objectives, "
                f"not {share:.0%}: {_NO_NUMBER}"
            )
        low, count = count + 1, min(MOST_WORKERS, count + max(1, count // _GROWTH))
    while low < count:  # fewer than low do not do
        middle = (low + count) // 2
        candidate = best_of(middle)
        if outcome(candidate).attainment >= share:
            count, found = middle, candidate
        else:
            low = middle + 1
    while (better := max((found, *_beside(found)), key=lambda split: outcome(split).attainment)) != found:
        found = better
    found = _settled(scenario, found, outcome)
    return LeastFleet(found, outcome(found), tuple((split, one.attainment) for split, one in tried.items()))


def _check_possible(scenario: Scenario, share: float) -> None:
    """Refuse an objective that answers miss even alone, before fleets are tried. Raises ConfigError."""
    steps, goal_s = scenario.fleet.step_model(), scenario.goals.tpot_s
    rows = [row for _, row in arrivals(scenario.traffic)]
    paces = sorted(_lone_step_s(steps, row) for row in rows)
    pace_s = paces[math.ceil(share * len(paces)) - 1]
    if pace_s > goal_s:
        raise ConfigError(
            f"rate: alone an answer has a token every {pace_s * 1e3:.3g} ms, where the objective is {goal_s * 1e3:.3g} "
            f"ms: {_NO_NUMBER}"
        )


def _lone_step_s(steps: StepModel, row: TraceRow) -> float:
    """Return the time per token of an answer by itself; an answer of one token has none."""
    if row.num_output_tokens < 2:
        return 0.0
    return steps.step_s(StepWork(0, 0, 1, row.num_prompt_tokens + row.num_output_tokens // 2))


def _settled(scenario: Scenario, best: Split, outcome: Callable[[Split], Outcome]) -> Split:
    """Return the best of the splits that are about as good as this one, over several draws of arrivals.

    `outcome`: of a split in the first draw. Small fleets have few splits: all are looked at.
    """
    num_workers = best.prefill + best.decode
    splits = _beside(best) if num_workers > _FEW else _splits(num_workers)
    near = [one for one in splits if one != best and outcome(one).attainment > outcome(best).attainment - _CHANCE]
    if not near:
        return best

    def good(split: Split) -> float:
        others = (simulate(_drawn(with_split(scenario, split), number)) for number in range(1, _DRAWS))
        return outcome(split).attainment + sum(one.attainment for one in others)

    return max((best, *near), key=good)


def _drawn(scenario: Scenario, number: int) -> Scenario:
    """Return the scenario with other arrivals and step times."""
    traffic = replace(scenario.traffic, seed=scenario.traffic.seed + number)
    return replace(scenario, traffic=traffic, seed=scenario.seed + number)


def _splits(num_workers: int) -> Iterator[Split]:
    return (Split(prefill, num_workers - prefill) for prefill in range(1, num_workers))


def _beside(split: Split) -> Iterator[Split]:
    if split.prefill > 1:
        yield Split(split.prefill - 1, split.decode + 1)
    if split.prefill and split.decode > 1:
        yield Split(split.prefill + 1, split.decode - 1)
