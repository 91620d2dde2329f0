"""A run is shown as a table on the terminal, a JSON file and a plot."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .endpoint import RequestRecord
from .environment import Environment
from .json_file import save_json
from .stats import Distribution, Slo, Summary

_FILE_WIDTH = 120
_LATENCIES = (
    ("TTFT", "ttft_ms"),
    ("TPOT", "tpot_ms"),
    ("ITL", "itl_ms"),
    ("chunk gap", "chunk_gap_ms"),
    ("e2e", "e2e_ms"),
)


@dataclass(slots=True, frozen=True)
class BenchReport:
    """One run with all that is needed to judge and repeat it."""

    base_url: str
    model: str
    load: str  # in words: "open loop, Poisson 2/s"
    workload: str  # in words: "512 in, 64 out"
    slo: Slo
    summary: Summary
    environment: Environment
    records: Sequence[RequestRecord]
    num_cut_off: int | None = None  # interrupted with so many in flight, which are left out; None: it ran to its end


def report_console(file_width: int = _FILE_WIDTH) -> Console:
    """Standard output; where that is a file, wide enough for every table."""
    return Console(width=None if sys.stdout.isatty() else file_width)


def print_report(report: BenchReport, console: Console) -> None:
    console.print(_latency_table(report))
    console.print(_total_table(report))
    for message, count in report.summary.errors.items():
        console.print(f"[red]{count} failed:[/red] ", end="")
        console.print(message, markup=False)


def write_json(report: BenchReport, path: Path) -> None:
    save_json(_as_json(report), path)


def milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def distribution_cells(distribution: Distribution) -> list[str]:
    figures = (distribution.mean, distribution.p50, distribution.p90, distribution.p99, distribution.max)
    return [*map(milliseconds, figures), f"{distribution.count:,}"]


def _latency_table(report: BenchReport) -> Table:
    title = Text(f"{report.model} at {report.base_url}\n{report.load}; {report.workload}")
    table = Table(title=title, title_justify="left")
    table.add_column("ms")
    for column in ("mean", "p50", "p90", "p99", "max", "count"):
        table.add_column(column, justify="right")
    for label, field in _LATENCIES:
        table.add_row(label, *distribution_cells(getattr(report.summary, field)))
    return table


def _total_table(report: BenchReport) -> Table:
    summary = report.summary
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("requests ok / failed", f"{summary.num_ok} / {summary.num_failed}")
    if report.num_cut_off is not None:
        table.add_row("interrupted; in flight then, and left out", str(report.num_cut_off))
    if summary.num_short:
        table.add_row("answers shorter than asked for", str(summary.num_short))
    if summary.num_resent:
        table.add_row("sent twice: a kept connection was closed", str(summary.num_resent))
    table.add_row("duration", f"{summary.duration_s:.1f} s")
    table.add_row("requests", f"{summary.requests_per_s:.2f} /s")
    table.add_row("input tokens", f"{summary.prompt_tokens_per_s:,.1f} /s")
    if summary.num_cached_tokens:
        table.add_row("input tokens from a prefix cache", _share(summary.num_cached_tokens, summary.num_prompt_tokens))
    table.add_row("output tokens", f"{summary.output_tokens_per_s:,.1f} /s")
    if summary.num_hidden_tokens:
        table.add_row("hidden thoughts among them", _share(summary.num_hidden_tokens, summary.num_output_tokens))
    if summary.counted_by.keys() - {"token_ids"}:
        table.add_row("tokens counted by", ", ".join(f"{how} ({n})" for how, n in sorted(summary.counted_by.items())))
    if summary.num_ids_differ:
        table.add_row("answers whose token ids are not as many as usage says", str(summary.num_ids_differ))
    if summary.goodput_per_s is not None:
        table.add_row(_goodput_label(report.slo), f"{summary.goodput_per_s:.2f} /s ({summary.num_good} requests)")
    if report.load.startswith("open"):
        table.add_row("sent late, p99", f"{milliseconds(summary.late_ms.p99)} ms")
    if summary.client_cpu_us_per_token is not None:
        table.add_row("client CPU per output token", f"{summary.client_cpu_us_per_token:.0f} us")
    return table


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _goodput_label(slo: Slo) -> str:
    limits = [f"{name} <= {limit:g} ms" for name, limit in (("TTFT", slo.ttft_ms), ("TPOT", slo.tpot_ms)) if limit]
    return f"goodput ({', '.join(limits)})"


def _as_json(report: BenchReport) -> dict[str, object]:
    return {
        "environment": asdict(report.environment),
        "base_url": report.base_url,
        "model": report.model,
        "load": report.load,
        "workload": report.workload,
        "num_cut_off": report.num_cut_off,
        "slo": asdict(report.slo),
        "summary": asdict(report.summary),
        "requests": [_request_as_json(record, report.records[0].sent_s) for record in report.records],
    }


def _request_as_json(record: RequestRecord, start_s: float) -> dict[str, object]:
    return {
        "index": record.index,
        "sent_s": round(record.sent_s - start_s, 6),
        "ttft_ms": _rounded_ms(record.ttft_s),
        "tpot_ms": _rounded_ms(record.tpot_s),
        "e2e_ms": _rounded_ms(record.e2e_s),
        "num_prompt_tokens": record.num_prompt_tokens,
        "num_cached_tokens": record.num_cached_tokens,
        "num_output_tokens": record.num_output_tokens,
        "num_hidden_tokens": record.num_hidden_tokens,
        "counted_by": record.counted_by,
        "num_resent": record.num_resent,
        "error": record.error,
    }


def _rounded_ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
