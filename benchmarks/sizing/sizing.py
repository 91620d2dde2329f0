"""Is what `kvferry size` computes what happens?

    python -m kvferry.benchmarks.sizing                        # all three parts
    python -m kvferry.benchmarks.sizing --parts published      # one of them; others keep what their last run wrote

published   figures that others published of their engines, within 25 % (published.py); misses are listed as they are
cpu         TPOT and prefill on this machine from what each part of a step takes there, within 15 % (on_cpu.py): on a
            quiet machine
ratio       the split of the fleet that the search finds, beside every split of as many workers by whole simulation, on
            two traces

Exit code: 0; 1 with --check when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, names_of, parser_of
from kvferry.benchmarks.shared.rates import MeasuredRates
from kvferry.benchmarks.sizing import on_cpu, published
from kvferry.benchmarks.sizing.ratio import TRACES, Ratio, ratio_of
from kvferry.simulator import quiet_simulation
from kvferry.tools.load.arguments import output_file, positive_float, positive_int
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import report_console

_PARTS = ("published", "cpu", "ratio")


@benchmark("sizing")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    quiet_simulation()
    shown, told = report_console(), Console(stderr=True)

    def tell(text: str) -> None:
        told.print(text, style="dim", markup=False)

    body = json.loads(flags.json.read_text()) if flags.json.is_file() else {}
    met = True
    for part in flags.parts:
        environment = asdict(describe_environment("python -m kvferry.benchmarks.sizing", argv))
        if part == "published":
            rows = list(published.rows())
            shown.print(_published_table(rows))
            figures: dict[str, object] = {"rows": [asdict(row) | {"error": row.error} for row in rows]}
            met &= all(row.is_met for row in rows)
        elif part == "cpu":
            with tempfile.TemporaryDirectory(prefix="sizing-") as scratch:
                rates, probed, measured = on_cpu.measure(
                    on_cpu.MODELS, Path(scratch), flags.threads, flags.rounds, tell
                )
            if flags.rates is not None:
                save_json(asdict(probed), flags.rates)
            shown.print(_cpu_table(measured, rates))
            figures = {"rates": asdict(rates), "probed": asdict(probed)}
            figures |= {"rows": [asdict(row) | {"error": row.error} for row in measured]}
            met &= all(row.is_met for row in measured)
        else:
            found = [ratio_of(trace, rate, flags.requests, tell) for trace in TRACES for rate in flags.request_rates]
            shown.print(_ratio_table(found))
            figures = {"traces": [asdict(one) | {"is_best": one.is_best} for one in found]}
            met &= all(one.is_best for one in found)
        body[part] = {"environment": environment, **figures}
    save_json(body, flags.json)
    return 1 if flags.check and not met else 0


def _published_table(rows: Sequence[published.Row]) -> Table:
    table = _table(f"published figures; bar: within {published.WITHIN:.0%}", "", "published, ms", "computed", "off", "")
    for row in rows:
        binding = row.binding if row.is_met else f"{row.binding}, MISSED"
        times = f"{row.published_ms:,.1f}", f"{row.computed_ms:,.1f}"
        table.add_row(f"{row.source}: {row.what}", *times, f"{row.error:+.0%}", binding)
    return table


def _cpu_table(rows: Sequence[on_cpu.CpuRow], rates: MeasuredRates) -> Table:
    gb_per_s, tflops = rates.read_bytes_per_s / 1e9, rates.matmul_flops_per_s / 1e12
    title = f"this CPU at {gb_per_s:.1f} GB/s and {tflops:.2f} TFLOP/s; bar: within {on_cpu.WITHIN:.0%}"
    table = _table(title, "", "measured, ms", "computed", "off", "by two rates", "")
    for row in rows:
        binding = row.binding if row.is_met else f"{row.binding}, MISSED"
        two = f"{row.by_two_rates_ms / row.measured_ms - 1:+.0%}"
        times = f"{row.measured_ms:,.1f}", f"{row.computed_ms:,.1f}"
        table.add_row(f"{row.model}: {row.case}", *times, f"{row.error:+.0%}", two, binding)
    return table


def _ratio_table(found: Sequence[Ratio]) -> Table:
    title = "good requests at this rate with each P:D split of as many workers, simulated whole"
    table = _table(title, "trace", "for", "splits", "by rates", "chosen", "")
    for one in found:
        splits = ", ".join(f"{split} {share:.1%}" for split, share in one.shares)
        table.add_row(
            one.trace, f"{one.rate_per_s:g}/s", splits, one.matched, one.chosen, "the best" if one.is_best else "MISSED"
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if 0 < number < len(columns) - 1 else "left")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("sizing", __doc__)
    add = parser.add_argument
    parts = f"with commas (default: {','.join(_PARTS)})"
    add("--parts", type=names_of(_PARTS), default=_PARTS, metavar="NAMES", help=parts)
    add("--threads", type=positive_int, default=os.cpu_count(), metavar="N", help="of the CPU (default: all cores)")
    add("--rounds", type=positive_int, default=3, metavar="N", help="of each case on the CPU (default: %(default)s)")
    add("--rates", type=output_file, metavar="FILE", help="write what `kvferry size --cpu-rates` takes")
    add("--request-rates", type=positive_float, nargs="+", default=(60.0, 120.0), metavar="X", help="(default: 60 120)")
    add("--requests", type=positive_int, default=2000, metavar="N", help="of each simulation (default: %(default)s)")
    add("--check", action="store_true", help="exit with 1 when a bar is missed")
    add("--json", type=output_file, default=RESULTS_DIR / "sizing.json", metavar="FILE", help="(default: %(default)s)")
    return parser
