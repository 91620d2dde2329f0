"""The day of traffic, the oracle, and a short day through the autoscaler."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import kvferry
from kvferry.benchmarks.autoscale import autoscale
from kvferry.benchmarks.autoscale.autoscale import _oscillations
from kvferry.benchmarks.autoscale.day import Day, Spike, arrivals
from kvferry.benchmarks.autoscale.oracle import Oracle
from kvferry.benchmarks.autoscale.records import Minute, ModelTimes
from kvferry.router.autoscaler.scale_types import Counts, WorkerLimits
from kvferry.router.state.objectives import Objectives
from kvferry.sizing.hardware import gpu_named
from kvferry.sizing.shapes import model_named
from kvferry.sizing.steps import Roofline
from kvferry.tools.load.traces import TraceRow

ROWS = [TraceRow(0.0, 400 + 37 * n % 900, 50 + 13 * n % 200) for n in range(200)]
MODEL = Roofline(gpu_named("H200"), model_named("70B"), 2)
OBJECTIVES = Objectives(ttft_s=1.0, tpot_s=0.05)


def test_the_rate_swings_over_the_day_and_jumps_in_the_spike() -> None:
    day = Day(100.0, 4.0, spike=Spike(36_000.0, 600.0, 10.0))
    rates = [Day(100.0, 4.0).rate(60.0 * minute) for minute in range(1440)]
    assert max(rates) / min(rates) == pytest.approx(4.0, rel=1e-3)
    assert sum(rates) / 1440 == pytest.approx(100.0, rel=1e-3)
    assert day.rate(36_000.0) == pytest.approx(10 * day.rate(35_999.9), rel=1e-3)
    assert day.rate(36_600.0) == pytest.approx(day.rate(36_599.9) / 10, rel=1e-3)


def test_arrivals_follow_the_rate_and_repeat_with_the_seed() -> None:
    day = Day(20.0, 4.0, begin_s=36_000.0, duration_s=600.0, spike=Spike(36_200.0, 100.0, 10.0))
    found = list(arrivals(day, ROWS, seed=1))
    assert found == list(arrivals(day, ROWS, seed=1)) != list(arrivals(day, ROWS, seed=2))
    assert [at for at, *_ in found] == sorted(at for at, *_ in found)
    for start in (36_000.0, 36_200.0, 36_300.0):
        count = sum(start <= at < start + 100.0 for at, *_ in found)
        expected = 100.0 * day.rate(start + 50.0)
        assert abs(count - expected) < 5 * math.sqrt(expected)


def test_the_oracle_has_the_least_workers_whatever_it_said_before() -> None:
    times, limits = ModelTimes(MODEL), WorkerLimits(300_000, 256)
    quiet = Minute(0.0, prompts=[(float(n), 1000) for n in range(60)], crowd=[(10.0, 10_000.0, 0.03)] * 240)
    busy = Minute(60.0, prompts=[(60.0 + n / 60, 1000) for n in range(3600)], crowd=[(900.0, 1e6, 0.03)] * 240)
    oracle = Oracle(times, limits, OBJECTIVES, 0.99)
    first = [oracle.least(minute) for minute in (quiet, busy, quiet)]
    assert first[0] == first[2] == Counts(1, 1)
    service_s = times.prefill_s(1000, 0)
    assert first[1].prefill == pytest.approx(60 * service_s, abs=1.0)
    step_s = times.decode_step_s(900 // first[1].decode, 10**6 // first[1].decode)
    assert first[1].decode >= math.ceil(1e6 / 300_000 * step_s / 0.03)  # slower steps, more of them at once
    assert Oracle(times, limits, OBJECTIVES, 0.99).least(busy) == first[1]


def test_growth_soon_after_a_shrink_is_oscillation_but_in_the_spike() -> None:
    changes = [(0.0, 5, 4), (200.0, 4, 5), (1000.0, 5, 4), (1400.0, 4, 6)]
    assert _oscillations(changes, None) == 1
    assert _oscillations(changes, Spike(190.0, 60.0, 10.0)) == 0


def test_a_short_day_keeps_its_objectives(tmp_path: Path) -> None:
    day = Day(12.0, 4.0, begin_s=36_000.0, duration_s=300.0)
    result = autoscale.run_day(day, ROWS, MODEL, OBJECTIVES)
    assert len(result.minutes) == 5
    assert result.kept is not None and result.kept > 0.98
    assert result.num_grown_after_shrink == 0
    assert result.cost is not None and 0.8 < result.cost < 3.0


def test_the_program_writes_its_record_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:00:{n % 60:02d}.0000000,{300 + n},{20 + n}" for n in range(50)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    argv = ["--trace", str(trace), "--rate", "4", "--begin-hour", "9", "--hours", "0.05", "--spike-hour", "-1"]
    argv += ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg")]
    code = autoscale.main(argv)  # in so few minutes the fleet's size is chance
    record = json.loads((tmp_path / "a.json").read_text())
    assert code == (0 if all(bar["is_met"] for bar in record["bars"]) else 1)
    assert record["environment"]["command"].endswith(str(tmp_path / "a.svg"))
    assert len(record["minutes"]) == 3 and len(record["minutes"][0]) == len(record["minute_columns"])
    assert (tmp_path / "a.svg").stat().st_size > 1000
    assert "GPU-hours / oracle" in capsys.readouterr().out
    assert autoscale.main(["--trace", str(tmp_path / "none.csv")]) == 2


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"kept": 0.5}, ["both objectives met"]),
        ({"kept": None}, ["both objectives met"]),
        ({"gpu_hours": 120.0}, ["GPU-hours / oracle"]),
        ({"num_grown_after_shrink": 1}, ["growth within 5 min after a shrink"]),
    ],
)
def test_a_missed_bar_is_the_exit_code(
    change: dict[str, object], missed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = autoscale.DayResult(100, 0.995, 110.0, 100.0, 0, 0, 0, 0, (), ())
    monkeypatch.setattr(autoscale, "run_day", lambda *args, **kwargs: replace(found, **change))  # type: ignore[arg-type]
    trace, path = "simulator/traces/azure-2023-conv.csv", tmp_path / "a.json"
    root = Path(kvferry.__file__).resolve().parent
    assert autoscale.main(["--trace", str(root / trace), "--json", str(path)]) == (1 if missed else 0)
    bars = json.loads(path.read_text())["bars"]
    assert [bar["what"] for bar in bars if not bar["is_met"]] == missed
