"""How near native decode of a mixture of experts comes to reading the bytes of its active experts.

    python -m kvferry.benchmarks.experts                       # a Qwen3-MoE of 1.4 GB, random weights, one thread
    python -m kvferry.benchmarks.experts --quantization int8 --rows 1,8
    python -m kvferry.benchmarks.experts --model deepseek-v2 --context 4096 --prompts 512 [--torch]
    python -m kvferry.benchmarks.experts --write DIR           # only the checkpoint, for servers side by side

A step of one row has to read the shared matrices, the head, the experts that its token chooses and its keys and values;
the floor is their bytes at the read rate that is measured before and after, with as many threads. Of several rows the
experts that any of them chooses count, as many as even choices would reach. With --check the exit code is 1 where a
step takes more than 1.2 of its floor.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvferry.benchmarks.engine.cases import check_cases, prefill_cases
from kvferry.benchmarks.experts.models import MODELS
from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.plain_steps import decoding, least_ms, num_blocks_of, prefilling, timed
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.benchmarks.shared.rates import MeasuredRates, best_of, measure_rates
from kvferry.common.config import EngineConfig
from kvferry.models.checkpoint import tensor_shapes
from kvferry.models.config import ModelConfig
from kvferry.models.default import default_model_dir
from kvferry.sizing.hardware import measured_cpu
from kvferry.sizing.shapes import shape_of
from kvferry.tools.load.arguments import output_file, positive_int
from kvferry.tools.load.environment import Environment, describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import milliseconds, report_console

# torch is imported inside functions: its threads are settled before.

MAX_OF_FLOOR = 1.2
_MEMORY_GB = 1e3  # as much as it takes: it is not what is asked here


@dataclass(slots=True, frozen=True)
class Row:
    """Steps of one batch size."""

    num_rows: int
    step_ms: float  # least by the clock
    floor_ms: float

    @property
    def of_floor(self) -> float:
        return self.step_ms / self.floor_ms


@dataclass(slots=True, frozen=True)
class Prompt:
    """A whole prompt."""

    num_tokens: int
    ms: float  # least by the clock


@dataclass(slots=True, frozen=True)
class Report:
    model: str
    runner: str
    quantization: str
    num_threads: int
    context: int
    rates: MeasuredRates
    rows: tuple[Row, ...]
    prompts: tuple[Prompt, ...]
    num_rounds: int
    environment: Environment

    def bars(self) -> list[Bar]:
        return [
            Bar(f"step of {row.num_rows} rows / its floor", row.of_floor, MAX_OF_FLOOR, count=self.num_rounds)
            for row in self.rows
        ]


@benchmark("experts")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    check_cases(flags.rows, flags.prompts)
    os.environ["OMP_NUM_THREADS"] = str(flags.threads)
    console = Console(stderr=True)
    if flags.write is not None:
        _write_checkpoint(flags.write, MODELS[flags.model])
        return 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[flags.model]), encoding="utf-8")
        report = _measure(flags, Path(folder), argv)
    _print(report, report_console())
    save_json(asdict(report) | {"bars": [bar.as_json() for bar in report.bars()]}, flags.json)
    console.print(f"written: {flags.json}", style="dim")
    return exit_code(report.bars()) if flags.check else 0


def _measure(flags: argparse.Namespace, folder: Path, argv: list[str]) -> Report:
    import torch

    from kvferry.engine.engine import Engine

    config = EngineConfig(
        model_dir=folder,
        served_model_name="experts",
        dtype="bfloat16",
        device="cpu",
        num_threads=flags.threads,
        load_format="dummy",
        quantization=flags.quantization,
    )
    torch.set_num_threads(flags.threads)
    rates = [measure_rates(torch.device("cpu"), torch.bfloat16)]
    counts, prompts = flags.rows, flags.prompts
    cases = [*((count, flags.context) for count in counts), *((1, tokens) for tokens in prompts)]
    engine = Engine(config, num_blocks=num_blocks_of(cases, config.block_tokens), native=not flags.torch)
    runs = {str(count): timed(decoding(engine, count, flags.context)) for count in counts}
    runs |= {f"prompt {tokens}": timed(prefilling(engine, tokens)) for tokens in prompts}
    found = least_ms(runs, flags.rounds)
    rates.append(measure_rates(torch.device("cpu"), torch.bfloat16))
    best = best_of(rates)
    cpu = measured_cpu(_MEMORY_GB, best.read_bytes_per_s / 1e9, best.matmul_flops_per_s / 1e12)
    shape = shape_of(config, engine.model_config, cpu, flags.context)
    floors = {n: shape.bytes_read(n) + n * flags.context * shape.kv_bytes_per_token for n in counts}
    return Report(
        model=flags.model,
        runner=type(engine.runner).__name__,
        quantization=engine.model_config.weights_form,
        num_threads=flags.threads,
        context=flags.context,
        rates=best,
        rows=tuple(Row(n, found[str(n)], floors[n] / best.read_bytes_per_s * 1e3) for n in counts),
        prompts=tuple(Prompt(tokens, found[f"prompt {tokens}"]) for tokens in prompts),
        num_rounds=flags.rounds,
        environment=describe_environment("python -m kvferry.benchmarks.experts", argv),
    )


def _write_checkpoint(path: Path, config: dict[str, object]) -> None:
    """Write the model with random weights and the built-in model's tokenizer."""
    import torch
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, shape in tensor_shapes(ModelConfig.from_dir(path)).items():
        drawn = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
        tensors[name] = (drawn if len(shape) > 1 else torch.ones(shape)).to(torch.bfloat16)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(default_model_dir() / name, path / name)


def _print(report: Report, console: Console) -> None:
    title = f"{report.model}; {report.runner}, {report.quantization}, {report.num_threads} thread(s), "
    title += f"{report.rates.read_bytes_per_s / 1e9:.1f} GB/s"
    table = Table("rows", "step, ms", "floor, ms", title=title, title_justify="left")
    for row in report.rows:
        table.add_row(str(row.num_rows), milliseconds(row.step_ms), milliseconds(row.floor_ms))
    console.print(table)
    console.print(bar_table("steps beside their floors", report.bars()))
    for prompt in report.prompts:
        console.print(f"a prompt of {prompt.num_tokens} tokens: {prompt.ms:.0f} ms")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("experts", __doc__)
    add = parser.add_argument
    add("--model", choices=list(MODELS), default="qwen3-moe", help="(default: %(default)s)")
    add("--torch", action="store_true", help="computed by torch in place of C++")
    add("--threads", type=positive_int, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    add("--quantization", metavar="NAME", help="int8 or int4, rounded at load (default: none)")
    add("--rows", type=prefill_cases, default="1,2,8", metavar="N,...", help="of a step (default: %(default)s)")
    add("--prompts", type=prefill_cases, default="", metavar="TOKENS,...", help="whole ones besides (default: none)")
    add("--context", type=positive_int, default=128, metavar="TOKENS", help="of each row (default: %(default)s)")
    add("--rounds", type=positive_int, default=40, help="(default: %(default)s)")
    add("--write", type=Path, metavar="DIR", help="write the model there, and measure nothing")
    add("--check", action="store_true", help="exit with 1 where the bar breaks")
    add("--json", type=output_file, default=RESULTS_DIR / "experts.json", metavar="FILE", help="(default: %(default)s)")
    return parser
