from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.tools.load.endpoint import RequestRecord
from kvferry.tools.load.stats import Distribution, Slo, describe, percentile, summarize


def finished(
    ttft_s: float, gaps_s: list[float], *, asked: int | None = None, error: str | None = None
) -> RequestRecord:
    times = [ttft_s]
    for gap in gaps_s:
        times.append(times[-1] + gap)
    return RequestRecord(
        index=0,
        sent_s=0.0,
        num_asked_tokens=asked or len(times),
        finished_s=times[-1],
        chunk_times_s=times,
        chunk_tokens=[1] * len(times),
        num_prompt_tokens=10,
        num_output_tokens=len(times),
        counted_by="token_ids",
        error=error,
    )


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_percentile_agrees_with_numpy(samples: list[float], percent: float) -> None:
    expected = float(np.percentile(samples, percent))
    assert math.isclose(percentile(sorted(samples), percent), expected, rel_tol=1e-9, abs_tol=1e-6)


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


def test_distribution_of_nothing_has_a_count_alone() -> None:
    assert describe([]) == Distribution(0)


def test_distribution_of_known_samples() -> None:
    expected = Distribution(count=101, mean=50.0, p50=50.0, p90=90.0, p99=99.0, max=100.0)
    assert describe(reversed(range(101))) == expected


def test_summary_counts_tokens_and_times_of_the_requests_that_succeeded() -> None:
    records = [finished(0.1, [0.02, 0.04]), finished(0.3, [0.03]), finished(0.2, [0.5], error="HTTP 500: x")]
    summary = summarize(records, duration_s=2.0, client_cpu_s=0.001, slo=Slo())
    assert (summary.num_requests, summary.num_ok, summary.num_failed) == (3, 2, 1)
    assert summary.errors == {"HTTP 500: x": 1}
    assert summary.ttft_ms.p50 == pytest.approx(200)
    assert summary.tpot_ms.max == pytest.approx(30)
    assert summary.itl_ms.count == 3
    assert summary.itl_ms.max == pytest.approx(40)
    assert (summary.num_prompt_tokens, summary.num_output_tokens) == (20, 5)
    assert (summary.requests_per_s, summary.output_tokens_per_s) == (1.0, 2.5)
    assert summary.client_cpu_us_per_token == pytest.approx(200)
    assert summary.num_good is None
    assert summary.goodput_per_s is None


def test_errors_that_differ_in_their_figures_alone_are_counted_together() -> None:
    def failed(status: int, error: str) -> RequestRecord:
        record = finished(0.1, [], error=error)
        record.status = status
        return record

    texts = [f"{number} requests wait: the limit is 1 s" for number in (3, 4, 12)]
    records = [failed(429, f"HTTP 429: {text}") for text in texts]
    records += [failed(503, "HTTP 503: 3 requests wait: the limit is 1 s"), failed(429, "HTTP 429: the queue is full")]
    assert summarize(records, duration_s=1.0, client_cpu_s=0.0, slo=Slo()).errors == {
        "HTTP 429: ... requests wait: the limit is 1 s": 3,
        "HTTP 503: 3 requests wait: the limit is 1 s": 1,
        "HTTP 429: the queue is full": 1,
    }


def test_good_requests_keep_every_limit_and_did_not_fail() -> None:
    records = [
        finished(0.1, [0.02]),
        finished(0.9, [0.02]),  # first token too late
        finished(0.1, [0.2]),  # tokens too slow
        finished(0.1, []),  # one token: no TPOT to miss
        finished(0.1, [0.02], error="cut"),
    ]
    summary = summarize(records, duration_s=4.0, client_cpu_s=0.0, slo=Slo(ttft_ms=500, tpot_ms=50))
    assert summary.num_good == 2
    assert summary.goodput_per_s == 0.5


def test_limit_is_still_kept_when_met_exactly() -> None:
    assert Slo(ttft_ms=500).is_met(finished(0.5, []))


def test_an_answer_that_failed_before_its_first_token_is_no_good_one() -> None:
    record = finished(0.1, [0.1], error="stream without a token")
    record.chunk_times_s.clear()
    assert not Slo(ttft_ms=100).is_met(record)


def test_short_answers_are_counted() -> None:
    records = [finished(0.1, [0.1]), finished(0.1, [0.1], asked=5)]
    assert summarize(records, duration_s=1.0, client_cpu_s=0.0, slo=Slo()).num_short == 1


def test_run_without_requests_has_figures_of_zero() -> None:
    summary = summarize([], duration_s=0.0, client_cpu_s=0.0, slo=Slo(ttft_ms=1))
    assert (summary.requests_per_s, summary.goodput_per_s, summary.client_cpu_us_per_token) == (0.0, 0.0, None)
