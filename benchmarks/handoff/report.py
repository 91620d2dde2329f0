"""The figures of the handoff measurement, and how they are shown: tables, JSON, plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kvferry.benchmarks.handoff.prefill import HandoffTimes
from kvferry.tools.load.cores import CoreUse
from kvferry.tools.load.environment import Environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.plot import COLOURS, new_figure, save_figure
from kvferry.tools.load.report import milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_RATIO = 0.8  # to writev, from MIN_BAR_BYTES on
MIN_BAR_BYTES = 64 << 20
MAX_EXPOSED = 0.01  # of TTFT


@dataclass(slots=True, frozen=True)
class Round:
    """The three copies of the same bytes, one right after the other."""

    handoff: HandoffTimes
    writev_s: float | None
    plain_s: float


@dataclass(slots=True, frozen=True)
class SizeResult:
    """All layers complete at once."""

    shape: str
    num_blocks: int
    table: str
    num_bytes: int
    num_pieces: int  # after neighbours were merged, as writev gets them
    connect_s: float  # descriptors and window, once per decode worker
    rounds: tuple[Round, ...]

    @property
    def handoff_s(self) -> float:
        return median(one.handoff.total_s for one in self.rounds)

    @property
    def writev_s(self) -> float | None:
        times = [one.writev_s for one in self.rounds if one.writev_s is not None]
        return median(times) if times else None

    @property
    def plain_s(self) -> float:
        return median(one.plain_s for one in self.rounds)

    @property
    def ratio(self) -> float | None:
        """Of the handoff's speed to that of writev: the median over the rounds, so that a slow moment hits both."""
        ratios = [one.writev_s / one.handoff.total_s for one in self.rounds if one.writev_s is not None]
        return median(ratios) if ratios else None

    @property
    def plain_ratio(self) -> float:
        return median(one.plain_s / one.handoff.total_s for one in self.rounds)

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.num_blocks:,} blocks, {self.table}"

    @property
    def miss(self) -> str | None:
        if self.num_bytes < MIN_BAR_BYTES or self.ratio is None or self.ratio >= MIN_RATIO:
            return None
        return f"{self.name}: {self.ratio:.2f} of writev, the bar is {MIN_RATIO:.2f}"


@dataclass(slots=True, frozen=True)
class PacedResult:
    """Layers complete one after the other, as a prompt of some length is computed in chunks."""

    shape: str
    num_tokens: int
    table: str
    ttft_s: float  # as asked for
    prompts: tuple[HandoffTimes, ...]

    @property
    def exposed_s(self) -> float:
        return median(times.exposed_s for times in self.prompts)

    @property
    def share(self) -> float:
        return self.exposed_s / self.ttft_s

    @property
    def miss(self) -> str | None:
        if self.share <= MAX_EXPOSED:
            return None
        return (
            f"{self.shape}, {self.num_tokens:,} tokens: {self.share:.1%} of TTFT exposed, the bar is {MAX_EXPOSED:.0%}"
        )


@dataclass(slots=True, frozen=True)
class IdleResult:
    """Cores kept busy by ends that have nothing to move."""

    state: str
    prefill_cores: float
    decode_cores: float


@dataclass(slots=True, frozen=True)
class HandoffReport:
    backend: str
    device: str
    sizes: tuple[SizeResult, ...]
    paced: tuple[PacedResult, ...]
    idle: tuple[IdleResult, ...]
    left_out: tuple[str, ...]
    cores: CoreUse  # client: the prefill end and the copies; server: the decode end
    environment: Environment

    @property
    def misses(self) -> list[str]:
        found = [size.miss for size in self.sizes] + [result.miss for result in self.paced]
        return [miss for miss in found if miss is not None]


def print_handoff(report: HandoffReport, console: Console) -> None:
    console.print(
        f"{report.backend} on {report.device}; other programs used {report.cores.foreign:.2f} cores", highlight=False
    )
    console.print(_size_table(report.sizes, report.device))
    console.print(_time_table(report.sizes))
    if report.paced:
        console.print(_paced_table(report.paced))
    if report.idle:
        console.print(_idle_table(report.idle))
    for line in report.left_out:
        console.print(f"left out: {line}", markup=False, highlight=False)
    for miss in report.misses:
        console.print(f"missed: {miss}", markup=False, highlight=False)


def _size_table(sizes: Sequence[SizeResult], device: str) -> Table:
    plain = "memcpy" if device == "cpu" else "device copy"
    table = Table(title="all layers complete at once: GB/s, and the handoff's share; medians", title_justify="left")
    for column in ("shape", "blocks lie"):
        table.add_column(column)
    for column in ("blocks", "MiB", "pieces", "handoff", "writev", "share", plain, "share"):
        table.add_column(column, justify="right")
    for size in sizes:
        cells = [
            *(size.shape, size.table, f"{size.num_blocks:,}", f"{size.num_bytes / 2**20:,.0f}", f"{size.num_pieces:,}"),
            _rate(size.num_bytes, size.handoff_s),
            _rate(size.num_bytes, size.writev_s),
            "-" if size.ratio is None else f"{size.ratio:.2f}",
            _rate(size.num_bytes, size.plain_s),
            f"{size.plain_ratio:.2f}",
        ]
        table.add_row(*cells, style="red" if size.miss else "")
    return table


def _time_table(sizes: Sequence[SizeResult]) -> Table:
    """Posting: the backend's calls; over shared memory they copy. Notice: all but first post to last byte."""
    table = Table(title="where the time of these goes, ms; medians", title_justify="left")
    for column in ("shape", "blocks lie"):
        table.add_column(column)
    for column in ("blocks", "whole", "writes", "posting", "notice", "engine's thread", "open before", "connect once"):
        table.add_column(column, justify="right")
    for size in sizes:
        handoffs = [one.handoff for one in size.rounds]
        times_s = [
            median(times.write_s for times in handoffs),
            median(max(0.0, times.total_s - times.written_s) for times in handoffs),
            median(times.engine_s for times in handoffs),
            median(times.open_s for times in handoffs),
            size.connect_s,
        ]
        cells = [size.shape, size.table, f"{size.num_blocks:,}", milliseconds(size.handoff_s * 1e3)]
        table.add_row(*cells, str(handoffs[-1].num_writes), *(milliseconds(value_s * 1e3) for value_s in times_s))
    return table


def _rate(num_bytes: int, seconds: float | None) -> str:
    return "-" if seconds is None else f"{num_bytes / seconds / 1e9:.2f}"


def _paced_table(paced: Sequence[PacedResult]) -> Table:
    table = Table(title="layers complete in their time: what is exposed after the last one", title_justify="left")
    table.add_column("shape")
    table.add_column("table")
    for column in ("tokens", "TTFT s", "exposed ms", "longest", "prompts", "of TTFT", "bar", "engine ms"):
        table.add_column(column, justify="right")
    for result in paced:
        exposed_ms = [times.exposed_s * 1e3 for times in result.prompts]
        table.add_row(
            result.shape,
            result.table,
            f"{result.num_tokens:,}",
            f"{result.ttft_s:.2f}",
            milliseconds(median(exposed_ms)),
            milliseconds(max(exposed_ms)),
            str(len(exposed_ms)),
            f"{result.share:.2%}",
            f"{MAX_EXPOSED:.0%}",
            milliseconds(median(times.engine_s for times in result.prompts) * 1e3),
            style="red" if result.miss else "",
        )
    return table


def _idle_table(idle: Sequence[IdleResult]) -> Table:
    table = Table(title="cores kept busy with nothing to move", title_justify="left")
    table.add_column("state")
    table.add_column("prefill end", justify="right")
    table.add_column("decode end", justify="right")
    for result in idle:
        table.add_row(result.state, f"{result.prefill_cores:.3f}", f"{result.decode_cores:.3f}")
    return table


def write_handoff(report: HandoffReport, path: Path) -> None:
    sizes, paced = _with_rates(report.sizes), _with_shares(report.paced)
    body = asdict(report) | {"sizes": sizes, "paced": paced, "misses": report.misses}
    save_json(body, path)


def write_results(sizes: Sequence[SizeResult], paced: Sequence[PacedResult], wanted: int, path: Path) -> None:
    """Write what is measured so far of `wanted` results, for a run that may be cut."""
    body = {"done": len(sizes) + len(paced), "of": wanted}
    save_json({**body, "sizes": _with_rates(sizes), "paced": _with_shares(paced)}, path)


def _with_rates(sizes: Sequence[SizeResult]) -> list[dict[str, object]]:
    return [
        asdict(size)
        | {
            "handoff_bytes_per_s": size.num_bytes / size.handoff_s,
            "writev_bytes_per_s": None if size.writev_s is None else size.num_bytes / size.writev_s,
            "plain_bytes_per_s": size.num_bytes / size.plain_s,
            "ratio": size.ratio,
            "plain_ratio": size.plain_ratio,
        }
        for size in sizes
    ]


def _with_shares(paced: Sequence[PacedResult]) -> list[dict[str, object]]:
    return [asdict(result) | {"exposed_s": result.exposed_s, "share": result.share} for result in paced]


def plot_handoff(report: HandoffReport, path: Path) -> None:
    """Left: speed by size, one line per way of lying. Right: the same as a share of writev (or of the plain copy)."""
    figure, (speeds, ratios) = new_figure(11, 4.5, 2)
    groups: dict[tuple[str, str], list[SizeResult]] = {}
    for size in report.sizes:
        groups.setdefault((size.shape, size.table), []).append(size)
    for index, ((shape, table), sizes) in enumerate(groups.items()):
        _draw_group(speeds, ratios, f"{shape}, {table}", sizes, COLOURS[index % len(COLOURS)])
    has_writev = any(size.ratio is not None for size in report.sizes)
    if has_writev:
        ratios.axhline(
            MIN_RATIO, color="black", linestyle="--", linewidth=1, label=f"bar from {MIN_BAR_BYTES >> 20} MiB"
        )
    mib = sorted({round(size.num_bytes / 2**20) for size in report.sizes})
    for axes in (speeds, ratios):
        axes.set_xscale("log")
        axes.set_xticks(mib, [f"{value:,}" for value in mib], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("MiB of a prompt")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    speeds.set_ylabel("GB/s")
    speeds.set_title("solid: handoff, dotted: writev of the same pieces", fontsize=9)
    ratios.set_title(f"handoff's share of {'writev' if has_writev else 'a device copy'}", fontsize=9)
    commit = report.environment.git_commit or f"version {report.environment.kvferry_version}"
    figure.suptitle(f"{report.backend} on {report.environment.cpu}, {report.device} ({commit})", fontsize=9)
    save_figure(figure, path)


def _draw_group(speeds: Axes, ratios: Axes, label: str, sizes: Sequence[SizeResult], colour: str) -> None:
    mib = [size.num_bytes / 2**20 for size in sizes]
    speeds.plot(mib, [size.num_bytes / size.handoff_s / 1e9 for size in sizes], "o-", color=colour, label=label)
    measured = [size for size in sizes if size.writev_s is not None]
    if measured:
        rates = [size.num_bytes / size.writev_s / 1e9 for size in measured if size.writev_s is not None]
        speeds.plot([size.num_bytes / 2**20 for size in measured], rates, "s:", color=colour, markersize=3)
    shares = [size.plain_ratio if size.ratio is None else size.ratio for size in sizes]
    ratios.plot(mib, shares, "o-", color=colour, label=label)
