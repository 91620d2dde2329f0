from statistics import fmean, median

import pytest

from kvferry.benchmarks.lowload.report import Pair, Phases, bootstrap, ratio, ratio_bars
from kvferry.tools.chaos.serve_system import LogLine

SAMPLES = [(1.0, 2.0), (2.0, 2.0), (3.0, 2.0)]


def test_a_ratio_is_of_the_means_of_both_sides() -> None:
    assert ratio(SAMPLES, median) == 1.0
    assert ratio([(1.0, 2.0), (5.0, 2.0)], fmean) == 1.5


def test_the_bootstrap_holds_the_ratio_and_repeats_itself() -> None:
    low, high = bootstrap(SAMPLES, fmean, seed=1)
    assert low < ratio(SAMPLES, fmean) < high
    assert (low, high) == bootstrap(SAMPLES, fmean, seed=1)


def test_equal_pairs_leave_no_doubt() -> None:
    assert bootstrap([(1.0, 1.0)] * 5, median, seed=0) == (1.0, 1.0)


def test_medians_and_means_of_both_figures_are_held_to_the_bar() -> None:
    bars = ratio_bars("alone", [Pair((1.0, 1.0), (0.02, 0.01))] * 4, seed=0)
    judged = {bar.what: bar.is_met for bar in bars if bar.bar is not None}
    assert judged == {
        "alone: TTFT p50": True,
        "alone: TTFT mean": True,
        "alone: TPOT p50": False,
        "alone: TPOT mean": False,
    }


def test_phases_are_medians_of_the_log_and_count_handoffs() -> None:
    lines = [
        LogLine("request_finished", 0.0, {"ttft_ms": 10.0, "queue_ms": 1.0, "prefill_workers": ["-"]}),
        LogLine("request_finished", 1.0, {"ttft_ms": 30.0, "prefill_workers": ["p-0"]}),
    ]
    phases = Phases.of("slo", "alone", "128/32", lines)
    assert phases.num_handed_over == 1
    assert phases.medians_ms == pytest.approx({"ttft_ms": 20.0, "queue_ms": 1.0})
