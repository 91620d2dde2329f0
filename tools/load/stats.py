"""Figures made from request records: percentiles, throughput, goodput. Pure.

TTFT       sent -> first chunk with a token
TPOT       mean time of an output token after the first, one figure for each request; thoughts that a server hides
           were generated before the first, and are left out
ITL        gap between two neighbouring tokens, all requests together (0 inside a chunk of several tokens)
chunk gap  gap between two chunks: what a reader waits, whatever a chunk holds
e2e        sent -> end of the answer
goodput    requests per second that kept every limit given
errors     those alike are counted together: what differs between their texts, such as times and ids, is "..."
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .endpoint import RequestRecord


@dataclass(slots=True, frozen=True)
class Distribution:
    """The distribution of one figure over all its samples; a `count` of 0 leaves the rest None."""

    count: int
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks; the samples are sorted already."""
    if not ordered:
        raise ValueError("no samples")
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def describe(samples: Iterable[float]) -> Distribution:
    ordered = sorted(samples)
    if not ordered:
        return Distribution(0)
    return Distribution(
        count=len(ordered),
        mean=sum(ordered) / len(ordered),
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p99=percentile(ordered, 99),
        max=ordered[-1],
    )


@dataclass(slots=True, frozen=True)
class Slo:
    """Limits that make a request good. None: no such limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def is_met(self, record: RequestRecord) -> bool:
        """A single-token answer has no TPOT and cannot miss its limit."""
        if not record.is_ok or (ttft_s := record.ttft_s) is None:
            return False
        tpot_s = record.tpot_s
        if self.ttft_ms is not None and ttft_s * 1e3 > self.ttft_ms:
            return False
        return self.tpot_ms is None or tpot_s is None or tpot_s * 1e3 <= self.tpot_ms


@dataclass(slots=True, frozen=True)
class Summary:
    """One run's figures. Latencies over the requests that succeeded; milliseconds."""

    num_requests: int
    num_ok: int
    num_failed: int
    num_short: int  # answered with fewer tokens than asked for
    errors: dict[str, int]  # message -> how often, the most frequent first
    duration_s: float
    ttft_ms: Distribution
    tpot_ms: Distribution
    itl_ms: Distribution
    chunk_gap_ms: Distribution
    e2e_ms: Distribution
    num_prompt_tokens: int
    num_cached_tokens: int  # of them, from a prefix cache
    num_output_tokens: int
    num_hidden_tokens: int  # of them, thoughts that were not shown
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    num_good: int | None  # None: no limit was given
    goodput_per_s: float | None
    counted_by: dict[str, int]  # how a request's tokens were counted -> requests
    num_ids_differ: int  # requests with other than as many token ids as `usage` says
    num_resent: int  # requests sent anew, as a kept connection was closed already
    late_ms: Distribution  # open loop: sent after the planned time
    client_cpu_s: float
    client_cpu_us_per_token: float | None


def summarize(records: Sequence[RequestRecord], *, duration_s: float, client_cpu_s: float, slo: Slo) -> Summary:
    """`duration_s`: from the first request sent to the last answer's end."""
    ok = [record for record in records if record.is_ok]
    num_output_tokens = sum(record.num_output_tokens for record in ok)
    num_prompt_tokens = sum(record.num_prompt_tokens for record in ok)
    num_good = None if slo == Slo() else sum(slo.is_met(record) for record in records)
    per_s = 1 / duration_s if duration_s > 0 else 0.0
    return Summary(
        num_requests=len(records),
        num_ok=len(ok),
        num_failed=len(records) - len(ok),
        num_short=sum(record.num_output_tokens < record.num_asked_tokens for record in ok),
        errors=_count_errors(record for record in records if not record.is_ok),
        duration_s=duration_s,
        ttft_ms=describe_ms(record.ttft_s for record in ok),
        tpot_ms=describe_ms(record.tpot_s for record in ok),
        itl_ms=describe_ms(gap for record in ok for gap in record.token_gaps_s()),
        chunk_gap_ms=describe_ms(gap for record in ok for gap in record.chunk_gaps_s()),
        e2e_ms=describe_ms(record.e2e_s for record in ok),
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=sum(record.num_cached_tokens for record in ok),
        num_output_tokens=num_output_tokens,
        num_hidden_tokens=sum(record.num_hidden_tokens for record in ok),
        requests_per_s=len(ok) * per_s,
        prompt_tokens_per_s=num_prompt_tokens * per_s,
        output_tokens_per_s=num_output_tokens * per_s,
        num_good=num_good,
        goodput_per_s=None if num_good is None else num_good * per_s,
        counted_by=dict(Counter(record.counted_by for record in ok)),
        num_ids_differ=sum(record.ids_differ for record in ok),
        num_resent=sum(record.num_resent > 0 for record in records),
        late_ms=describe_ms(record.late_s for record in records),
        client_cpu_s=client_cpu_s,
        client_cpu_us_per_token=client_cpu_s * 1e6 / num_output_tokens if num_output_tokens else None,
    )


def _count_errors(failed: Iterable[RequestRecord]) -> dict[str, int]:
    alike: dict[tuple[object, ...], list[list[str]]] = {}
    for record in failed:
        words = (record.error or "not finished").split(" ")
        form = ("" if any(map(str.isdigit, word)) else word for word in words)
        alike.setdefault((record.status, *form), []).append(words)
    counts = Counter[str]()
    for texts in alike.values():
        counts[" ".join(_common(places) for places in zip(*texts, strict=True))] += len(texts)
    return dict(counts.most_common())


def _common(words: Sequence[str]) -> str:
    return words[0] if len(set(words)) == 1 else "..."


def describe_ms(samples_s: Iterable[float | None]) -> Distribution:
    """Return the distribution of what there is, in milliseconds."""
    return describe(sample * 1e3 for sample in samples_s if sample is not None)
