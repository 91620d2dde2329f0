"""Makes the router's counters and histograms: their names, buckets and label sets, each series there from the start."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate, product

from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import HistogramMetricFamily, Metric

from .labels import CLOSED

TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LONG_BUCKETS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
TRANSFER_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.4, 2, 4, 10)
TOKEN_BUCKETS = tuple(float(first * 10**power) for power in range(6) for first in (1, 2, 5))  # to 500,000
BYTES_BUCKETS = tuple(float(4**power * 2**12) for power in range(12))  # 4 KiB to 16 GiB


class GapHistogram:
    """Gaps between tokens: observed for every token, so without prometheus_client's lock and label look-up."""

    __slots__ = ("_counts", "_sum_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(GAP_BUCKETS) + 1)
        self._sum_s = 0.0

    def observe(self, gap_s: float) -> None:
        self._counts[bisect_left(GAP_BUCKETS, gap_s)] += 1
        self._sum_s += gap_s

    def family(self) -> Metric:
        bounds = [*map(_bound, GAP_BUCKETS), "+Inf"]
        buckets = list(zip(bounds, map(float, accumulate(self._counts)), strict=True))
        name = "kvferry_inter_token_latency_seconds"
        return HistogramMetricFamily(
            name, "Gap between two tokens of one choice", buckets=buckets, sum_value=self._sum_s
        )


def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
    return Histogram(f"kvferry_{name}", text, buckets=buckets, registry=None)


def counter(name: str, text: str, **labels: str) -> Counter:
    """`labels`: name and which closed set its values are of."""
    return counter_of(name, text, {label: tuple(sorted(CLOSED[which])) for label, which in labels.items()})


def counter_of(name: str, text: str, labels: Mapping[str, tuple[str, ...]]) -> Counter:
    """`labels`: name and values. Every series is there from the start, at 0."""
    counter = Counter(f"kvferry_{name}", text, tuple(labels), registry=None)
    for values in product(*labels.values()) if labels else ():
        counter.labels(*values)
    return counter


def observe_between(histogram: Histogram, stamps: Mapping[str, float], begin: str, end: str) -> None:
    if begin in stamps and end in stamps:
        histogram.observe(max(stamps[end] - stamps[begin], 0.0))


def _bound(value: float) -> str:
    return repr(float(value))
