"""The search for each system's goodput: on curves whose answer is known."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvferry.benchmarks.goodput import goodput
from kvferry.benchmarks.goodput.report import TraceResult, bars
from kvferry.benchmarks.goodput.search import Bench, Best, System
from kvferry.benchmarks.goodput.setup import SETUP
from kvferry.common.errors import ConfigError
from kvferry.simulator import Scenario


@dataclass
class Curve:
    """As much of a run's outcome as the search looks at: all is well up to a rate, and then ever less."""

    attainment: float
    goodput_per_s: float
    span_s: float = 60.0


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A split of p + d workers keeps min(2 p, 3 d) requests per second; a chunk of c tokens keeps c / 1000."""

    def run(scenario: Scenario) -> Curve:
        fleet, rate_per_s = scenario.fleet, scenario.traffic.rate_per_s
        assert rate_per_s is not None
        limit = min(2.0 * fleet.prefill, 3.0 * fleet.decode) if fleet.prefill else fleet.decode_tokens / 1000
        attainment = 1.0 if rate_per_s <= limit else 0.9 * limit / rate_per_s
        return Curve(attainment, attainment * rate_per_s)

    monkeypatch.setattr(importlib.import_module("kvferry.simulator.simulate"), "simulate", run)
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
    best = bench.best_chunk(1.0, admits=False)
    assert best.system.chunk == max(SETUP.colocated_chunks)
    assert len(best.tried) == len(SETUP.colocated_chunks)


def test_a_system_that_keeps_nothing_has_no_goodput(bench: Bench) -> None:
    assert bench.capacity(System("slo", 0, 8, chunk=0), 3.0).goodput_per_s == 0.0


def test_so_few_requests_that_no_rate_is_too_high_are_told() -> None:
    few = Bench(SETUP, "sample:azure-2023-conv", "second", 3)
    with pytest.raises(ConfigError, match="3 requests are good even if all come at once"):
        few.capacity(System("slo", 4, 4), 3.0)


def _best(policy: str, prefill: int, goodput_per_s: float) -> Best:
    return Best(System(policy, prefill, 8 - prefill), goodput_per_s, goodput_per_s, ())


def test_baselines_without_goodput_are_nothing_to_compare_with() -> None:
    best = (_best("slo", 4, 3.0), _best("least_loaded", 0, 0.0), _best("kv_cost", 4, 0.0))
    found = bars([TraceResult("a trace", "second", 6.0, best, ())])
    assert [(bar.value, bar.is_met) for bar in found] == [(None, False), (None, True), (2.0, True)]


def test_the_command_is_kept_as_it_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    best = (_best("slo", 4, 6.0), _best("least_loaded", 0, 2.0))
    monkeypatch.setattr(goodput, "run", lambda *_: [TraceResult("a trace", "second", 6.0, best, ())])
    words = ["--traces", "sample:azure-2023-conv", "--processes", "1", "--json", f"{tmp_path}/x.json"]
    assert goodput.main([*words, "--plot", f"{tmp_path}/x.svg"]) == 0
    kept = json.loads((tmp_path / "x.json").read_text())["environment"]["command"]
    assert kept == f"python -m kvferry.benchmarks.goodput {' '.join(words)} --plot {tmp_path}/x.svg"
