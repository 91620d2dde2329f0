"""What adapters cost: a decode step without, with one and with as many as rows, and how long one takes to load.

    python -m kvferry.benchmarks.adapters                         # the built-in model, one thread, rank 16
    python -m kvferry.benchmarks.adapters --rank 64 --rows 8 --large-rank 256

One engine. Every round runs the same step of each kind, in an order that turns; what counts is the least CPU time of
the rounds, as other programs run beside it. Loads are from the page cache, file to slot: the least of a few by the
clock, and in CPU time; the largest one is for random layers of the model's shape, as many as make a file of --large-gb.
Then a never-seen adapter's first token over HTTP, beside one that is loaded. With --check the exit code is 1 where a
bar breaks.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kvferry.benchmarks.adapters.first_tokens import FirstTokens, measure_first_tokens
from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.plain_steps import cpu_timed, least_ms, num_blocks_of, sequence
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.benchmarks.shared.random_adapter import write_random_adapter
from kvferry.common.batch import Batch, BatchRow
from kvferry.common.config import EngineConfig, LoadFormat
from kvferry.models.default import default_model_dir
from kvferry.tools.load.arguments import output_file, positive_float, positive_int
from kvferry.tools.load.environment import Environment, describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import milliseconds, report_console

if TYPE_CHECKING:
    from kvferry.engine.engine import Engine

# torch is imported inside functions: its threads are settled before.

_MAX_ONE, _MAX_MANY = 1.10, 1.35  # times the step without; with one adapter, and with one for each row
_MAX_ADDED_MS = 50.0  # to the first token by a never-seen adapter
_MAX_MS_OF_GB = 1000.0
_LOADS = 3


@dataclass(slots=True, frozen=True)
class _Slot:
    """Implements `common.adapter.HeldAdapter`."""

    slot: int
    is_open: bool = True
    failure: str = ""


@dataclass(slots=True, frozen=True)
class Load:
    rank: int
    file_bytes: int
    ms: float  # least, by the clock
    cpu_ms: float


@dataclass(slots=True, frozen=True)
class Report:
    model: str
    runner: str
    num_threads: int
    rank: int
    num_rows: int
    step_ms: dict[str, float]  # least CPU time, by number of adapters
    num_rounds: int
    loads: tuple[Load, ...]
    first_tokens: FirstTokens
    environment: Environment

    def bars(self) -> list[Bar]:
        bars, first, none = list[Bar](), self.first_tokens, self.step_ms["0"]
        for name, ms in self.step_ms.items():
            limit = {"0": None, "1": _MAX_ONE}.get(name, _MAX_MANY)
            bars.append(Bar(f"step with {name} adapters / without", ms / none, limit, count=self.num_rounds))
        for load in self.loads:
            limit = _MAX_MS_OF_GB * max(1.0, load.file_bytes / 1e9)
            bars.append(Bar(f"load of {load.file_bytes / 1e6:.0f} MB", load.ms, limit, unit="ms"))
        added_ms, count = first.added_ms, first.num_pairs
        return [*bars, Bar("added to a first token by one never seen", added_ms, _MAX_ADDED_MS, unit="ms", count=count)]


@benchmark("adapters")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(flags.threads)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        report = _measure(flags, Path(folder), argv)
    _print(report, report_console())
    save_json(asdict(report) | {"bars": [bar.as_json() for bar in report.bars()]}, flags.json)
    console.print(f"written: {flags.json}", style="dim")
    return exit_code(report.bars()) if flags.check else 0


def _measure(flags: argparse.Namespace, folder: Path, argv: list[str]) -> Report:
    model_dir: Path = flags.model or default_model_dir()
    engine = _engine(flags, model_dir, max(flags.rank, flags.large_rank), "auto")
    loads = [_load(engine, folder, rank) for rank in dict.fromkeys((flags.rank, flags.large_rank))]
    paths = [folder / f"slot-{slot}" for slot in range(flags.rows)]
    for slot, path in enumerate(paths):
        write_random_adapter(path, engine.model_config, flags.rank, seed=slot)
        _put(engine, slot, path)
    cases: dict[str, list[int | None]] = {"0": [None] * flags.rows, "1": [0] * flags.rows}
    cases[str(flags.rows)] = list(range(flags.rows))
    runs = {name: cpu_timed(_Step(engine, slots, flags.context)) for name, slots in cases.items()}
    step_ms = least_ms(runs, flags.rounds)
    runner = type(engine.runner).__name__
    del runs, engine
    deep_dir = _deepened(model_dir, folder / "deep", flags.large_gb * 1e9 / loads[-1].file_bytes)
    loads.append(_load(_engine(flags, deep_dir, flags.large_rank, "dummy"), folder, flags.large_rank))
    return Report(
        model=model_dir.name,
        runner=runner,
        num_threads=flags.threads,
        rank=flags.rank,
        num_rows=flags.rows,
        step_ms=step_ms,
        num_rounds=flags.rounds,
        loads=tuple(loads),
        first_tokens=measure_first_tokens(
            model_dir, paths, rank=flags.rank, num_slots=2, prompt_len=flags.context, log_dir=folder
        ),
        environment=describe_environment("python -m kvferry.benchmarks.adapters", argv),
    )


def _engine(flags: argparse.Namespace, model_dir: Path, max_rank: int, load_format: LoadFormat) -> Engine:
    from kvferry.engine.engine import Engine

    config = EngineConfig(
        model_dir=model_dir,
        served_model_name=model_dir.name,
        dtype="bfloat16",
        device="cpu",
        num_threads=flags.threads,
        enable_lora=True,
        max_loras=flags.rows if load_format != "dummy" else 1,
        max_lora_rank=max_rank,
        load_format=load_format,
    )
    return Engine(config, num_blocks=num_blocks_of([(flags.rows, flags.context)], config.block_tokens))


def _deepened(model_dir: Path, target: Path, times: float) -> Path:
    """Write the config of a model with so many times the layers."""
    target.mkdir()
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = round(config["num_hidden_layers"] * times)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


class _Step:
    """A decode step whose rows have these adapters; the same one each time."""

    def __init__(self, engine: Engine, slots: list[int | None], context: int) -> None:
        self._engine = engine
        self._rows = [sequence(engine, row, context) for row in range(len(slots))]
        for seq, slot in zip(self._rows, slots, strict=True):
            seq.num_computed_tokens = context - 1
            seq.held_adapter = None if slot is None else _Slot(slot)

    def __call__(self) -> None:
        self._engine.step(Batch([BatchRow(seq, 1) for seq in self._rows]))


def _load(engine: Engine, folder: Path, rank: int) -> Load:
    path = folder / f"load-{rank}-{engine.model_config.num_layers}"
    num_bytes = write_random_adapter(path, engine.model_config, rank, seed=rank)
    times, cpu_times = [], []
    for _ in range(_LOADS):
        began, cpu_began = time.perf_counter(), time.process_time()
        _put(engine, 0, path)
        times.append(time.perf_counter() - began)
        cpu_times.append(time.process_time() - cpu_began)
    return Load(rank, num_bytes, min(times) * 1e3, min(cpu_times) * 1e3)


def _put(engine: Engine, slot: int, path: Path) -> None:
    import torch

    assert engine.adapters is not None
    with torch.inference_mode():
        engine.adapters.clear(slot)
        engine.adapters.put(slot, engine.adapters.read(path)[1])


def _print(report: Report, console: Console) -> None:
    title = f"{report.model}, {report.runner}, {report.num_threads} thread(s), rank {report.rank}"
    table = Table("adapters", "step, CPU ms", title=title, title_justify="left")
    for name, ms in report.step_ms.items():
        table.add_row(name, milliseconds(ms))
    console.print(table)
    table = Table("load: rank", "file MB", "ms", "CPU ms")
    for load in report.loads:
        table.add_row(str(load.rank), f"{load.file_bytes / 1e6:.0f}", milliseconds(load.ms), milliseconds(load.cpu_ms))
    console.print(table)
    first = report.first_tokens
    title = f"first token over HTTP, {first.num_prompt_tokens} tokens, {first.num_pairs} pairs"
    table = Table("adapter", "ms, median", title=title, title_justify="left")
    for name, ms in (("loaded", first.loaded_ms), ("never seen", first.unseen_ms)):
        table.add_row(name, milliseconds(ms))
    console.print(table)
    console.print(bar_table("what adapters cost", report.bars()))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("adapters", __doc__)
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="Hugging Face directory (default: built-in model)")
    add("--threads", type=positive_int, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    add("--rank", type=positive_int, default=16, metavar="N", help="of the adapters (default: %(default)s)")
    add("--large-rank", type=positive_int, default=256, metavar="N", help="of one only loaded (default: %(default)s)")
    add("--large-gb", type=positive_float, default=1.0, metavar="GB", help="of the largest file (default: %(default)s)")
    add("--rows", type=positive_int, default=8, metavar="N", help="of a step (default: %(default)s)")
    add("--context", type=positive_int, default=128, metavar="TOKENS", help="of each row (default: %(default)s)")
    add("--rounds", type=positive_int, default=20, help="(default: %(default)s)")
    add("--check", action="store_true", help="exit with 1 where a bar breaks")
    add(
        "--json", type=output_file, default=RESULTS_DIR / "adapters.json", metavar="FILE", help="(default: %(default)s)"
    )
    return parser
