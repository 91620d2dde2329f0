"""Traffic turns a trace into the requests of a run: scaled, spiked, stretched, repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, count, groupby, pairwise, zip_longest
from math import cos, pi
from random import Random

from ..common.errors import ConfigError
from ..tools.load.traces import TraceRow, read_trace
from .scenario import Traffic
from .sources import trace_path

_DAY_S = 86400.0
_LONGEST_S = 31 * _DAY_S  # of virtual time: an hour of a core for the smallest fleet


@lru_cache(maxsize=8)
def _read(trace: str) -> tuple[TraceRow, ...]:
    return spread_ticks(read_trace(trace_path(trace)))


def rows_of(traffic: Traffic) -> tuple[TraceRow, ...]:
    """The part of the trace that is used, from 0 s on."""
    rows = _read(traffic.trace) if isinstance(traffic.trace, str) else spread_ticks(traffic.trace)
    if not rows:
        raise ConfigError("the trace has no requests")
    if traffic.part != "whole":
        half_s = rows[-1].arrival_s / 2
        rows = tuple(row for row in rows if (row.arrival_s >= half_s) == (traffic.part == "second"))
        if not rows:
            raise ConfigError(f"the {traffic.part} half of the trace has no requests")
        rows = tuple(replace(row, arrival_s=row.arrival_s - rows[0].arrival_s) for row in rows)
    if traffic.length_scale != 1.0:
        rows = tuple(row.scaled(length=traffic.length_scale, rate=1.0) for row in rows)
    return rows


def spread_ticks(rows: Sequence[TraceRow], *, last_too: bool = False) -> tuple[TraceRow, ...]:
    """Spread the arrivals of one tick of the recording's clock (Mooncake's ticks every three seconds) evenly at random
    until the next one, in the recorded order: they did not all come at its beginning. `last_too`: those of the last
    tick as well, which is as long as the one before.
    """
    random, spread, length_s = Random(0), list[TraceRow](), 0.0
    ticks = [list(tick) for _, tick in groupby(rows, key=lambda row: row.arrival_s)]
    for tick, following in zip_longest(ticks, ticks[1:]):
        begin_s = tick[0].arrival_s
        if following:
            length_s = following[0].arrival_s - begin_s
        elif not last_too:
            length_s = 0.0
        offsets = sorted(random.random() for _ in tick) if len(tick) > 1 else [0.0]
        spread += [replace(row, arrival_s=begin_s + at * length_s) for row, at in zip(tick, offsets, strict=True)]
    return tuple(spread)


def mean_rate(rows: tuple[TraceRow, ...]) -> float:
    """Requests per second, as recorded."""
    span_s = rows[-1].arrival_s
    return (len(rows) - 1) / span_s if span_s > 0 else float(len(rows))


def arrivals(traffic: Traffic) -> Iterator[tuple[float, TraceRow]]:
    """Requests in order of arrival; one without output tokens wants an embedding."""
    if not 0 <= traffic.embedding_share <= 1:
        raise ConfigError(f"embedding_share = {traffic.embedding_share:g} is no share: from 0 to 1")
    rows = rows_of(traffic)
    wanted = len(rows) if traffic.num_requests is None else traffic.num_requests
    used = rows[:wanted]  # a recording's first minutes may be slower than the rest
    rate = mean_rate(used)
    wished = rate if traffic.rate_per_s is None else traffic.rate_per_s
    if wished != rate and traffic.arrivals == "recorded" and len(used) > 1 and not used[-1].arrival_s:
        raise ConfigError(
            f"rate: the trace's {len(used):,} requests all come at one time, which no stretching brings to "
            f"{wished:g}/s: let them come at random (--poisson)"
        )
    gaps = _poisson(wished, traffic.seed) if traffic.arrivals == "poisson" else _recorded(rows, rate / wished)
    now_s, embeds = 0.0, Random(f"embeddings {traffic.seed}")
    for _, gap_s, row in zip(range(wanted), gaps, _repeated(rows), strict=False):
        now_s += gap_s / _intensity(traffic, now_s)
        is_embedding = traffic.embedding_share > embeds.random()
        yield now_s, replace(row, num_output_tokens=0) if is_embedding else row


def check_span(traffic: Traffic) -> None:
    """Raise ConfigError where requests come so late that nobody waits for the run: idle workers' heartbeats take time.

    Arrivals alone are a small part of what their requests take to simulate, so all are looked at before the first.
    """
    for time_s, _ in arrivals(traffic):
        if time_s > _LONGEST_S:
            raise ConfigError(
                f"rate: a request comes {time_s / _DAY_S:.3g} days after the first one; at most "
                f"{_LONGEST_S / _DAY_S:.0f} are simulated: let them come faster (--rate), or fewer (--requests)"
            )


def _poisson(rate: float, seed: int) -> Iterator[float]:
    random = Random(seed)
    while True:
        yield random.expovariate(rate)


def _recorded(rows: tuple[TraceRow, ...], stretch: float) -> Iterator[float]:
    """Gaps between arrivals; between two rounds the mean one."""
    mean_s = stretch / mean_rate(rows)
    yield 0.0
    while True:
        for before, after in pairwise(rows):
            yield (after.arrival_s - before.arrival_s) * stretch
        yield mean_s


def _repeated(rows: tuple[TraceRow, ...]) -> Iterator[TraceRow]:
    """Round after round, the prefixes of each being other ones."""
    ids = {0, *chain.from_iterable(row.block_ids for row in rows)}
    num_ids = 1 + max(ids) - min(ids)
    yield from rows
    for number in count(1):
        for row in rows:
            yield replace(row, block_ids=tuple(block + number * num_ids for block in row.block_ids))


def _intensity(traffic: Traffic, now_s: float) -> float:
    """Return how many times as dense arrivals are at a time."""
    intensity = 1.0
    day = traffic.day
    if day is not None:
        intensity = day.low + (1 - day.low) * (1 - cos(2 * pi * now_s / day.period_s)) / 2
    for spike in traffic.spikes:
        if spike.at_s <= now_s < spike.at_s + spike.duration_s:
            intensity *= spike.factor
    return intensity
