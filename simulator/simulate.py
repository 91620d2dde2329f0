"""The one call: a scenario in, its outcome out. And the rate at which a share of the requests is still good."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import structlog

from ..common.errors import ConfigError
from .lengths import count_too_long
from .outcome import Outcome
from .scenario import Scenario
from .traffic import arrivals, check_span, mean_rate, rows_of
from .world import World


def simulate(scenario: Scenario) -> Outcome:
    """Run it. Raises ConfigError for a scenario that no run shows, or that no machine simulates."""
    check_span(scenario.traffic)
    return World(scenario).run()


def quiet_simulation() -> None:
    """Leave out all but what is critical: a simulated router logs what a live one would, and nobody reads that."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


@dataclass(slots=True, frozen=True)
class Capacity:
    """The highest rate at which the wanted share of requests met both objectives, and what was tried."""

    rate_per_s: float
    goodput_per_s: float  # at that rate
    outcome: Outcome | None  # None: not even the lowest rate was kept
    tried: tuple[tuple[float, float], ...]  # (rate, attainment), in the order of trial


def at_rate(scenario: Scenario, rate_per_s: float) -> Scenario:
    return replace(scenario, traffic=replace(scenario.traffic, rate_per_s=rate_per_s))


def capacity(
    scenario: Scenario, *, share: float = 0.9, precision: float = 0.02, start_per_s: float | None = None
) -> Capacity:
    """Bisect over the rate, to `precision` of it. `start_per_s`: a guess; None: the trace's own rate.

    Raises ConfigError where no rate is too high: so few requests are good even if all of them come at once. And where
    all are, as the model's context has no room for so many of the prompts.
    """
    _check_lengths(scenario, share)
    guess = mean_rate(rows_of(scenario.traffic)) if start_per_s is None else start_per_s
    tried: list[tuple[float, float]] = []
    good, bad, best = 0.0, float("inf"), None
    rate = guess
    while bad - good > precision * max(good, guess / 256):
        outcome = simulate(at_rate(scenario, rate))
        tried.append((rate, outcome.attainment))
        if outcome.attainment >= share:
            good, best = rate, outcome
            if outcome.span_s < scenario.goals.tpot_s:  # to come still faster is nothing that anybody would notice
                number = len(outcome.requests)
                raise ConfigError(f"{number} requests are good even if all come at once: no rate is found by so few")
        else:
            bad = rate
        if good == 0.0 and rate < guess / 128:
            break
        rate = good * 2 if bad == float("inf") else bad / 2 if good == 0.0 else (good + bad) / 2
    return Capacity(good, best.goodput_per_s if best is not None else 0.0, best, tuple(tried))


def _check_lengths(scenario: Scenario, share: float) -> None:
    rows, most = [row for _, row in arrivals(scenario.traffic)], scenario.fleet.max_model_len
    count = count_too_long(rows, most)
    if len(rows) - count < share * len(rows):
        raise ConfigError(
            f"share: {count:,} of {len(rows):,} prompts are too long for the model's {most:,} tokens, so that at no "
            f"rate are {share:.0%} good: make them shorter (--length-scale), or want fewer to be good (--share)"
        )
