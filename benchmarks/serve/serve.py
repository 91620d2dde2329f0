"""How fast is kvferry beside vLLM, seen by the users of a server?

    python -m kvferry.benchmarks.serve [--systems kvferry-co,vllm-agg,kvferry-pd,vllm-pd] [--cells 512/64/4,...]

Each system is started in turn on the same cores and meets the same loads, each a cell INPUT/OUTPUT/IN FLIGHT: random
prompts of one length in closed loop, answers of one length, greedy. The client is vLLM's own (`vllm bench serve`), on
the same cores too. Every run has prompts of its own, and prefix caching is off on both sides. Before a run the
machine has to be quiet; the cores that others used during it are recorded.

Shown for each system and cell: the median over the runs of median TTFT, median TPOT, p99 of the token gaps and output
throughput, with their range; then the ratios of kvferry to vLLM in the same mode and whether they meet their bars.
Failed requests are counted, and a row that has some meets no bar.

`--rounds N` goes through all systems N times. The JSON file is written after each cell; a later call on the same terms
(terms.py) replaces the rows that it measures and keeps the others, also one that is clean and that its system did not
come to. Beyond `--max-model-len` tokens nothing fits; a model with fewer positions is
measured with a config that declares so many.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from pathlib import Path

from rich.console import Console

from kvferry.benchmarks.peers.vllm_install import VLLM_VERSION, default_venv, ensure_vllm
from kvferry.benchmarks.serve.client import DEFAULT_CELLS, Cell, parse_cell
from kvferry.benchmarks.serve.measurement import LONG_INPUT_LEN, Measurement, Plan
from kvferry.benchmarks.serve.plot import plot_serve
from kvferry.benchmarks.serve.report import (
    ORDER,
    TABLE_WIDTH,
    ServeReport,
    load_report,
    print_serve,
    read_report,
    write_report,
)
from kvferry.benchmarks.serve.terms import Terms
from kvferry.benchmarks.shared.long_model import with_positions
from kvferry.benchmarks.shared.peers import (
    ADAPTER_RANK,
    DEFAULT_SYSTEMS,
    VLLM_DTYPES,
    Setup,
    system_names,
)
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.benchmarks.shared.random_adapter import write_random_adapter
from kvferry.common.errors import ConfigError
from kvferry.models.config import ModelConfig
from kvferry.models.default import default_model_dir
from kvferry.tools.load.arguments import natural, output_file, positive_float, positive_int
from kvferry.tools.load.cores import pin_to_cores
from kvferry.tools.load.environment import Environment, describe_environment
from kvferry.tools.load.plot import check_plot_path
from kvferry.tools.load.report import report_console

_KV_GIB = 3  # of each server, on both sides


@benchmark("serve")
def main(argv: list[str]) -> int:
    """0: all was measured, no request failed; 1: some failed; 2: the settings are wrong. Bars do not count here."""
    flags = _parser().parse_args(argv)
    console = Console(stderr=True)
    check_plot_path(flags.plot)
    if flags.show:
        return _show(read_report(flags.json), flags)
    plan = _plan(flags)
    ensure_vllm(flags.peer_venv)  # its client is needed for every system
    setup = _setup(flags)
    environment = describe_environment("python -m kvferry.benchmarks.serve", argv)
    terms = _terms(flags, setup, environment)
    report = ServeReport(terms) if flags.fresh else load_report(flags.json, terms)
    console.print(f"logs: {setup.log_dir}", style="dim")
    measurement = Measurement(plan, setup, environment, report, lambda grown: write_report(grown, flags.json), console)
    measurement.run()
    _show(measurement.report, flags)
    console.print(f"written: {flags.json}, {flags.plot}", style="dim")
    return 0 if measurement.is_clean else 1


def _terms(flags: argparse.Namespace, setup: Setup, environment: Environment) -> Terms:
    return Terms(
        model=setup.served_name + (f", {flags.adapters} adapters" if flags.adapters else ""),
        num_cores=len(setup.cores),
        max_model_len=setup.max_model_len,
        client=f"vllm bench serve {VLLM_VERSION}",
        cpu=environment.cpu,
        vllm_dtype=flags.vllm_dtype,
        kvferry_flags=flags.kvferry_flags,
    )


def _show(report: ServeReport, flags: argparse.Namespace) -> int:
    print_serve(report, report_console(TABLE_WIDTH))
    plot_serve(report, flags.plot)
    return 0


def _plan(flags: argparse.Namespace) -> Plan:
    too_long = [cell for cell in flags.cells if cell.input_len + cell.output_len > flags.max_model_len]
    if too_long:
        raise ConfigError(f"{too_long[0]} is longer than --max-model-len {flags.max_model_len}")
    plan = Plan(
        systems=flags.systems,
        cells=tuple(flags.cells),
        num_runs=flags.runs,
        num_rounds=flags.rounds,
        seed=flags.seed,
        timeout_s=flags.run_timeout,
        quiet_limit_s=flags.quiet_limit,
        has_long_split=flags.long_split,
    )
    if not any(plan.cells_of(system) for system in plan.systems):
        raise ConfigError(f"a split vLLM meets prompts of over {LONG_INPUT_LEN} tokens with --long-split alone")
    return plan


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
    parser = parser_of("serve", __doc__)
    add = parser.add_argument
    default = tuple(name for name in ORDER if name in DEFAULT_SYSTEMS)
    names = f"some of {','.join(ORDER)}, in the order to start them (default: {','.join(default)})"
    add("--systems", type=system_names, default=default, help=names)
    cells = ",".join(f"{cell}x{cell.num_requests}" for cell in DEFAULT_CELLS)
    add("--cells", type=_cells, default=list(DEFAULT_CELLS), help=f"IN/OUT/IN FLIGHT[xREQUESTS] (default: {cells})")
    add("--runs", type=positive_int, default=3, metavar="N", help="of a cell; a long one: 1 (default: %(default)s)")
    add("--rounds", type=positive_int, default=1, metavar="N", help="through all systems (default: %(default)s)")
    add("--model", type=Path, metavar="DIR", help="Hugging Face directory (default: the embedded model)")
    add("--max-model-len", type=positive_int, default=32768, metavar="TOKENS", help="(default: %(default)s)")
    add("--num-cores", type=positive_int, default=2, metavar="N", help="for server and client (default: %(default)s)")
    add("--adapters", type=natural, default=0, metavar="N", help="random ones of rank 16, in turn (default: none)")
    add("--kvferry-flags", default="", metavar="TEXT", help="further flags of `kvferry serve`, in one argument")
    add("--vllm-dtype", choices=VLLM_DTYPES, default=VLLM_DTYPES[0], help="(default: %(default)s)")
    add("--long-split", action="store_true", help=f"prompts of over {LONG_INPUT_LEN} tokens to a split vLLM, too")
    add("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    add("--run-timeout", type=positive_float, default=900.0, metavar="S", help="for one run (default: %(default)g)")
    add(
        "--quiet-limit",
        type=float,
        default=45.0,
        metavar="S",
        help="to wait for a quiet machine (default: %(default)g)",
    )
    add("--peer-venv", type=Path, default=default_venv(), help="vLLM is installed here (default: %(default)s)")
    add("--log-dir", type=Path, metavar="DIR", help="of servers and clients (default: a new temporary directory)")
    add("--json", type=output_file, default=RESULTS_DIR / "serve.json", metavar="FILE", help="(default: %(default)s)")
    add("--plot", type=output_file, default=RESULTS_DIR / "serve.svg", metavar="FILE", help="(default: %(default)s)")
    add("--fresh", action="store_true", help="forget the rows that the JSON file has")
    add("--show", action="store_true", help="measure nothing: table and plot of the JSON file")
    return parser


def _cells(text: str) -> list[Cell]:
    try:
        return [parse_cell(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
