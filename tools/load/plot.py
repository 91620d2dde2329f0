"""Figures of a run as SVG or PNG. The same records give the same bytes: no date, no random ids."""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.errors import ConfigError
from ...common.extras import MATPLOTLIB
from .json_file import write_whole
from .report import BenchReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")
# Told apart by people who do not see all colours (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def check_plot_path(path: Path) -> None:
    """Raises ConfigError for a format that is none of ours, or without the library that draws."""
    if not MATPLOTLIB.is_installed:
        raise ConfigError(f"--plot: {MATPLOTLIB.missing}")
    if path.suffix not in FORMATS:
        raise ConfigError(f"--plot {path}: the name must end in {' or '.join(FORMATS)}")


def new_figure(width_in: float, height_in: float, num_panels: int) -> tuple[Figure, list[Axes]]:
    """Panels in a row, drawn without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def save_figure(figure: Figure, path: Path) -> None:
    import matplotlib

    drawn = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "kvferry", "svg.fonttype": "path"}):
        metadata = {"Date": None, "Creator": "kvferry"} if path.suffix == ".svg" else {"Software": "kvferry"}
        figure.savefig(drawn, format=path.suffix[1:], dpi=150, metadata=metadata)
    write_whole(drawn.getvalue(), path)


def plot_report(report: BenchReport, path: Path) -> None:
    """Cumulative distributions of TTFT, token gaps and e2e, with the limits given."""
    ok = [record for record in report.records if record.is_ok]
    figure, (ttft, gaps, e2e) = new_figure(12, 4, 3)
    _draw_cumulative(ttft, "TTFT", (record.ttft_s for record in ok), COLOURS[0], report.slo.ttft_ms)
    _draw_cumulative(gaps, "TPOT", (record.tpot_s for record in ok), COLOURS[1], report.slo.tpot_ms)
    _draw_cumulative(gaps, "ITL", (gap for record in ok for gap in record.token_gaps_s()), COLOURS[2], None)
    _draw_cumulative(e2e, "e2e", (record.e2e_s for record in ok), COLOURS[0], None)
    ttft.set_ylabel("share of samples")
    commit = report.environment.git_commit or f"version {report.environment.kvferry_version}"
    figure.suptitle(f"{report.model}: {report.load}; {report.workload} ({commit})", fontsize=10)
    save_figure(figure, path)


def _draw_cumulative(
    axes: Axes, label: str, samples_s: Iterable[float | None], colour: str, limit_ms: float | None
) -> None:
    ordered_ms = sorted(sample * 1e3 for sample in samples_s if sample is not None)
    shares = [(rank + 1) / len(ordered_ms) for rank in range(len(ordered_ms))]
    axes.step(ordered_ms, shares, where="post", color=colour, label=f"{label} ({len(ordered_ms)})")
    if limit_ms is not None:
        axes.axvline(limit_ms, color=colour, linestyle="--", linewidth=1, label=f"{label} limit")
    axes.set_xlabel("ms")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
