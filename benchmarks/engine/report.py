"""The figures of the engine's measurement against its floors, and how they are shown: table, JSON, plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from kvferry.benchmarks.shared.floors import Bound
from kvferry.benchmarks.shared.rates import MeasuredRates
from kvferry.tools.load.cores import CoreUse
from kvferry.tools.load.environment import Environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.plot import COLOURS, new_figure, save_figure
from kvferry.tools.load.report import milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_HOST_GAP = 0.05


def decode_name(num_rows: int, context: int, num_drafts: int = 0) -> str:
    return f"decode {num_rows}@{context}" + (f"+{num_drafts}" if num_drafts else "")


@dataclass(slots=True, frozen=True)
class Case:
    """One decode step (`num_rows` at `context` tokens) or one whole prefill (`context` tokens)."""

    kind: Literal["decode", "prefill"]
    num_rows: int
    context: int  # as asked for
    median_s: float
    min_s: float
    count: int  # steps or prompts
    num_steps: int  # of one prompt; 1 for decode
    floor_s: float
    bound: Bound
    host_gap: float | None = None  # CUDA decode: share of a step in which the device waits
    max_ratio: float | None = None  # the bar; None: there is none for this case
    num_drafts: int = 0  # wrong tokens that each row of a decode step checks

    @property
    def name(self) -> str:
        if self.kind == "prefill":
            return f"prefill {self.context}"
        return decode_name(self.num_rows, self.context, self.num_drafts)

    @property
    def ratio(self) -> float:
        return self.median_s / self.floor_s

    @property
    def misses(self) -> list[str]:
        """The bars that this case does not reach, in words."""
        missed = []
        if self.max_ratio is not None and self.ratio > self.max_ratio:
            missed.append(f"{self.name}: {self.ratio:.2f} x floor, the bar is {self.max_ratio:.2f}")
        if self.host_gap is not None and self.host_gap > _MAX_HOST_GAP and not self.num_drafts:
            missed.append(f"{self.name}: the device waits for {self.host_gap:.0%} of a step, the bar is 5%")
        return missed


@dataclass(slots=True, frozen=True)
class EngineReport:
    model: str
    device: str
    dtype: str  # of the weights
    kv_dtype: str
    num_threads: int  # CPU threads of the engine
    max_num_batched_tokens: int
    rates: MeasuredRates
    cases: tuple[Case, ...]
    cores: CoreUse
    environment: Environment

    @property
    def misses(self) -> list[str]:
        return [miss for case in self.cases for miss in case.misses]


def max_ratio(device: str, shape: str | None, kind: str, num_rows: int, context: int) -> float | None:
    """The bar of a case: how many times its floor it may take. `shape`: None for a model that somebody serves."""
    if device == "cpu":
        is_barred = shape is None and (kind, num_rows, context) in (("decode", 1, 128), ("prefill", 1, 8192))
        return 1.5 if is_barred else None
    if shape != "llama-3-8b":
        return None
    if kind == "decode":
        return 1.15 if num_rows == 1 else 1.2 if (num_rows, context) == (64, 4096) else None
    return {8192: 1 / 0.65, 32000: 1 / 0.60, 32768: 1 / 0.60}.get(context)  # shares of the matmul rate


def print_engine(report: EngineReport, console: Console) -> None:
    rates = report.rates
    console.print(
        f"{report.model} in {report.dtype} (KV in {report.kv_dtype}) on {report.device}, {report.num_threads} threads, "
        f"chunks of at most {report.max_num_batched_tokens} tokens",
        highlight=False,
    )
    console.print(
        f"at best here: {_scaled(rates.matmul_flops_per_s)}FLOP/s ({rates.matmul}), "
        f"{_scaled(rates.read_bytes_per_s)}B/s ({rates.read}); other programs used {report.cores.foreign:.2f} cores",
        highlight=False,
    )
    table = Table()
    table.add_column("case")
    for column in ("median ms", "min ms", "count", "steps", "floor ms", "bound", "x floor", "bar", "host gap"):
        table.add_column(column, justify="right")
    for case in report.cases:
        table.add_row(*_cells(case), style="red" if case.misses else "")
    console.print(table)
    for miss in report.misses:
        console.print(f"missed: {miss}", markup=False, highlight=False)


def _cells(case: Case) -> list[str]:
    return [
        case.name,
        milliseconds(case.median_s * 1e3),
        milliseconds(case.min_s * 1e3),
        str(case.count),
        str(case.num_steps),
        milliseconds(case.floor_s * 1e3),
        case.bound,
        f"{case.ratio:.2f}",
        "-" if case.max_ratio is None else f"{case.max_ratio:.2f}",
        "-" if case.host_gap is None else f"{case.host_gap:.1%}",
    ]


def _scaled(value: float) -> str:
    return f"{value / 1e12:,.1f} T" if value >= 1e12 else f"{value / 1e9:,.1f} G"


def write_engine(report: EngineReport, path: Path) -> None:
    body = asdict(report) | {"cases": _with_ratios(report.cases), "misses": report.misses}
    save_json(body, path)


def write_cases(cases: Sequence[Case], wanted: int, path: Path) -> None:
    """Write what is measured so far of `wanted` cases, for a run that may be cut."""
    misses = [miss for case in cases for miss in case.misses]
    save_json({"done": len(cases), "of": wanted, "cases": _with_ratios(cases), "misses": misses}, path)


def _with_ratios(cases: Sequence[Case]) -> list[dict[str, object]]:
    return [asdict(case) | {"name": case.name, "ratio": case.ratio} for case in cases]


def plot_engine(report: EngineReport, path: Path) -> None:
    """Left: decode steps over their floors. Right: prefill time and floor by prompt length."""
    figure, (steps, prompts) = new_figure(11, 4.5, 2)
    _draw_decode(steps, [case for case in report.cases if case.kind == "decode"])
    _draw_prefill(prompts, [case for case in report.cases if case.kind == "prefill"])
    commit = report.environment.git_commit or f"version {report.environment.kvferry_version}"
    rates = report.rates
    figure.suptitle(
        f"{report.model} in {report.dtype} on {report.device}; {_scaled(rates.matmul_flops_per_s)}FLOP/s, "
        f"{_scaled(rates.read_bytes_per_s)}B/s at best ({commit})",
        fontsize=9,
    )
    save_figure(figure, path)


def _draw_decode(axes: Axes, cases: Sequence[Case]) -> None:
    for index, case in enumerate(cases):
        axes.bar(index - 0.2, case.floor_s * 1e3, 0.4, color=COLOURS[0], label="floor" if index == 0 else None)
        axes.bar(index + 0.2, case.median_s * 1e3, 0.4, color=COLOURS[1], label="median step" if index == 0 else None)
        axes.annotate(f"{case.ratio:.2f} x", (index + 0.2, case.median_s * 1e3), fontsize=8, ha="center", va="bottom")
    axes.set_xticks(range(len(cases)), [case.name.removeprefix("decode ") for case in cases])
    axes.set_xlabel("rows @ tokens in the context of each + drafted tokens of each")
    axes.set_ylabel("ms")
    axes.set_title("one decode step", fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    if cases:
        axes.legend(fontsize=8)


def _draw_prefill(axes: Axes, cases: Sequence[Case]) -> None:
    lengths = [case.context for case in cases]
    axes.plot(lengths, [case.floor_s for case in cases], "s--", color=COLOURS[0], markersize=4, label="floor")
    axes.plot(lengths, [case.median_s for case in cases], "o-", color=COLOURS[1], markersize=4, label="median prompt")
    for case in cases:
        axes.annotate(
            f"{case.ratio:.2f} x",
            (case.context, case.median_s),
            (-4, 6),
            textcoords="offset points",
            fontsize=8,
            ha="right",
        )
    axes.set_xlabel("tokens in the prompt")
    axes.set_ylabel("s")
    axes.set_title("prefill of one prompt", fontsize=9)
    axes.grid(alpha=0.3)
    if cases:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
        axes.minorticks_off()
        axes.legend(fontsize=8)
