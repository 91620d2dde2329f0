"""Recorded traffic on a live deployment, held to objectives: what the router benchmarks have in common.

    unloaded    one request at a time, of several lengths: first tokens by length, and the time of a token
    objectives  first token within max(a constant, so many times the prompt's unloaded one), tokens within so many times
                the unloaded one; both met: good
    replay      rows of a trace at their own times, answers of the recorded length to the token

A request that the router refused (429, 503) is not good, and is no failure: nobody waited for it.
"""

from __future__ import annotations

import argparse
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from kvferry.common.errors import ConfigError
from kvferry.models.default import default_model_dir
from kvferry.simulator.sources import trace_path
from kvferry.simulator.traffic import spread_ticks
from kvferry.tools.chaos.serve_system import System
from kvferry.tools.load.arguments import positive_float, positive_int
from kvferry.tools.load.endpoint import Endpoint, RequestRecord
from kvferry.tools.load.load import LoadResult, PlannedRequest, run_closed_loop, run_open_loop
from kvferry.tools.load.prompts import PromptSource
from kvferry.tools.load.stats import Distribution, describe
from kvferry.tools.load.traces import TraceRow, read_trace

REFUSALS = (429, 503)
VOCAB = 4096
_ANSWER_LEN = 16
_TPOT_STRETCH = 3.0
_WARM_UPS = 2
_TIMEOUT_S = 180.0


@dataclass(slots=True, frozen=True)
class Unloaded:
    """Of a system that has nothing else to do."""

    ttft_s: tuple[tuple[int, float], ...]  # (prompt tokens, seconds), by length
    tpot_s: float

    def first_token_s(self, num_tokens: int) -> float:
        """Straight lines between what was measured, and beyond it."""
        points = self.ttft_s
        if len(points) == 1:
            return points[0][1]
        index = min(max(1, bisect_left(points, (num_tokens, 0.0))), len(points) - 1)
        (low, low_s), (high, high_s) = points[index - 1], points[index]
        return max(points[0][1] / 2, low_s + (high_s - low_s) * (num_tokens - low) / (high - low))


@dataclass(slots=True, frozen=True)
class Objectives:
    """What makes a request good."""

    unloaded: Unloaded
    tpot_s: float
    ttft_s: float = 1.0
    ttft_stretch: float = 3.0

    @classmethod
    def from_unloaded(cls, unloaded: Unloaded) -> Objectives:
        return cls(unloaded, round(_TPOT_STRETCH * unloaded.tpot_s, 4))

    @property
    def flags(self) -> tuple[str, ...]:
        """For `kvferry serve`."""
        ttft, tpot = f"{self.ttft_s * 1e3:g}", f"{self.tpot_s * 1e3:g}"
        return (
            *("--ttft-objective-ms", ttft, "--ttft-stretch", f"{self.ttft_stretch:g}"),
            *("--tpot-objective-ms", tpot),
        )

    def ttft_limit_s(self, num_prompt_tokens: int) -> float:
        return max(self.ttft_s, self.ttft_stretch * self.unloaded.first_token_s(num_prompt_tokens))

    def is_good(self, record: RequestRecord, num_prompt_tokens: int) -> bool:
        if not record.is_ok or record.ttft_s is None or record.ttft_s > self.ttft_limit_s(num_prompt_tokens):
            return False
        return record.tpot_s is None or record.tpot_s <= self.tpot_s


@dataclass(slots=True, frozen=True)
class Figures:
    """One run of a load."""

    num_sent: int
    num_good: int
    num_refused: int
    num_failed: int  # neither answered nor refused
    errors: tuple[str, ...]
    span_s: float  # of the arrivals
    goodput_per_s: float
    attainment: float
    output_tokens_per_s: float
    ttft_ms: Distribution
    tpot_ms: Distribution
    late_ms: Distribution


def figures_of(load: LoadResult, rows: Sequence[TraceRow], objectives: Objectives, span_s: float) -> Figures:
    """`rows[i]` is what the request with index i was to be."""
    records = load.records
    answered = [record for record in records if record.is_ok]
    refused = sum(record.status in REFUSALS for record in records)
    good = sum(objectives.is_good(record, rows[record.index].num_prompt_tokens) for record in records)
    failed = [record for record in records if not record.is_ok and record.status not in REFUSALS]
    tokens = sum(record.num_output_tokens for record in answered)
    return Figures(
        num_sent=len(records),
        num_good=good,
        num_refused=refused,
        num_failed=len(failed),
        errors=tuple(sorted({record.error or "not finished" for record in failed}))[:5],
        span_s=span_s,
        goodput_per_s=good / span_s,
        attainment=good / len(records) if records else 0.0,
        output_tokens_per_s=tokens / load.duration_s if load.duration_s else 0.0,
        ttft_ms=describe(record.ttft_s * 1e3 for record in answered if record.ttft_s is not None),
        tpot_ms=describe(record.tpot_s * 1e3 for record in answered if record.tpot_s is not None),
        late_ms=describe(record.late_s * 1e3 for record in records),
    )


def endpoint_of(system: System) -> Endpoint:
    return Endpoint(
        system.base_url,
        model=system.model,
        ignore_eos=True,
        temperature=0.0,
        return_token_ids=False,
        timeout_s=_TIMEOUT_S,
    )


async def measure_unloaded(system: System, lengths: Sequence[int], *, num_each: int, seed: int) -> Unloaded:
    """One request at a time; medians."""
    endpoint, prompts = endpoint_of(system), PromptSource(seed, VOCAB)
    ttft_s: dict[int, list[float]] = {length: [] for length in sorted(lengths)}
    tpot_s: list[float] = []
    try:
        for _ in range(_WARM_UPS):
            await _send_checked(endpoint, prompts, min(lengths))
        for _ in range(num_each):
            for length, seen in ttft_s.items():
                record = await _send_checked(endpoint, prompts, length)
                seen.append(record.ttft_s or 0.0)
                tpot_s.append(record.tpot_s or 0.0)
    finally:
        endpoint.close()
    return Unloaded(tuple((length, median(seen)) for length, seen in ttft_s.items()), median(tpot_s))


async def _send_checked(endpoint: Endpoint, prompts: PromptSource, length: int) -> RequestRecord:
    record = await endpoint.send(prompts.make(length), _ANSWER_LEN)
    if not record.is_ok:
        raise ConfigError(f"a request of {length} tokens failed on an idle system: {record.error}")
    return record


def read_rows(flags: argparse.Namespace) -> list[TraceRow]:
    """Read the trace, as `add_load_flags` has it."""
    rows = read_trace(trace_path(flags.trace), length_scale=flags.length_scale)
    return list(spread_ticks(rows, last_too=True)) if flags.spread else rows


def rows_at_rate(rows: Sequence[TraceRow], rate_per_s: float, seconds: float, *, skip: int = 0) -> list[TraceRow]:
    """As many rows from `skip` on as come in that time; their own arrivals, stretched to the rate."""
    count = max(2, round(rate_per_s * seconds))
    cut = rows[skip : skip + count]
    if len(cut) < count:
        raise ConfigError(f"the trace has {len(rows)} requests, {skip + count} are needed: use a longer one")
    begin_s, span_s = cut[0].arrival_s, cut[-1].arrival_s - cut[0].arrival_s
    if span_s == 0.0:  # all came at once
        return [replace(row, arrival_s=number / rate_per_s) for number, row in enumerate(cut)]
    stretch = (count - 1) / rate_per_s / span_s
    return [replace(row, arrival_s=(row.arrival_s - begin_s) * stretch) for row in cut]


def plan_rows(rows: Sequence[TraceRow], seed: int) -> Iterator[PlannedRequest]:
    """Prompts share what the trace says they share. Another seed: other prompts, which no cache has seen."""
    prompts = PromptSource(seed, VOCAB)
    for index, row in enumerate(rows):
        yield PlannedRequest(index, prompts.make_for(row), row.num_output_tokens, row.arrival_s)


def sending(endpoint: Endpoint) -> Callable[[PlannedRequest], Awaitable[RequestRecord]]:
    """Return what sends a planned request there."""

    async def send(request: PlannedRequest) -> RequestRecord:
        return await endpoint.send(request.prompt, request.num_output_tokens, index=request.index)

    return send


async def replay(system: System, rows: Sequence[TraceRow], *, seed: int) -> LoadResult:
    """Each row at its time."""
    endpoint = endpoint_of(system)
    try:
        return await run_open_loop(list(plan_rows(rows, seed)), sending(endpoint))
    finally:
        endpoint.close()


async def requests_per_s(
    system: System, rows: Sequence[TraceRow], *, in_flight: int, seconds: float, seed: int
) -> float:
    """What the system can answer, with so many requests in flight."""
    endpoint = endpoint_of(system)
    try:
        load = await run_closed_loop(list(plan_rows(rows, seed)), sending(endpoint), in_flight, seconds)
    finally:
        endpoint.close()
    answered = sum(record.is_ok for record in load.records)
    if not answered:
        raise ConfigError(f"no request was answered: {load.records[0].error if load.records else 'none was sent'}")
    return answered / load.duration_s


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """What is sent, and to which model: the flags that comparisons on a scaled trace share."""
    add = parser.add_argument
    add("--trace", default="sample:mooncake-conversation", help="a name, sample:NAME or a file (default: %(default)s)")
    add(
        "--spread",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="arrivals of one tick of the trace's clock",
    )
    add("--length-scale", type=positive_float, default=1 / 16, help="(default: %(default)g)")
    add_unloaded_flag(parser)
    add_system_flags(parser)


def add_unloaded_flag(parser: argparse.ArgumentParser) -> None:
    text = "requests of each length on an idle system (default: %(default)s)"
    parser.add_argument("--unloaded", type=positive_int, default=5, help=text)


def add_system_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of all that start deployments of their own."""
    add = parser.add_argument
    add("--serve-flags", default="", metavar="TEXT", help="further flags of all deployments, in one argument")
    add("--model", type=Path, default=default_model_dir(), metavar="DIR", help="(default: the built-in one)")
    add("--seed", type=int, default=0)
    add("--log-dir", type=Path)
