import pytest

from kvferry.benchmarks.fidelity.fidelity import live_ttft_s
from kvferry.benchmarks.fidelity.report import Comparison, bars_of
from kvferry.benchmarks.shared.live_load import Figures
from kvferry.benchmarks.shared.twin import SimulatedFigures
from kvferry.common.errors import ConfigError
from kvferry.tools.load.endpoint import RequestRecord
from kvferry.tools.load.load import LoadResult
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


def _lone(first_token_s: float | None) -> LoadResult:
    record = RequestRecord(0, 10.0, 2, finished_s=20.0, status=200)
    if first_token_s is None:
        record.status, record.error = 503, "HTTP 503"
    else:
        record.chunk_times_s = [10.0 + first_token_s]
    return LoadResult([record], 10.0, 0.0)


def test_a_lone_request_without_an_answer_is_told_and_takes_no_time_off() -> None:
    assert live_ttft_s([_lone(0.5), _lone(1.0)]) == [0.5, 1.0]
    with pytest.raises(ConfigError, match="1 of 2 lone requests were not answered: HTTP 503"):
        live_ttft_s([_lone(0.5), _lone(None)])
