"""The search for each system's goodput: on curves whose answer is known."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvferry.benchmarks.goodput.search import Bench, Best, System
from kvferry.benchmarks.goodput.setup import SETUP


@dataclass
class Curve:
    """As much of a run's outcome as the search looks at: all is well up to a rate, and then ever less."""

    attainment: float
    goodput_per_s: float


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A split of p + d workers keeps min(2 p, 3 d) requests per second; a chunk of c tokens keeps c / 1000."""

    def run(self: Bench, system: System, rate_per_s: float) -> Curve:
        limit = min(2.0 * system.prefill, 3.0 * system.decode) if system.prefill else system.chunk / 1000
        attainment = 1.0 if rate_per_s <= limit else 0.9 * limit / rate_per_s
        return Curve(attainment, attainment * rate_per_s)

    monkeypatch.setattr(Bench, "run", run)
    return Bench(SETUP, "sample:mooncake-conversation", "second")


@pytest.mark.parametrize("guess", [0.3, 4.0, 40.0])
def test_capacity_is_found_from_any_guess(bench: Bench, guess: float) -> None:
    found = bench.capacity(System("slo", 3, 5), guess)
    assert found.rate_per_s == pytest.approx(6.0, rel=0.05) and found.rate_per_s <= 6.0
    assert found.goodput_per_s == pytest.approx(found.rate_per_s)


@pytest.mark.parametrize("starts", [(1,), (4,), (7,), (1, 7)])
def test_the_best_split_is_found_from_any_start(bench: Bench, starts: tuple[int, ...]) -> None:
    best: Best = bench.best_split(lambda p: System("slo", p, 8 - p), starts, 2.0)
    assert (best.system.prefill, best.system.decode) == (5, 3)
    assert best.goodput_per_s == pytest.approx(9.0, rel=0.05)
    assert best.system in [system for system, _ in best.tried]


def test_colocated_workers_get_the_chunk_that_does_best(bench: Bench) -> None:
    best = bench.best_chunk("least_loaded", 1.0, admits=False)
    assert best.system.chunk == max(SETUP.colocated_chunks)
    assert len(best.tried) == len(SETUP.colocated_chunks)


def test_a_system_that_keeps_nothing_has_no_goodput(bench: Bench) -> None:
    assert bench.capacity(System("slo", 0, 8, chunk=0), 3.0).goodput_per_s == 0.0
