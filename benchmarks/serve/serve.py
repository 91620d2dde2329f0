"""How fast is kvferry beside vLLM, seen by the users of a server?

    python -m kvferry.benchmarks.serve [--systems kvferry-co,vllm-agg,kvferry-pd,vllm-pd] [--cells 512/64/4,...]

Each system is started in turn on the same cores and meets the same loads, each a cell INPUT/OUTPUT/IN FLIGHT: random
prompts of one length in closed loop, answers of one length, greedy. The client is vLLM's own (`vllm bench serve`), on
the same cores too. Every run has prompts of its own, and prefix caching is off on both sides. Before a run the
machine has to be quiet; the cores that others used during it are recorded.

Shown for each system and cell: the median over the runs of median TTFT, median TPOT, p99 of the token gaps and output
throughput, with their range; then the ratios of kvferry to vLLM in the same mode and whether they meet their bars.
Failed requests are counted, and a row that has some meets no bar.

`--rounds N` goes through all systems N times. The JSON file is written after each cell; a later call replaces the rows
that it measures and keeps the others. Beyond `--max-model-len` tokens nothing fits; a model with fewer positions is
measured with a config that declares so many.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from kvferry.benchmarks.peers.vllm_install import VLLM_VERSION, default_venv, ensure_vllm
from kvferry.benchmarks.serve.client import DEFAULT_CELLS, Cell, ClientRun, failed_run, parse_cell, run_client, seed_of
from kvferry.benchmarks.serve.plot import plot_serve
from kvferry.benchmarks.serve.report import (
    ORDER,
    TABLE_WIDTH,
    Row,
    ServeReport,
    Terms,
    load_report,
    print_serve,
    read_report,
    write_report,
)
from kvferry.benchmarks.shared.long_model import with_positions
from kvferry.benchmarks.shared.peers import (
    ADAPTER_RANK,
    DEFAULT_SYSTEMS,
    SYSTEMS,
    VLLM_DTYPES,
    RunningSystem,
    Setup,
    system_names,
)
from kvferry.benchmarks.shared.random_adapter import write_random_adapter
from kvferry.common.errors import ConfigError
from kvferry.models.config import ModelConfig
from kvferry.models.default import default_model_dir
from kvferry.tools.load.cores import pin_to_cores, processes
from kvferry.tools.load.environment import Environment, describe_environment
from kvferry.tools.load.plot import check_plot_path
from kvferry.tools.load.report import RESULTS_DIR, milliseconds, report_console

_KV_GIB = 3  # of each server, on both sides
_LONG_INPUT_LEN = 16384  # a longer prompt takes a server minutes: one run of it, and none on half of the cores
_NOT_FOR_LONG = ("vllm-pd", "vllm-pd-shared")


@dataclass(slots=True, frozen=True)
class Plan:
    """What is measured."""

    systems: tuple[str, ...]
    cells: tuple[Cell, ...]
    num_runs: int
    num_rounds: int
    seed: int
    timeout_s: float
    quiet_limit_s: float
    quiet_sample_s: float = 1.0
    has_long_split: bool = False  # long prompts to a split peer, too

    def cells_of(self, system: str) -> list[Cell]:
        takes_long = self.has_long_split or system not in _NOT_FOR_LONG
        return [cell for cell in self.cells if takes_long or cell.input_len <= _LONG_INPUT_LEN]

    def num_runs_of(self, cell: Cell) -> int:
        return self.num_runs if cell.input_len <= _LONG_INPUT_LEN else 1


@dataclass(slots=True)
class Measurement:
    """Goes through the systems, and hands on a report that has grown after each cell."""

    plan: Plan
    setup: Setup
    environment: Environment
    report: ServeReport
    save: Callable[[ServeReport], None]
    console: Console
    runs: dict[tuple[str, str], list[ClientRun]] = field(default_factory=dict)  # of this measurement

    def run(self) -> None:
        for round_number in range(self.plan.num_rounds):
            for name in self.plan.systems:
                self._run_system(name, round_number)

    def _run_system(self, name: str, round_number: int) -> None:
        """One that does not start, or is gone, leaves failed runs in the cells that it did not come to."""
        waiting = self.plan.cells_of(name)
        if not waiting:
            return
        self._say(f"{name}: starting")
        about = name
        try:
            with SYSTEMS[name](self.setup) as system:
                about = system.about
                while waiting:
                    _check_alive(system, name)
                    self._add(name, about, waiting[0], self._run_cell(system, name, waiting[0], round_number))
                    waiting.pop(0)
        except ConfigError as error:
            self.console.print(f"{name}: {error}", markup=False, style="red", soft_wrap=True)
            for cell in waiting:
                seed = seed_of(self.plan.seed, cell, round_number, 0)
                self._add(name, about, cell, [failed_run(cell, round_number, seed, str(error))])

    def _run_cell(self, system: RunningSystem, name: str, cell: Cell, round_number: int) -> list[ClientRun]:
        runs = []
        for run_number in range(self.plan.num_runs_of(cell)):
            run = run_client(
                system,
                self.setup,
                cell,
                label=f"{name}-{str(cell).replace('/', '-')}-{round_number}-{run_number}",
                round_number=round_number,
                seed=seed_of(self.plan.seed, cell, round_number, run_number),
                timeout_s=self.plan.timeout_s,
                quiet_limit_s=self.plan.quiet_limit_s,
                quiet_sample_s=self.plan.quiet_sample_s,
            )
            runs.append(run)
            self._say(f"{name} {cell}, run {run_number + 1}: {_in_words(run)}")
        return runs

    def _add(self, name: str, about: str, cell: Cell, runs: Sequence[ClientRun]) -> None:
        measured = self.runs.setdefault((name, str(cell)), [])
        measured += runs
        self.report = self.report.with_row(Row(name, cell, about, self.environment, tuple(measured)))
        self.save(self.report)

    def _say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _check_alive(system: RunningSystem, name: str) -> None:
    table = processes()
    gone = [pid for pid in system.pids if pid not in table or table[pid].is_zombie]
    if gone:
        raise ConfigError(f"{name}: its process {gone[0]} has ended")


def _in_words(run: ClientRun) -> str:
    figures = (
        f"TTFT {milliseconds(run.median_ttft_ms)} ms, TPOT {milliseconds(run.median_tpot_ms)} ms, "
        f"{milliseconds(run.output_tokens_per_s)} tokens/s"
    )
    foreign = f", foreign {run.cores.foreign:.2f}" if run.cores else ""
    return figures + foreign + (f", {run.num_failed} FAILED: {'; '.join(run.problems)}" if not run.is_clean else "")


def main(argv: list[str] | None = None) -> int:
    """0: all was measured, no request failed; 1: some failed; 2: the settings are wrong. Bars do not count here."""
    argv = sys.argv[1:] if argv is None else argv
    flags = _parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        check_plot_path(flags.plot)
        if flags.show:
            return _show(read_report(flags.json), flags)
        plan = _plan(flags)
        ensure_vllm(flags.peer_venv)  # its client is needed for every system
        setup = _setup(flags)
        model = setup.served_name + (f", {flags.adapters} adapters" if flags.adapters else "")
        terms = Terms(model, len(setup.cores), setup.max_model_len, f"vllm bench serve {VLLM_VERSION}")
        report = ServeReport(terms) if flags.fresh else load_report(flags.json, terms)
    except ConfigError as error:
        console.print(f"serve: {error}", markup=False, style="red", soft_wrap=True)
        return 2
    environment = describe_environment("python -m kvferry.benchmarks.serve", argv)
    console.print(f"logs: {setup.log_dir}", style="dim")
    measurement = Measurement(plan, setup, environment, report, lambda grown: write_report(grown, flags.json), console)
    measurement.run()
    _show(measurement.report, flags)
    console.print(f"written: {flags.json}, {flags.plot}", style="dim")
    return 0 if all(run.is_clean for runs in measurement.runs.values() for run in runs) else 1


def _show(report: ServeReport, flags: argparse.Namespace) -> int:
    print_serve(report, report_console(TABLE_WIDTH))
    plot_serve(report, flags.plot)
    return 0


def _plan(flags: argparse.Namespace) -> Plan:
    too_long = [cell for cell in flags.cells if cell.input_len + cell.output_len > flags.max_model_len]
    if too_long:
        raise ConfigError(f"{too_long[0]} is longer than --max-model-len {flags.max_model_len}")
    return Plan(
        systems=tuple(flags.systems),
        cells=tuple(flags.cells),
        num_runs=flags.runs,
        num_rounds=flags.rounds,
        seed=flags.seed,
        timeout_s=flags.run_timeout,
        quiet_limit_s=flags.quiet_limit,
        has_long_split=flags.long_split,
    )


def _setup(flags: argparse.Namespace) -> Setup:
    kvferry = ["--no-enable-prefix-caching", "--max-model-len", str(flags.max_model_len)]
    kvferry += ["--kv-cache-memory-bytes", f"{_KV_GIB}GiB", *shlex.split(flags.kvferry_flags)]
    model_dir = with_positions(flags.model or default_model_dir(), flags.max_model_len)
    log_dir = flags.log_dir or Path(tempfile.mkdtemp(prefix="serve-"))
    adapters = tuple(log_dir / f"adapter-{number}" for number in range(flags.adapters))
    for number, path in enumerate(adapters):
        write_random_adapter(path, ModelConfig.from_dir(model_dir), ADAPTER_RANK, seed=number)
    return Setup(
        model_dir=model_dir,
        log_dir=log_dir,
        adapters=adapters,
        peer_venv=flags.peer_venv,
        cores=pin_to_cores(flags.num_cores),
        max_model_len=flags.max_model_len,
        vllm_kv_gib=_KV_GIB,
        vllm_dtype=flags.vllm_dtype,
        kvferry_flags=tuple(kvferry),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvferry.benchmarks.serve", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    default = [name for name in ORDER if name in DEFAULT_SYSTEMS]
    names = f"some of {','.join(ORDER)}, in the order to start them (default: {','.join(default)})"
    add("--systems", type=system_names, default=default, help=names)
    cells = ",".join(f"{cell}x{cell.num_requests}" for cell in DEFAULT_CELLS)
    add("--cells", type=_cells, default=list(DEFAULT_CELLS), help=f"IN/OUT/IN FLIGHT[xREQUESTS] (default: {cells})")
    add(
        "--runs",
        type=_count,
        default=3,
        metavar="N",
        help="of each cell; one of a very long one (default: %(default)s)",
    )
    add("--rounds", type=_count, default=1, metavar="N", help="through all systems (default: %(default)s)")
    add("--model", type=Path, metavar="DIR", help="Hugging Face directory (default: the embedded model)")
    add("--max-model-len", type=_count, default=32768, metavar="TOKENS", help="(default: %(default)s)")
    add(
        "--num-cores", type=_count, default=2, metavar="N", help="for server and client together (default: %(default)s)"
    )
    add(
        "--adapters", type=int, default=0, metavar="N", help="random ones of rank 16, asked for in turn (default: none)"
    )
    add("--kvferry-flags", default="", metavar="TEXT", help="further flags of `kvferry serve`, in one argument")
    add("--vllm-dtype", choices=VLLM_DTYPES, default=VLLM_DTYPES[0], help="(default: %(default)s)")
    add("--long-split", action="store_true", help=f"prompts of over {_LONG_INPUT_LEN} tokens to a split vLLM, too")
    add("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    add("--run-timeout", type=float, default=900.0, metavar="S", help="for one run (default: %(default)g)")
    add(
        "--quiet-limit",
        type=float,
        default=45.0,
        metavar="S",
        help="to wait for a quiet machine (default: %(default)g)",
    )
    add("--peer-venv", type=Path, default=default_venv(), help="vLLM is installed here (default: %(default)s)")
    add("--log-dir", type=Path, metavar="DIR", help="of servers and clients (default: a new temporary directory)")
    add("--json", type=Path, default=RESULTS_DIR / "serve.json", metavar="FILE", help="(default: %(default)s)")
    add("--plot", type=Path, default=RESULTS_DIR / "serve.svg", metavar="FILE", help="(default: %(default)s)")
    add("--fresh", action="store_true", help="forget the rows that the JSON file has")
    add("--show", action="store_true", help="measure nothing: table and plot of the JSON file")
    return parser


def _cells(text: str) -> list[Cell]:
    try:
        return [parse_cell(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
