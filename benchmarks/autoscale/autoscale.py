"""A day of traffic through the production autoscaler, in virtual time: are objectives kept, and at what cost?

    python -m kvferry.benchmarks.autoscale --trace azure_2023_conv.csv

The day: arrivals whose rate swings by --swing between night and afternoon, with a spike of --spike-factor times the
rate from one moment to the next; lengths of the recorded trace. The fleet: queues around step times computed from
published figures of accelerators and models (fleet.py); a worker that is added takes --start-s to be ready.
The bars: requests that met both objectives, outside the spike's first minute; GPU-hours beside an oracle that knows
each minute in advance (oracle.py); growth within five minutes after a shrink, outside the spike. A missed one is the
exit code 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kvferry.benchmarks.autoscale.day import Day, Spike, arrivals
from kvferry.benchmarks.autoscale.fleet import FILL_TOKENS, SETTLED_S, FleetRun
from kvferry.benchmarks.autoscale.oracle import Oracle
from kvferry.benchmarks.autoscale.records import Minute, ModelTimes
from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.program import benchmark, parser_of
from kvferry.router.autoscaler.autoscaler import Autoscaler
from kvferry.router.autoscaler.scale_types import AnswerLengths, AutoscalerSettings, Bounds, Counts, WorkerLimits
from kvferry.router.autoscaler.sizing import DecodeLoad, PrefillLoad
from kvferry.router.state.objectives import Objectives
from kvferry.sizing.hardware import gpu_named
from kvferry.sizing.shapes import model_named
from kvferry.sizing.steps import Roofline
from kvferry.tools.load.arguments import output_file, positive_float, positive_int
from kvferry.tools.load.environment import Environment, describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.plot import COLOURS, check_plot_path, new_figure, save_figure
from kvferry.tools.load.report import report_console
from kvferry.tools.load.traces import TraceRow, read_trace

_MOST_WORKERS = 4000
_BLOCK_TOKENS = 16
_WARM_UP_S = 1800.0
_EXCUSED_S = 60.0  # of the spike
_OSCILLATION_S = 300.0
_KEPT_BAR, _COST_BAR = 0.99, 1.15


@dataclass(slots=True, frozen=True)
class MinuteResult:
    start_s: float  # of the day
    num_requests: int
    num_kept: int
    workers: Counts  # as decided at its end
    oracle: Counts
    gpu_hours: float


@dataclass(slots=True, frozen=True)
class DayResult:
    num_requests: int
    kept: float | None  # share of them outside the spike's first minute; None: there were none
    gpu_hours: float
    oracle_gpu_hours: float
    num_grown_after_shrink: int
    num_role_changes: int
    num_added: int
    num_removed: int
    minutes: tuple[MinuteResult, ...]
    changes: tuple[tuple[float, int, int], ...]  # (second of the day, workers before, after)

    @property
    def cost(self) -> float | None:
        return self.gpu_hours / self.oracle_gpu_hours if self.oracle_gpu_hours else None


def run_day(
    day: Day,
    rows: Sequence[TraceRow],
    model: Roofline,
    objectives: Objectives,
    *,
    max_num_seqs: int = 256,
    start_s: float = 40.0,
    target: float = 0.99,
    seed: int = 0,
) -> DayResult:
    limits = WorkerLimits(model.num_blocks(_BLOCK_TOKENS) * _BLOCK_TOKENS, max_num_seqs, FILL_TOKENS)
    times = ModelTimes(model)
    bounds = Bounds(1, _MOST_WORKERS)
    settings = AutoscalerSettings(bounds, bounds, 2 * _MOST_WORKERS, objectives, target=target)
    begin = _begin(day, rows, times, limits, objectives, target)
    run = FleetRun(
        Autoscaler(settings, times, seed=seed),
        model,
        limits,
        objectives,
        num_prefill=begin.prefill,
        num_decode=begin.decode,
        start_s=start_s,
        gpus_per_worker=model.num_gpus,
    )
    oracle = Oracle(times, limits, objectives, _KEPT_BAR)
    minutes: list[MinuteResult] = []

    def on_minute(minute: Minute) -> None:
        if not day.begin_s <= minute.start_s < day.begin_s + day.duration_s:
            return
        gpu_hours = minute.gpu_s / 3600
        workers = Counts(*minute.counts[-1]) if minute.counts else begin
        minutes.append(
            MinuteResult(minute.start_s, minute.num_arrived, minute.num_kept, workers, oracle.least(minute), gpu_hours)
        )

    # It learns before the day begins, and the day's last answers end after it.
    longer = replace(day, begin_s=day.begin_s - _WARM_UP_S, duration_s=_WARM_UP_S + day.duration_s + SETTLED_S)
    run.run(arrivals(longer, rows, seed), longer.begin_s, longer.duration_s, on_minute)
    return _sum_up(minutes, run, day, model.num_gpus)


def _begin(
    day: Day, rows: Sequence[TraceRow], times: ModelTimes, limits: WorkerLimits, objectives: Objectives, target: float
) -> Counts:
    """A fleet that fits the first minute, by the same formulas."""
    answers = [AnswerLengths(row.num_prompt_tokens, 0, row.num_output_tokens) for row in rows[:2000]]
    rate = day.rate(day.begin_s - _WARM_UP_S)
    return Counts(
        PrefillLoad.from_answers(answers, times, limits, objectives).needed(rate, target),
        DecodeLoad.from_answers(answers, times, limits, objectives).needed(rate, target),
    )


def _sum_up(minutes: list[MinuteResult], run: FleetRun, day: Day, num_gpus: int) -> DayResult:
    excused = replace(day.spike, duration_s=_EXCUSED_S) if day.spike is not None else None
    counted = [minute for minute in minutes if excused is None or not excused.holds(minute.start_s)]
    num_counted = sum(minute.num_requests for minute in counted)
    return DayResult(
        num_requests=sum(minute.num_requests for minute in minutes),
        kept=sum(minute.num_kept for minute in counted) / num_counted if num_counted else None,
        gpu_hours=sum(minute.gpu_hours for minute in minutes),
        oracle_gpu_hours=sum(minute.oracle.total * num_gpus / 60 for minute in minutes),
        num_grown_after_shrink=_oscillations(run.changes.of_total, day.spike),
        num_role_changes=run.changes.num_flips,
        num_added=run.changes.num_added,
        num_removed=run.changes.num_removed,
        minutes=tuple(minutes),
        changes=tuple(run.changes.of_total),
    )


def _oscillations(changes: Sequence[tuple[float, int, int]], spike: Spike | None) -> int:
    """Growths within five minutes after a shrink. The spike's own growth is none."""
    downs = [when for when, before, after in changes if after < before]
    ups = [when for when, before, after in changes if after > before and not (spike is not None and spike.holds(when))]
    return sum(any(0 < up - down <= _OSCILLATION_S for down in downs) for up in ups)


# --- the report -----------------------------------------------------------------------------------------------------


def bars_of(result: DayResult) -> list[Bar]:
    kept = None if result.kept is None else 100 * result.kept
    return [
        Bar("both objectives met", kept, 100 * _KEPT_BAR, at_least=True, unit="%", count=result.num_requests),
        Bar("GPU-hours / oracle", result.cost, _COST_BAR),
        Bar("growth within 5 min after a shrink", result.num_grown_after_shrink, 0),
        Bar("GPU-hours", result.gpu_hours, None),
        Bar("GPU-hours of the oracle", result.oracle_gpu_hours, None),
        Bar("role changes", result.num_role_changes, None),
        Bar("workers added", result.num_added, None),
        Bar("workers removed", result.num_removed, None),
    ]


def plot_day(result: DayResult, about: str, path: Path) -> None:
    """Workers beside the oracle's, and the share of requests that met both objectives."""
    figure, (prefill, decode, kept) = new_figure(14, 4, 3)
    hours = [minute.start_s / 3600 for minute in result.minutes]
    for axes, pool in ((prefill, "prefill"), (decode, "decode")):
        for label, colour, counts in (
            ("oracle", COLOURS[1], [getattr(minute.oracle, pool) for minute in result.minutes]),
            ("autoscaler", COLOURS[0], [getattr(minute.workers, pool) for minute in result.minutes]),
        ):
            axes.plot(hours, counts, color=colour, label=label, linewidth=1, drawstyle="steps-post")
        axes.set_title(f"{pool} workers", fontsize=10)
        axes.set_yscale("log")
        axes.legend(fontsize=8)
    shares = [100 * minute.num_kept / max(1, minute.num_requests) for minute in result.minutes]
    kept.plot(hours, shares, color=COLOURS[2], linewidth=1)
    kept.axhline(100 * _KEPT_BAR, color="grey", linewidth=0.5)
    kept.set_title("requests with both objectives met, %", fontsize=10)
    for axes in (prefill, decode, kept):
        axes.set_xlabel("hour of the day")
    kept_text, cost_text = f"{result.kept or 0:.2%} kept", f"{result.cost or 0:.2f}x the oracle's GPU-hours"
    figure.suptitle(f"{about}: {kept_text}, {cost_text}", fontsize=10)
    save_figure(figure, path)


def _as_json(result: DayResult, about: str, environment: Environment) -> dict[str, object]:
    body = asdict(replace(result, minutes=()))
    minutes = [
        [
            round(m.start_s / 3600, 3),
            m.num_requests,
            m.num_kept,
            m.workers.prefill,
            m.workers.decode,
            m.oracle.prefill,
            m.oracle.decode,
            round(m.gpu_hours, 3),
        ]
        for m in result.minutes
    ]
    columns = "hour requests kept prefill decode oracle_prefill oracle_decode gpu_hours".split()
    return {
        "about": about,
        **body,
        "gpu_hours_over_oracle": result.cost,
        "bars": [bar.as_json() for bar in bars_of(result)],
        "minute_columns": columns,
        "minutes": minutes,
        "environment": asdict(environment),
    }


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("autoscale", __doc__)
    parser.add_argument("--trace", type=Path, required=True, help="lengths: an Azure CSV or a Mooncake JSONL")
    parser.add_argument("--model", default="70B")
    parser.add_argument("--gpu", default="H200")
    parser.add_argument("--gpus-per-worker", type=positive_int, default=2)
    parser.add_argument("--max-num-seqs", type=positive_int, default=256)
    parser.add_argument("--rate", type=positive_float, default=60.0, help="mean requests/s of the day, spike left out")
    parser.add_argument("--swing", type=positive_float, default=4.0, help="highest over lowest rate")
    parser.add_argument("--begin-hour", type=float, default=0.0)
    parser.add_argument("--hours", type=positive_float, default=24.0)
    parser.add_argument("--spike-hour", type=float, default=10.0, help="below 0: none")
    parser.add_argument("--spike-s", type=positive_float, default=600.0)
    parser.add_argument("--spike-factor", type=positive_float, default=10.0)
    parser.add_argument("--start-s", type=positive_float, default=40.0, help="until a new worker is ready")
    parser.add_argument("--ttft-ms", type=positive_float, default=1000.0, help="or three times the unloaded time")
    parser.add_argument("--tpot-ms", type=positive_float, default=50.0)
    parser.add_argument("--target", type=positive_float, default=0.99, help="the autoscaler's, for each objective")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=output_file)
    parser.add_argument("--plot", type=output_file)
    return parser


@benchmark("autoscale")
def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    if options.plot is not None:
        check_plot_path(options.plot)
    rows = read_trace(options.trace)
    model = Roofline(gpu_named(options.gpu), model_named(options.model), options.gpus_per_worker)
    spike = None
    if options.spike_hour >= 0:
        spike = Spike(3600 * options.spike_hour, options.spike_s, options.spike_factor)
    day = Day(options.rate, options.swing, 3600 * options.begin_hour, 3600 * options.hours, spike)
    about = (
        f"{options.model} on {options.gpus_per_worker} x {options.gpu}, lengths of {options.trace.name}, "
        f"{options.rate:g} requests/s on average"
    )
    result = run_day(
        day,
        rows,
        model,
        Objectives(ttft_s=options.ttft_ms / 1e3, tpot_s=options.tpot_ms / 1e3),
        max_num_seqs=options.max_num_seqs,
        start_s=options.start_s,
        target=options.target,
        seed=options.seed,
    )
    bars, console = bars_of(result), report_console()
    console.print(about, highlight=False)
    console.print(bar_table("a day with the autoscaler", bars))
    if options.json is not None:
        environment = describe_environment("python -m kvferry.benchmarks.autoscale", argv)
        save_json(_as_json(result, about, environment), options.json)
    if options.plot is not None:
        plot_day(result, about, options.plot)
    return exit_code(bars)
