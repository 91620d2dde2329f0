"""Step and prompt times on this machine's CPU, computed from what was measured on it, beside an engine's own.

Computed twice: from what each part of a step takes (`probe.py`), which the bar is for, and from two rates, of large
products and of reads of memory (`shared/rates.py`). A machine's speed changes within a minute, so a case and these are
taken in turns: a round is computed from what was taken right before and behind it, and the one with the median error
counts. The engine is a worker's, with its scheduler and step loop. Of a round's steps the best counts: whatever else
runs only takes away.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.benchmarks.shared.long_model import with_positions
from kvferry.benchmarks.shared.rates import MeasuredRates, best_of, measure_rates
from kvferry.benchmarks.shared.shapes import write_shape
from kvferry.benchmarks.sizing.probe import Probe
from kvferry.common.config import EngineConfig
from kvferry.models.default import default_model_dir
from kvferry.sizing.cpu_rates import CpuRates
from kvferry.sizing.figures import Sizer, Time
from kvferry.sizing.hardware import Gpu, measured_cpu, probed_cpu

if TYPE_CHECKING:
    from kvferry.benchmarks.engine.load import LoadedEngine  # which imports torch

WITHIN = 0.15
MODELS = ("built-in", "llama-small", "llama-wide")
_DECODE = ((1, 128), (1, 2048), (8, 512))  # rows, tokens of context
_PREFILL = (512, 2048)
_POSITIONS = 4096
_MEMORY_GB = 1e3  # as much as it takes: it is not what is asked here
_STEPS, _PROMPTS = 48, 2  # of a case in a round
_PROBE_ROUNDS = 3  # some two seconds


@dataclass(slots=True, frozen=True)
class CpuRow:
    """A case: what an engine took, and what was computed."""

    model: str
    case: str
    measured_ms: float
    computed_ms: float
    by_two_rates_ms: float
    binding: str

    @property
    def error(self) -> float:
        return self.computed_ms / self.measured_ms - 1

    @property
    def is_met(self) -> bool:
        return abs(self.error) <= WITHIN


@dataclass(slots=True, frozen=True)
class _Case:
    model: str
    config: EngineConfig
    num_rows: int  # 0: a prompt
    context: int
    run: Callable[[], float]  # seconds


def measure(
    names: tuple[str, ...], scratch: Path, threads: int, rounds: int, tell: Callable[[str], None]
) -> tuple[MeasuredRates, CpuRates, list[CpuRow]]:
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch: as the launcher does for a worker
    import torch

    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    (folder := scratch / "probe").mkdir()
    probe = Probe(folder, threads, tell)
    rates, rows = list[MeasuredRates](), list[CpuRow]()

    def take_rates() -> None:
        probe.measure(_PROBE_ROUNDS)
        rates.append(measure_rates(cpu, torch.bfloat16))

    def in_turns(case: _Case) -> CpuRow:
        found = []
        take_rates()
        for _ in range(rounds):
            seconds = case.run()
            take_rates()
            found.append(_row(case, seconds, best_of(rates[-2:]), probe.rates(sittings=2)))
        return sorted(found, key=lambda row: row.error)[rounds // 2]

    for name in names:
        rows += [in_turns(case) for case in _cases(name, scratch, threads, tell)]
    return best_of(rates), probe.rates(), rows


def _cases(name: str, scratch: Path, threads: int, tell: Callable[[str], None]) -> Iterator[_Case]:
    from kvferry.benchmarks.engine.load import LoadedEngine
    from kvferry.engine.engine import Engine

    built_in = name == "built-in"
    folder = with_positions(default_model_dir(), _POSITIONS, scratch) if built_in else None
    config = EngineConfig(
        model_dir=folder or write_shape(scratch / name, name, _POSITIONS),
        served_model_name=name,
        device="cpu",
        dtype="bfloat16",
        num_threads=threads,
        load_format="auto" if built_in else "dummy",
    )
    tell(f"{name}: loading")
    longest = max(rows * (context + 2 * _STEPS) for rows, context in _DECODE)
    loaded = LoadedEngine(Engine(config, num_blocks=2 * longest // config.block_tokens), seed=0)
    try:
        loaded.prefill(64)
        for rows, context in _DECODE:
            tell(f"{name}: decode {rows}@{context}")
            run = partial(_least_step_s, loaded, rows, context)
            yield _Case(name, config, rows, context + _STEPS // 2, run)
        for tokens in _PREFILL:
            tell(f"{name}: prefill {tokens}")
            yield _Case(name, config, 0, tokens, partial(_least_prompt_s, loaded, tokens))
    finally:
        loaded.close()


def _least_step_s(loaded: LoadedEngine, rows: int, context: int) -> float:
    return min(loaded.decode(rows, context, _STEPS).step_s)


def _least_prompt_s(loaded: LoadedEngine, num_tokens: int) -> float:
    return min(loaded.prefill(num_tokens).elapsed_s for _ in range(_PROMPTS))


def _row(measured: _Case, seconds: float, rates: MeasuredRates, probed: CpuRates) -> CpuRow:
    two = measured_cpu(_MEMORY_GB, rates.read_bytes_per_s / 1e9, rates.matmul_flops_per_s / 1e12)
    time, by_two = (_computed(measured, cpu) for cpu in (probed_cpu(_MEMORY_GB, probed), two))
    rows = measured.num_rows
    case = f"TPOT, {rows} rows at {measured.context}" if rows else f"prefill of {measured.context}"
    by_two_ms = by_two.expected_s * 1e3
    return CpuRow(measured.model, case, seconds * 1e3, time.expected_s * 1e3, by_two_ms, time.binding)


def _computed(measured: _Case, cpu: Gpu) -> Time:
    from kvferry.models.config import ModelConfig

    sizer = Sizer(measured.config, ModelConfig.from_dir(measured.config.model_dir), cpu, measured.context)
    return sizer.decode(measured.num_rows) if measured.num_rows else sizer.prompt(measured.context)
