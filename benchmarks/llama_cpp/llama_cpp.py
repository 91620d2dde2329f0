"""How fast GGUF files are here, beside llama.cpp: the same files, prompts and steps, in turns.

    python -m venv /tmp/llama && CMAKE_ARGS=-DGGML_NATIVE=ON /tmp/llama/bin/pip install llama-cpp-python
    python -m kvferry.benchmarks.llama_cpp --peer /tmp/llama/bin/python          # the built-in model, one thread
    python -m kvferry.benchmarks.llama_cpp --peer … --gguf FILE.gguf --kinds Q8_0,Q4_K_M --threads 2

llama.cpp's own tool makes a file of each kind out of the given one (requantized: for speed that is the same). Each side
then computes whole prompts, and steps that feed one token to each of some rows, without a server around it. What counts
is the least CPU time of the rounds, over all threads, as other programs run beside it. With --check the exit code is 1
where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from kvferry.benchmarks.engine.cases import check_cases, decode_cases, prefill_cases
from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.plain_steps import cpu_timed, decoding, least_ms, num_blocks_of, prefilling
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, names_of, parser_of
from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError
from kvferry.models.default import find_gguf, gguf_model_dir
from kvferry.tools.load.arguments import output_file, positive_int
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import milliseconds, report_console

# torch is imported inside functions: its threads are settled before.

KINDS = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15, "Q6_K": 18}  # llama.h, enum llama_ftype
PREFILL_BAR, DECODE_BAR = 0.8, 0.95  # times llama.cpp's
_PEER = Path(__file__).with_name("peer.py")


@dataclass(slots=True, frozen=True)
class Case:
    kind: str
    name: str
    ours_ms: float  # least CPU time
    theirs_ms: float
    bar: float
    num_rounds: int

    @property
    def ratio(self) -> float:
        return self.ours_ms / self.theirs_ms


@benchmark("llama_cpp")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(flags.threads)
    console = report_console()
    cases: list[Case] = []
    check_cases(flags.decode, flags.prefill)
    source = flags.gguf or find_gguf()
    with tempfile.TemporaryDirectory() as folder:
        for kind in flags.kinds:
            file = Path(folder) / f"{kind}.gguf"
            _quantize(flags.peer, source, file, kind)
            cases += _measure(flags, kind, file)
    table = Table(title=f"{source.name}, {flags.threads} thread(s), CPU ms", title_justify="left")
    for column in ("file", "case", "kvferry", "llama.cpp"):
        table.add_column(column, justify="left" if column in ("file", "case") else "right")
    for case in cases:
        table.add_row(case.kind, case.name, milliseconds(case.ours_ms), milliseconds(case.theirs_ms))
    console.print(table)
    bars = [Bar(f"{case.kind}, {case.name}", case.ratio, case.bar, count=case.num_rounds) for case in cases]
    console.print(bar_table("of llama.cpp's time", bars))
    environment = describe_environment("python -m kvferry.benchmarks.llama_cpp", argv)
    body: dict[str, object] = {"cases": [asdict(case) for case in cases], "bars": [bar.as_json() for bar in bars]}
    save_json({**body, "environment": asdict(environment)}, flags.json)
    return exit_code(bars) if flags.check else 0


def _quantize(python: str, source: Path, target: Path, kind: str) -> None:
    command = [python, "-P", str(_PEER), "quantize", str(source), str(target), str(KINDS[kind])]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(f"--peer {python}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"llama.cpp made no {kind} of {source}: {error.stderr.strip()[-300:]}") from error


def _measure(flags: argparse.Namespace, kind: str, file: Path) -> Iterator[Case]:
    from kvferry.engine.engine import Engine

    with tempfile.TemporaryDirectory() as cache:
        model_dir = gguf_model_dir(file, cache=Path(cache))
        config = EngineConfig.model_validate(
            {
                "model_dir": model_dir,
                "served_model_name": kind,
                "dtype": "bfloat16",
                "device": "cpu",
                "num_threads": flags.threads,
                "cpu_isa": flags.cpu_isa,
            }
        )
        sizes = [*flags.decode, *((1, tokens) for tokens in flags.prefill)]
        engine = Engine(config, num_blocks=num_blocks_of(sizes, config.block_tokens))
    num_cells = max(rows * (tokens + 64) for rows, tokens in sizes)
    with _peer(flags.peer, file, flags.threads, num_cells) as ask:
        for tokens in flags.prefill:
            ours, theirs = prefilling(engine, tokens), partial(ask, {"prompt": tokens})
            yield _case(kind, f"prefill {tokens}", ours, theirs, PREFILL_BAR, flags.prompt_rounds)
        for rows, context in flags.decode:
            ours, theirs = decoding(engine, rows, context), partial(ask, {"rows": rows, "context": context})
            yield _case(kind, f"decode {rows}@{context}", ours, theirs, DECODE_BAR, flags.rounds)


def _case(kind: str, name: str, ours: Callable[[], None], theirs: Callable[[], float], bar: float, rounds: int) -> Case:
    times = least_ms({"ours": cpu_timed(ours), "theirs": theirs}, rounds)
    return Case(kind, name, times["ours"], times["theirs"], bar, rounds)


@contextmanager
def _peer(python: str, file: Path, threads: int, num_cells: int) -> Iterator[Callable[[dict[str, Any]], float]]:
    """Start llama.cpp on a file; yields what asks it for a case's CPU time (s)."""
    command = [python, "-P", str(_PEER), "steps", str(file), str(threads), str(num_cells)]
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    peer = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing, text=True)
    assert peer.stdin is not None and peer.stdout is not None
    stdin, stdout = peer.stdin, peer.stdout

    def line() -> str:
        if not (text := stdout.readline()):
            raise ConfigError(f"llama.cpp ended with exit code {peer.wait()}")
        return text

    def ask(case: dict[str, Any]) -> float:
        stdin.write(json.dumps(case) + "\n")
        stdin.flush()
        return float(line())

    try:
        line()
        yield ask
    finally:
        stdin.close()
        peer.wait()


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("llama_cpp", __doc__)
    add = parser.add_argument
    add("--peer", required=True, metavar="PYTHON", help="an interpreter that has llama-cpp-python")
    add("--gguf", type=Path, metavar="FILE", help="(default: that of the built-in model)")
    kinds = ("Q4_0", "Q4_K_M", "Q8_0")
    add("--kinds", type=names_of(KINDS), default=kinds, metavar="KIND,…", help=f"of {', '.join(KINDS)}")
    add("--threads", type=positive_int, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    add("--cpu-isa", default="auto", help="the instruction set of kvferry's side (default: %(default)s)")
    add("--decode", type=decode_cases, default=decode_cases("1@128,8@128"), metavar="ROWS@TOKENS,…")
    add("--prefill", type=prefill_cases, default=(512, 2048), metavar="TOKENS,…")
    add("--rounds", type=positive_int, default=30, metavar="N", help="of a decode case (default: %(default)s)")
    add("--prompt-rounds", type=positive_int, default=5, metavar="N", help="of a prompt (default: %(default)s)")
    add("--check", action="store_true", help="exit with 1 where a bar is missed")
    add(
        "--json",
        type=output_file,
        default=RESULTS_DIR / "llama_cpp.json",
        metavar="FILE",
        help="(default: %(default)s)",
    )
    return parser
