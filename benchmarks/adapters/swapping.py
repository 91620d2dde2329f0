"""How soon an adapter that was not there when the server started answers, beside vLLM with the same calls.

    python -m kvferry.benchmarks.adapters.swapping [--systems kvferry-co,vllm-agg] [--adapters 8]

Adapters are new to the server, each in turn: `POST /v1/load_lora_adapter`, a request that names it, the same request
once more, `POST /v1/unload_lora_adapter`. What counts is the sum of the call and of what the first of the two requests
takes longer than the second: who loads in the call and who loads when it is asked for are measured alike. Files are in
the page cache. Prompts have one length and nothing in common; nothing else runs. Medians.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import httpx
from rich.console import Console
from rich.table import Table

from kvferry.benchmarks.adapters.first_tokens import ask_first_token_s
from kvferry.benchmarks.peers.vllm_install import default_venv, ensure_vllm
from kvferry.benchmarks.shared.peers import ADAPTER_RANK, SYSTEMS, VLLM_DTYPES, RunningSystem, Setup, system_names
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.benchmarks.shared.random_adapter import write_random_adapter
from kvferry.common.errors import ConfigError
from kvferry.models.config import ModelConfig
from kvferry.models.default import default_model_dir
from kvferry.tools.load.arguments import output_file, positive_int
from kvferry.tools.load.cores import pin_to_cores
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.prompts import PromptSource
from kvferry.tools.load.report import milliseconds, report_console

_PROMPT_LEN = 128
_MAX_MODEL_LEN = 2048
_NUM_SLOTS = 2
_CALL_LIMIT_S = 120.0


@dataclass(slots=True, frozen=True)
class Swap:
    """One adapter's times, in milliseconds."""

    call_ms: float  # to load it
    first_ms: float  # first token of the first request
    again_ms: float  # of the second

    @property
    def added_ms(self) -> float:
        return self.call_ms + self.first_ms - self.again_ms


@dataclass(slots=True, frozen=True)
class Row:
    system: str
    about: str
    file_bytes: int
    swaps: tuple[Swap, ...]

    @property
    def added_ms(self) -> float:
        return median(swap.added_ms for swap in self.swaps)


@benchmark("swapping")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    console = Console(stderr=True)
    if any(name.startswith("vllm") for name in flags.systems):
        ensure_vllm(flags.peer_venv)
    with tempfile.TemporaryDirectory(prefix="swapping-") as folder:
        rows = [_row(name, flags, Path(folder)) for name in flags.systems]
    _print(rows, report_console())
    environment = describe_environment("python -m kvferry.benchmarks.adapters.swapping", argv)
    save_json(
        {"environment": asdict(environment), "rows": [asdict(row) | {"added_ms": row.added_ms} for row in rows]},
        flags.json,
    )
    console.print(f"written: {flags.json}", style="dim")
    return 0


def _row(name: str, flags: argparse.Namespace, folder: Path) -> Row:
    model_dir: Path = flags.model or default_model_dir()
    model = ModelConfig.from_dir(model_dir)
    max_len = min(_MAX_MODEL_LEN, model.longest_model_len)
    paths = [folder / f"{name}-{number}" for number in range(flags.adapters + _NUM_SLOTS)]
    sizes = [write_random_adapter(path, model, ADAPTER_RANK, seed=seed) for seed, path in enumerate(paths)]
    setup = Setup(
        model_dir=model_dir,
        log_dir=folder,
        peer_venv=flags.peer_venv,
        cores=pin_to_cores(2),
        max_model_len=max_len,
        vllm_dtype=flags.vllm_dtype,
        kvferry_flags=("--max-model-len", str(max_len), "--allow-runtime-lora-updating"),
        adapters=tuple(paths[:_NUM_SLOTS]),
        vllm_env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    )
    with SYSTEMS[name](setup) as system:
        swaps = asyncio.run(_swap_all(system, paths[:_NUM_SLOTS], paths[_NUM_SLOTS:], model.vocab_size))
        return Row(name, system.about, sizes[-1], tuple(swaps))


async def _swap_all(
    system: RunningSystem, known: Sequence[Path], unknown: Sequence[Path], vocab_size: int
) -> list[Swap]:
    prompts = PromptSource(0, vocab_size)

    async def first_token_ms(model: str) -> float:
        return await ask_first_token_s(system.base_url, prompts, _PROMPT_LEN, model) * 1e3

    for path in (*known, *known):  # warm up: products, and the slots
        await first_token_ms(path.name)
    swaps = []
    async with httpx.AsyncClient(base_url=system.base_url, timeout=_CALL_LIMIT_S) as client:

        async def call_ms(what: str, body: dict[str, str]) -> float:
            began = perf_counter()
            answer = await client.post(f"/v1/{what}_lora_adapter", json=body)
            if answer.status_code != 200:
                raise ConfigError(f"/v1/{what}_lora_adapter: {answer.status_code} {answer.text[:200]}")
            return (perf_counter() - began) * 1e3

        for path in unknown:
            loaded_ms = await call_ms("load", {"lora_name": path.name, "lora_path": str(path)})
            swaps.append(Swap(loaded_ms, await first_token_ms(path.name), await first_token_ms(path.name)))
            await call_ms("unload", {"lora_name": path.name})
    return swaps


def _print(rows: Sequence[Row], console: Console) -> None:
    table = Table(title="from the call that loads an adapter to its first token; ms, medians", title_justify="left")
    for column in ("", "file, MB", "call", "first token", "of the next request", "added"):
        table.add_column(column, justify="right")
    for row in rows:
        parts = zip(*((swap.call_ms, swap.first_ms, swap.again_ms) for swap in row.swaps), strict=True)
        times = [*(median(part) for part in parts), row.added_ms]
        table.add_row(row.system, f"{row.file_bytes / 1e6:.0f}", *map(milliseconds, times))
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("adapters.swapping", __doc__)
    add = parser.add_argument
    add("--systems", type=system_names, default=["kvferry-co", "kvferry-pd", "vllm-agg"], metavar="NAMES")
    add("--model", type=Path, metavar="DIR", help="Hugging Face directory (default: the embedded model)")
    add("--adapters", type=positive_int, default=8, metavar="N", help="new ones, of rank 16 (default: %(default)s)")
    add("--vllm-dtype", choices=VLLM_DTYPES, default=VLLM_DTYPES[0], help="(default: %(default)s)")
    add("--peer-venv", type=Path, default=default_venv(), help="vLLM is installed here (default: %(default)s)")
    add("--json", type=output_file, default=RESULTS_DIR / "adapters-swapping.json", help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
