import pytest

from kvferry.benchmarks.shared.live_load import Objectives, Unloaded, figures_of, plan_rows, rows_at_rate
from kvferry.common.errors import ConfigError
from kvferry.tools.load.endpoint import RequestRecord
from kvferry.tools.load.load import LoadResult
from kvferry.tools.load.traces import TraceRow

UNLOADED = Unloaded(((100, 0.1), (1000, 1.0)), tpot_s=0.01)


def _record(index: int, *, ttft_s: float, tpot_s: float = 0.01, status: int = 200) -> RequestRecord:
    record = RequestRecord(index, 10.0, 3, finished_s=20.0, status=status)
    if status == 200:
        record.chunk_times_s = [10.0 + ttft_s, 10.0 + ttft_s + 2 * tpot_s]
        record.chunk_tokens = [1, 2]
        record.num_output_tokens = 3
    else:
        record.error = f"HTTP {status}"
    return record


def test_unloaded_first_tokens_are_read_between_and_beyond_the_measured_lengths() -> None:
    assert UNLOADED.first_token_s(550) == pytest.approx(0.55)
    assert UNLOADED.first_token_s(2000) == pytest.approx(2.0)
    assert UNLOADED.first_token_s(10) == pytest.approx(0.05)  # never below half of the shortest


def test_a_long_prompt_has_more_time_for_its_first_token() -> None:
    objectives = Objectives.from_unloaded(UNLOADED)
    assert objectives.ttft_limit_s(100) == 1.0
    assert objectives.ttft_limit_s(1000) == pytest.approx(3.0)


def test_both_objectives_make_a_request_good() -> None:
    objectives = Objectives.from_unloaded(UNLOADED)
    assert objectives.is_good(_record(0, ttft_s=0.9, tpot_s=0.03 - 1e-9), 100)
    assert not objectives.is_good(_record(0, ttft_s=1.1), 100)
    assert not objectives.is_good(_record(0, ttft_s=0.9, tpot_s=0.04), 100)
    assert not objectives.is_good(_record(0, ttft_s=0.1, status=500), 100)


def test_the_flags_are_the_objectives() -> None:
    assert Objectives(UNLOADED, 0.03).flags == (
        *("--ttft-objective-ms", "1000", "--ttft-stretch", "3"),
        *("--tpot-objective-ms", "30"),
    )


def test_a_refused_request_is_neither_good_nor_failed() -> None:
    rows = [TraceRow(float(index), 100, 3) for index in range(3)]
    records = [_record(0, ttft_s=0.5), _record(1, ttft_s=0, status=429), _record(2, ttft_s=0, status=500)]
    figures = figures_of(LoadResult(records, 10.0, 0.0), rows, Objectives.from_unloaded(UNLOADED), span_s=2.0)
    assert (figures.num_good, figures.num_refused, figures.num_failed) == (1, 1, 1)
    assert figures.goodput_per_s == 0.5
    assert figures.errors == ("HTTP 500",)
    assert figures.output_tokens_per_s == pytest.approx(0.3)


def test_rows_keep_their_pattern_at_another_rate() -> None:
    rows = [TraceRow(at_s, 10, 10) for at_s in (5.0, 6.0, 10.0, 11.0)]
    cut = rows_at_rate(rows, rate_per_s=2.0, seconds=1.5, skip=1)
    assert [row.arrival_s for row in cut] == pytest.approx([0.0, 0.8, 1.0])


def test_rows_that_came_at_once_come_at_the_rate() -> None:
    cut = rows_at_rate([TraceRow(3.0, 10, 10)] * 4, rate_per_s=2.0, seconds=2.0)
    assert [row.arrival_s for row in cut] == [0.0, 0.5, 1.0, 1.5]


def test_a_trace_that_is_too_short_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 requests, 4 are needed"):
        rows_at_rate([TraceRow(0.0, 1, 1), TraceRow(1.0, 1, 1)], rate_per_s=1.0, seconds=4.0)


def test_another_seed_makes_other_prompts_that_share_the_same_blocks() -> None:
    rows = [TraceRow(0.0, 40, 1, (7, 8), 16), TraceRow(1.0, 40, 1, (7, 9), 16)]
    first, second = (list(plan_rows(rows, seed)) for seed in (1, 2))
    assert list(first[0].prompt)[:16] == list(first[1].prompt)[:16]
    assert list(first[0].prompt)[16:32] != list(first[1].prompt)[16:32]
    assert list(first[0].prompt)[:16] != list(second[0].prompt)[:16]
