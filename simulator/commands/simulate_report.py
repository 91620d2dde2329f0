"""Runs are shown as a table on the terminal, JSON and a plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ...tools.load.environment import Environment
from ...tools.load.json_file import save_json
from ...tools.load.plot import COLOURS, new_figure, save_figure
from ...tools.load.report import milliseconds
from ..outcome import Outcome, RequestOutcome
from ..scenario import Scenario

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BINS = 40
_COLUMNS = (
    *("good", "goodput/s", "refused", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99"),
    *("hits", "queue p99", "busy", "GPUs", "GPU-h", "USD"),
)
_CLOCK_PER_S = 1000.0  # ticks of Mooncake's clock, which tells no requests apart that come more often

Run = tuple[str, Scenario, Outcome]  # with a name


def print_runs(runs: Sequence[Run], console: Console) -> None:
    table = Table(title=in_words(runs[0][1], runs[0][2]), title_justify="left")
    table.add_column("")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for name, scenario, outcome in runs:
        table.add_row(name, *_cells(scenario, outcome))
    console.print(table)
    for name, scenario, outcome in runs:
        for note in _notes(scenario, outcome):
            console.print(f"{name}: {note}", markup=False)


def _notes(scenario: Scenario, outcome: Outcome) -> Iterator[str]:
    """Say what no column has room for, most of it where something was not as it was wished."""
    if drafted := outcome.num_draft_tokens:
        yield f"of {drafted:,} drafted tokens {outcome.num_accepted_tokens / drafted:.1%} were right"
    if (embedded := outcome.embedding_ms).count:
        times = " / ".join(milliseconds(value) for value in (embedded.p50, embedded.p90, embedded.p99))
        yield f"{embedded.count:,} embeddings, p50 / p90 / p99 {times} ms"
    context = f"the model's context of {scenario.fleet.max_model_len:,} tokens"
    if outcome.num_too_long:
        yield f"prompts refused, which {context} has no room for: {outcome.num_too_long:,}"
    if outcome.num_cut:
        yield f"answers cut where {context} ends: {outcome.num_cut:,}"
    for failure in outcome.idle_failures:
        is_over = failure.at_s > outcome.end_s
        why = f"the run was over after {outcome.end_s:.1f} s" if is_over else "there was no such worker then"
        yield f"--fail {failure.worker}@{failure.at_s:g} killed nothing: {why}"
    last_s = outcome.requests[-1].arrival_s
    for spike in scenario.traffic.spikes:
        if spike.at_s > last_s:
            yield f"the spike at {spike.at_s:g} s changed nothing: the last request came at {last_s:.1f} s"
    if scenario.traffic.rate_per_s is None and outcome.span_s and outcome.requests_per_s > _CLOCK_PER_S:
        yield (
            f"{outcome.requests_per_s:,.0f} requests/s, by the trace's own times: are they in the unit of its form "
            "(Mooncake's: milliseconds)? --rate brings them to another rate"
        )


def in_words(scenario: Scenario, outcome: Outcome) -> str:
    fleet, goals, trace = scenario.fleet, scenario.goals, scenario.traffic.trace
    named = trace if isinstance(trace, str) else f"{len(trace)} rows"
    workers = f"{fleet.prefill} prefill + {fleet.decode} decode" if fleet.prefill else f"{fleet.decode} colocated"
    return (
        f"{len(outcome.requests):,} requests of {named} in {outcome.span_s:,.0f} s ({outcome.requests_per_s:.2f}/s); "
        f"{workers} workers of {fleet.gpus_per_worker} x {fleet.hardware.name}, {fleet.shape.name}\n"
        f"good: TTFT <= max({goals.ttft_s:g} s, {goals.ttft_stretch:g} x unloaded), TPOT <= {goals.tpot_s * 1e3:g} ms; "
        "times in ms"
    )


def _cells(scenario: Scenario, outcome: Outcome) -> list[str]:
    ttft, tpot, ended = outcome.ttft_ms, outcome.tpot_ms, outcome.ended
    at_first = scenario.fleet.num_workers  # all that a run without a span of time has
    gpus = max((f.num_prefill + f.num_decode for f in outcome.fleet), default=at_first) * scenario.fleet.gpus_per_worker
    return [
        f"{outcome.attainment:.1%}",
        f"{outcome.goodput_per_s:.2f}",
        str(sum(count for how, count in ended.items() if how != "finished")),
        *(milliseconds(value) for value in (ttft.p50, ttft.p90, ttft.p99, tpot.p50, tpot.p90, tpot.p99)),
        f"{outcome.hit_rate:.1%}",
        f"{outcome.queue.p99 or 0:.0f}",
        f"{outcome.busy_share:.0%}",
        str(gpus),
        f"{outcome.gpu_hours:.1f}",
        "-" if outcome.usd is None else f"{outcome.usd:,.0f}",
    ]


def figures(outcome: Outcome) -> dict[str, object]:
    """Everything but the single requests."""
    return {
        "num_requests": len(outcome.requests),
        "ended": outcome.ended,
        "attainment": outcome.attainment,
        "goodput_per_s": outcome.goodput_per_s,
        "requests_per_s": outcome.requests_per_s,
        "num_too_long": outcome.num_too_long,
        "num_cut": outcome.num_cut,
        "missed": outcome.missed,
        "ttft_ms": asdict(outcome.ttft_ms),
        "tpot_ms": asdict(outcome.tpot_ms),
        "embedding_ms": asdict(outcome.embedding_ms),
        "queue": asdict(outcome.queue),
        "hit_rate": outcome.hit_rate,
        "num_preemptions": outcome.num_preemptions,
        "num_adapter_loads": outcome.num_adapter_loads,
        "num_draft_tokens": outcome.num_draft_tokens,
        "num_accepted_tokens": outcome.num_accepted_tokens,
        "num_retries": outcome.num_retries,
        "busy_share": outcome.busy_share,
        "gpu_hours": outcome.gpu_hours,
        "usd": outcome.usd,
        "span_s": outcome.span_s,
        "num_events": outcome.num_events,
        "cpu_s": outcome.cpu_s,
        "router_s": outcome.router_s,
        "submit_us": asdict(outcome.submit_us),
    }


def save_runs(runs: Sequence[Run], environment: Environment, path: Path) -> None:
    shown = [
        {"name": name, "about": in_words(scenario, outcome), **figures(outcome)} for name, scenario, outcome in runs
    ]
    save_json({"environment": asdict(environment), "runs": shown}, path)


def plot_runs(runs: Sequence[Run], path: Path) -> None:
    """Plot, of each run, both latencies' distributions, and over time the share of good requests and the fleet."""
    figure, (ttft, tpot, good, fleet) = new_figure(18, 4.5, 4)
    for (name, _, outcome), colour in zip(runs, COLOURS * len(runs), strict=False):
        first_s = [r.ttft_s for r in outcome.requests if r.ttft_s is not None and not r.is_embedding]
        _cumulative(ttft, [seconds * 1e3 for seconds in first_s], name, colour)
        _cumulative(tpot, [r.tpot_s * 1e3 for r in outcome.requests if r.tpot_s is not None], name, colour)
        _good_over_time(good, outcome, colour)
        at_s = [sample.at_s for sample in outcome.fleet]
        fleet.step(at_s, [sample.num_prefill for sample in outcome.fleet], colour, where="post", linestyle="--")
        fleet.step(at_s, [sample.num_decode for sample in outcome.fleet], colour, where="post")
    _rate_over_time(good, runs[0][2])
    goals = runs[0][2].goals
    ttft.axvline(goals.ttft_s * 1e3, color="grey", linestyle="--", linewidth=1)
    tpot.axvline(goals.tpot_s * 1e3, color="grey", linestyle="--", linewidth=1)
    ttft.set_xscale("log")
    for axes, label in ((ttft, "TTFT, ms"), (tpot, "TPOT, ms"), (good, "seconds"), (fleet, "seconds")):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    ttft.set_ylabel("share of requests")
    good.set_ylabel("share of good requests; grey: requests/s")
    fleet.set_ylabel("workers: prefill (dashed), decode")
    ttft.legend(loc="lower right", fontsize=8)
    figure.suptitle(in_words(runs[0][1], runs[0][2]), fontsize=9)
    save_figure(figure, path)


def _cumulative(axes: Axes, values: list[float], name: str, colour: str) -> None:
    ordered = sorted(values)
    step = max(1, len(ordered) // 2000)
    shown = ordered[::step]
    axes.step(shown, [(n * step + 1) / len(ordered) for n in range(len(shown))], colour, where="post", label=name)


def _in_bins(outcome: Outcome) -> tuple[float, list[tuple[float, list[RequestOutcome]]]]:
    """Requests by their time of arrival: the bins' width, and of each its start and its requests."""
    width_s = max(outcome.span_s / _BINS, 1.0)
    bins: dict[int, list[RequestOutcome]] = {}
    for request in outcome.requests:
        bins.setdefault(int(request.arrival_s / width_s), []).append(request)
    return width_s, [(number * width_s, bins[number]) for number in sorted(bins)]


def _good_over_time(axes: Axes, outcome: Outcome, colour: str) -> None:
    _, bins = _in_bins(outcome)
    shares = [sum(request.is_good(outcome.goals) for request in requests) / len(requests) for _, requests in bins]
    axes.plot([at_s for at_s, _ in bins], shares, colour)
    axes.set_ylim(0, 1.05)


def _rate_over_time(axes: Axes, outcome: Outcome) -> None:
    width_s, bins = _in_bins(outcome)
    rates = axes.twinx()
    rates.plot([at_s for at_s, _ in bins], [len(requests) / width_s for _, requests in bins], "grey", linestyle=":")
    rates.set_ylim(bottom=0)
