"""How fast is the handoff beside plain copies of the same bytes, and what of it does a prompt's reader wait for?

    python -m kvferry.benchmarks.handoff [--shapes smollm2-135m,llama-3-8b] [--blocks 64,256,2048] [--device cuda]

Two processes of this machine hand prompts over through the workers' own code: grant, KVOpen, layers, writes, KVArrived,
KVDone. Only the engine is missing. Measured:
1. all layers complete at once: from then until KVDone, for block counts and ways in which the blocks lie in both pools
   (`cases.py`), in turns with process_vm_writev of the same bytes in the same pieces into the other process,
   and with a plain copy of as many bytes inside one process;
2. layers in their time: prompts of 8,192 tokens in chunks, the engine's thread computing in between; what is exposed is
   the time from the last layer to KVDone, as a share of the TTFT that was asked for;
3. cores kept busy by both ends with nothing to move: idle, and with a handoff open that waits for its first layer.

The first round of each case is compared byte by byte (by checksum) and not counted. Bars: 0.8 of writev from 64 MiB on
(scattered blocks too), 1 % of TTFT exposed. Exit code: 0 all bars met, 1 some missed, 2 not measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from kvferry.benchmarks.handoff.cases import SPECS, TABLES
from kvferry.benchmarks.handoff.pair import Plan, open_pair
from kvferry.benchmarks.handoff.report import (
    HandoffReport,
    IdleResult,
    PacedResult,
    SizeResult,
    plot_handoff,
    print_handoff,
    write_handoff,
    write_results,
)
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, names_of, parser_of
from kvferry.common.errors import ConfigError
from kvferry.tools.load.arguments import natural, output_file, positive_float, positive_int
from kvferry.tools.load.cores import CoreUse, wait_until_quiet
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.plot import check_plot_path
from kvferry.tools.load.report import report_console
from kvferry.transfer.backends.choose import set_ucx_defaults

_RESULTS = RESULTS_DIR / "handoff.json"
_MAX_CPU_BYTES, _MAX_CUDA_BYTES = 1 << 30, 4 << 30
_CPU_TTFT_S, _CUDA_TTFT_S = 2.0, 0.25  # of 8,192 tokens: sooner than any engine here has them


def measure(
    plan: Plan, argv: Sequence[str], console: Console, on_result: Callable[[list[SizeResult], list[PacedResult]], None]
) -> HandoffReport:
    """Shape after shape, each with a decode end of its own. `on_result` hears what is measured after each case."""
    sizes: list[SizeResult] = []
    paced: list[PacedResult] = []
    idle: list[IdleResult] = []
    left_out: list[str] = []
    uses: list[CoreUse] = []
    for shape in plan.shapes:
        spec = SPECS[shape]
        left_out += [f"{shape}, {count:,} blocks: over --max-bytes" for count in plan.too_large(spec)]
        with open_pair(plan, spec) as (pair, watch):
            watch.start()
            for num_blocks in plan.sizes(spec):
                for table in plan.tables:
                    console.print(f"{shape}: {num_blocks:,} blocks, {table}", style="dim")
                    sizes.append(pair.measure_size(num_blocks, table))
                    on_result(sizes, paced)
            if plan.has_paced(spec):
                console.print(f"{shape}: {plan.num_paced} prompts of {plan.paced_tokens:,} tokens", style="dim")
                paced.append(pair.measure_paced(plan.tables[-1]))
                on_result(sizes, paced)
            if plan.idle_s and not idle:
                idle = pair.measure_idle()
            uses.append(watch.stop())
    return HandoffReport(
        backend=plan.backend,
        device=plan.device,
        sizes=tuple(sizes),
        paced=tuple(paced),
        idle=tuple(idle),
        left_out=tuple(left_out),
        cores=max(uses, key=lambda use: use.foreign),
        environment=describe_environment("python -m kvferry.benchmarks.handoff", argv),
    )


@benchmark("handoff")
def main(argv: list[str]) -> int:
    """0: every bar was met; 1: some were missed; 2: not measured."""
    flags = _parser().parse_args(argv)
    path: Path = flags.json or _RESULTS
    plot = flags.plot or path.with_suffix(".svg")
    console = Console(stderr=True)
    torch.set_num_threads(1)
    set_ucx_defaults("127.0.0.1")
    check_plot_path(plot)
    if flags.quiet_limit:
        wait_until_quiet(flags.quiet_limit)
    plan = _plan(flags)

    def write(sizes: list[SizeResult], paced: list[PacedResult]) -> None:
        if flags.json is not None:  # what lies where results are kept is replaced once, by all of them
            write_results(sizes, paced, plan.num_results, path)

    report = measure(plan, argv, console, write)
    print_handoff(report, report_console())
    write_handoff(report, path)
    plot_handoff(report, plot)
    console.print(f"written: {path}, {plot}", style="dim")
    return 1 if report.misses else 0


def _plan(flags: argparse.Namespace) -> Plan:
    is_cuda = flags.device == "cuda"
    if is_cuda and not torch.cuda.is_available():
        raise ConfigError("--device cuda: the installed torch sees no GPU here; `kvferry doctor` says why")
    return Plan(
        shapes=flags.shapes or (("llama-3-8b",) if is_cuda else tuple(SPECS)),
        block_counts=flags.blocks,
        tables=flags.tables,
        num_rounds=flags.rounds,
        max_bytes=flags.max_bytes or (_MAX_CUDA_BYTES if is_cuda else _MAX_CPU_BYTES),
        paced_tokens=flags.prompt_tokens,
        chunk_tokens=flags.chunk_tokens,
        ttft_s=flags.ttft or (_CUDA_TTFT_S if is_cuda else _CPU_TTFT_S),
        num_paced=flags.prompts,
        idle_s=flags.idle,
        backend=flags.transfer,
        device=flags.device,
        seed=flags.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("handoff", __doc__)
    add = parser.add_argument
    add("--shapes", type=names_of(SPECS), metavar="NAMES", help=f"of {','.join(SPECS)} (default: all; GPU: the last)")
    add("--blocks", type=_counts, default=(64, 256, 2048), metavar="N,...", help="of a prompt (default: 64,256,2048)")
    add("--tables", type=names_of(TABLES), default=TABLES, metavar="NAMES", help=f"(default: {','.join(TABLES)})")
    add("--rounds", type=positive_int, default=7, metavar="N", help="of each case, after a checked one (default: 7)")
    add("--max-bytes", type=positive_int, metavar="N", help="of a prompt (default: 1 GiB; GPU: 4 GiB)")
    add("--prompt-tokens", type=positive_int, default=8192, metavar="N", help="of paced prompts (default: %(default)s)")
    add("--chunk-tokens", type=positive_int, default=512, metavar="N", help="of one step (default: %(default)s)")
    add("--ttft", type=positive_float, metavar="S", help="of a paced prompt (default: 2; GPU: 0.25)")
    add("--prompts", type=natural, default=3, metavar="N", help="that are paced; 0: none (default: %(default)s)")
    add("--idle", type=float, default=2.0, metavar="S", help="for each idle state; 0: none (default: %(default)g)")
    add("--quiet-limit", type=float, default=30.0, metavar="S", help="to wait for quiet (default: %(default)g)")
    add("--transfer", choices=("nixl", "ucx"), default="nixl", help="(default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: both ends on one card (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the block tables (default: %(default)s)")
    add(
        "--json",
        type=output_file,
        metavar="FILE",
        help=f"grows with each case (default, once all are done: {_RESULTS})",
    )
    add("--plot", type=output_file, metavar="FILE", help="(default: as --json, .svg)")
    return parser


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(map(int, text.split(",")))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text}: want numbers of blocks, as in 64,256")
    return counts
