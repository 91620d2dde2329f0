import pytest

from kvferry.benchmarks.fidelity.report import Comparison, bars_of
from kvferry.benchmarks.shared.live_load import Figures
from kvferry.benchmarks.shared.twin import SimulatedFigures
from kvferry.tools.load.stats import describe


def _simulated(factor: float) -> SimulatedFigures:
    ttft, tpot = describe([100.0 * factor, 300.0 * factor]), describe([10.0 * factor])
    return SimulatedFigures(2, 2, 0, 1.0, 50.0 / factor, ttft, tpot, 0, 0.0)


def _comparison(*factors: float) -> Comparison:
    live = Figures(2, 2, 0, 0, (), 2.0, 1.0, 1.0, 50.0, describe([100.0, 300.0]), describe([10.0]), describe([0.0]))
    runs = tuple(_simulated(factor) for factor in factors)
    return Comparison("slo", "1+1", 1.0, 2.0, (), live, runs, runs, (100.0, 300.0), (10.0,))


def test_the_error_is_a_share_of_the_live_figure() -> None:
    bars = {bar.what: bar for bar in bars_of(_comparison(1.05))}
    error = bars["slo: TTFT p50, |simulated / live - 1|"]
    assert error.value == pytest.approx(0.05) and error.is_met


def test_tails_have_more_room_than_medians() -> None:
    bars = {bar.what: bar for bar in bars_of(_comparison(1.2))}
    assert not bars["slo: TTFT p50, |simulated / live - 1|"].is_met
    assert bars["slo: TTFT p99, |simulated / live - 1|"].is_met


def test_the_seeds_of_the_noise_are_summed_up_by_their_median() -> None:
    bars = {bar.what: bar for bar in bars_of(_comparison(1.0, 1.01, 5.0))}
    assert bars["slo: TPOT p50, |simulated / live - 1|"].value == pytest.approx(0.01)
