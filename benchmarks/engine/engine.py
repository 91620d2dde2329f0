"""How far an engine step is from what arithmetic allows.

    python -m kvferry.benchmarks.engine                                         # the built-in model on this machine
    python -m kvferry.benchmarks.engine --device cuda --shape llama-3-8b        # a shape with random weights
    python -m kvferry.benchmarks.engine --decode 1@128,8@512 --prefill 128,8192 --threads 1

One engine as a worker would have it, with a worker's scheduler and step loop around it and no network:
1. the machine's rates: large matrix products and reads of memory (again at the end; the best counts);
2. decode: so many rows at so many tokens of context each, time from step to step; with `+4` each row checks four
   drafted tokens, too, and the engine is one that drafts (on a CPU: with exact results);
3. prefill: whole prompts in the chunks that the scheduler cuts, time to the first token.

Each case stands beside its floor (floors.py): the products it needs over the matmul rate, or the bytes over the read
rate, whichever is longer. On CUDA the host's gap is measured too: the share of a decode step in which nothing runs on
the device. Contexts beyond the model's own length are computed like others; answers mean nothing in any case.

Exit code: 0; 1 with --check when a bar is missed; 2 for wrong settings.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console

from kvferry.benchmarks.engine.cases import Cases, check_cases, drafting_cases, prefill_cases
from kvferry.benchmarks.engine.report import EngineReport, plot_engine, print_engine, write_cases, write_engine
from kvferry.benchmarks.shared.long_model import with_positions
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.benchmarks.shared.rates import MeasuredRates, best_of, measure_rates
from kvferry.benchmarks.shared.shapes import SHAPES, write_shape
from kvferry.common.config import EngineConfig, KVCacheDtype, SpeculativeConfig, environment
from kvferry.launch.host import Host, read_host
from kvferry.launch.plan import fit_to_host, plan
from kvferry.models.config import ModelConfig
from kvferry.models.default import default_model_dir
from kvferry.settings.fields import ServeSettings
from kvferry.settings.pools import PoolSettings
from kvferry.sizing.memory import block_tokens
from kvferry.sizing.weights import item_bytes
from kvferry.tools.load.arguments import output_file, positive_float, positive_int
from kvferry.tools.load.cores import CoreWatch
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.plot import check_plot_path
from kvferry.tools.load.report import report_console

# torch is imported inside functions: its threads are settled before.

_RESULTS = RESULTS_DIR / "engine.json"
_DEFAULT_CASES: dict[str, tuple[str, str]] = {
    "cpu": ("1@128,8@512", "128,512,2048,8192,32000"),
    "cuda": ("1@128,8@512,64@4096", "512,2048,8192,32000"),
}


@benchmark("engine")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    console = Console(stderr=True)
    path: Path = flags.json or _RESULTS
    plot: Path = flags.plot or path.with_suffix(".svg")
    check_plot_path(plot)
    with tempfile.TemporaryDirectory(prefix="engine-") as scratch:
        report = _measure(flags, argv, Path(scratch), console)
    print_engine(report, report_console())
    write_engine(report, path)
    plot_engine(report, plot)
    console.print(f"written: {path}, {plot}", style="dim")
    return 1 if flags.check and report.misses else 0


def _measure(flags: argparse.Namespace, argv: list[str], scratch: Path, console: Console) -> EngineReport:
    host = read_host(environment())
    device: Literal["cpu", "cuda"] = "cuda" if host.gpus else "cpu"
    if flags.device != "auto":
        device = flags.device
    cases = _cases(flags, device)
    model_dir = _model_dir(flags, cases, scratch)
    config = worker_config(flags, device, model_dir, host)
    os.environ["OMP_NUM_THREADS"] = str(config.num_threads)  # as the launcher does for a worker
    console.print(f"{model_dir.name}: loading", style="dim")
    return _measure_engine(flags, argv, config, cases, console)


def _cases(flags: argparse.Namespace, device: str) -> Cases:
    decode, prefill = _DEFAULT_CASES[device]
    cases = Cases(
        decode=drafting_cases(decode) if flags.decode is None else flags.decode,
        prefill=prefill_cases(prefill) if flags.prefill is None else flags.prefill,
        num_steps=flags.steps,
        num_rounds=flags.rounds,
        max_case_s=flags.max_case_seconds,
    )
    check_cases(cases.decode, cases.prefill)
    return cases


def _model_dir(flags: argparse.Namespace, cases: Cases, scratch: Path) -> Path:
    if flags.shape is not None:
        return write_shape(scratch / flags.shape, flags.shape, cases.longest)
    model_dir: Path = flags.model or default_model_dir()
    return with_positions(model_dir, cases.longest, scratch)


def worker_config(
    flags: argparse.Namespace, device: Literal["cpu", "cuda"], model_dir: Path, host: Host
) -> EngineConfig:
    """As `kvferry serve` would start one worker that has the machine for itself."""
    settings = ServeSettings(
        device=device,
        dtype=flags.dtype,
        kv_cache_dtype=flags.kv_cache_dtype,
        load_format="dummy" if flags.shape is not None else flags.load_format,
        prefill=PoolSettings(workers=0),
        # Nothing is preempted or evicted here: no gigabytes of pinned memory.
        **({"swap_space": 0, "host_cache_memory_bytes": 0} if device == "cuda" else {}),
    )
    deployment = fit_to_host(plan(settings, model_dir, model_dir.name), host, ModelConfig.from_dir(model_dir))
    engine = deployment.workers[0].config.engine
    given = {"num_threads": flags.threads, "max_num_batched_tokens": flags.max_num_batched_tokens}
    return engine.model_copy(update={name: value for name, value in given.items() if value is not None})


def _measure_engine(
    flags: argparse.Namespace, argv: list[str], config: EngineConfig, cases: Cases, console: Console
) -> EngineReport:
    import torch

    from kvferry.benchmarks.engine.load import LoadedEngine
    from kvferry.benchmarks.engine.measure import Measured, judge, measure_cases
    from kvferry.engine.engine import Engine

    most_rows = max((case.num_rows for case in cases.decode), default=1)
    config = config.model_copy(update={"max_num_seqs": max(config.max_num_seqs, most_rows)})
    if drafts := max((case.num_drafts for case in cases.decode), default=0):
        config = config.model_copy(
            update={"speculative_config": SpeculativeConfig(method="ngram", num_speculative_tokens=drafts)}
        )
    block_size = block_tokens(config, ModelConfig.from_dir(config.model_dir))  # of states more than is asked for
    engine = Engine(config, num_blocks=cases.num_blocks(block_size))
    device = engine.kv_pages.device
    dtype = torch.float32 if item_bytes(config, engine.model_config) == 4 else torch.bfloat16  # of the weights
    watch = CoreWatch(lambda: ())
    watch.start()
    console.print("rates", style="dim")
    rates = [flags.rates or measure_rates(device, dtype)]
    loaded, measured = LoadedEngine(engine, seed=flags.seed), list[Measured]()
    try:
        for case in measure_cases(loaded, cases, lambda name: console.print(name, style="dim")):
            measured.append(case)
            if flags.json is not None:  # what lies where results are kept is replaced once, by all of them
                judged = [judge(each, loaded, rates[0], flags.shape) for each in measured]
                write_cases(judged, len(cases.decode) + len(cases.prefill), flags.json)
    finally:
        loaded.close()
    best = best_of([*rates, *([] if flags.rates else [measure_rates(device, dtype)])])
    return EngineReport(
        model=flags.shape or (flags.model or default_model_dir()).name,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        kv_dtype=engine.spec.dtype,
        num_threads=torch.get_num_threads(),
        max_num_batched_tokens=config.max_num_batched_tokens,
        rates=best,
        cases=tuple(judge(case, loaded, best, flags.shape) for case in measured),
        cores=watch.stop(),
        environment=describe_environment("python -m kvferry.benchmarks.engine", argv),
    )


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("engine", __doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face directory (default: built-in model)")
    source.add_argument("--shape", choices=list(SHAPES), help="random weights of this shape instead of a model")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: %(default)s)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="(default: %(default)s)")
    add("--kv-cache-dtype", choices=get_args(KVCacheDtype), default="auto", help="(default: %(default)s)")
    add("--load-format", choices=["auto", "safetensors", "dummy"], default="auto", help="(default: %(default)s)")
    add("--threads", type=positive_int, metavar="N", help="CPU threads (default: all cores)")
    add("--max-num-batched-tokens", type=positive_int, metavar="N", help="longest chunk (default: a worker's)")
    add(
        "--decode", type=drafting_cases, metavar="ROWS@TOKENS[+DRAFTS],…", help=f"(default: {_DEFAULT_CASES['cpu'][0]})"
    )
    add("--prefill", type=prefill_cases, metavar="TOKENS,…", help=f"(default: {_DEFAULT_CASES['cpu'][1]})")
    add("--steps", type=positive_int, default=64, help="of a decode case in each round (default: %(default)s)")
    add("--rounds", type=positive_int, default=3, help="of each case (default: %(default)s)")
    add("--max-case-seconds", type=positive_float, default=60.0, metavar="S", help="no new round then (default: 60)")
    add("--rates", type=_given_rates, metavar="FLOP/S,BYTES/S", help="count floors from these (default: measured)")
    add("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    add("--check", action="store_true", help="exit with 1 when a bar is missed")
    add(
        "--json",
        type=output_file,
        metavar="FILE",
        help=f"grows with each case (default, once all are done: {_RESULTS})",
    )
    add("--plot", type=output_file, metavar="FILE", help="(default: engine.svg beside the JSON)")
    return parser


def _given_rates(text: str) -> MeasuredRates:
    try:
        matmul, read = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: two numbers, as in 200e9,24e9") from None
    return MeasuredRates(matmul, read, "given", "given")
