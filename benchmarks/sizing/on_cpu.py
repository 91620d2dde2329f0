"""Step and prompt times on this machine's CPU, computed from what was measured on it, beside an engine's own.

Computed twice: from what each part of a step takes (`probe.py`), which the bar is for, and from two rates, of large
products and of reads of memory (`shared/rates.py`). Both are taken before and after each case, and the better of these
two is what it is computed from: a machine's speed changes within minutes. The engine is a worker's, with its scheduler
and step loop. Of steps and prompts the best counts: whatever else runs only takes away.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvferry.benchmarks.shared.long_model import with_positions
from kvferry.benchmarks.shared.rates import MeasuredRates, best_of, measure_rates
from kvferry.benchmarks.shared.shapes import write_shape
from kvferry.benchmarks.sizing.probe import Probe
from kvferry.common.config import EngineConfig
from kvferry.models.default import default_model_dir
from kvferry.sizing.cpu_rates import CpuRates
from kvferry.sizing.figures import Sizer, Time
from kvferry.sizing.hardware import Gpu, measured_cpu, probed_cpu

WITHIN = 0.15
MODELS = ("built-in", "llama-small", "llama-wide")
_DECODE = ((1, 128), (1, 2048), (8, 512))  # rows, tokens of context
_PREFILL = (512, 2048)
_POSITIONS = 4096
_MEMORY_GB = 1e3  # as much as it takes: it is not what is asked here
_STEPS = 48


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
class _Measured:
    model: str
    config: EngineConfig
    num_rows: int  # 0: a prompt
    context: int
    seconds: float


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
        probe.measure(2 * rounds)
        tell("rates")
        rates.append(measure_rates(cpu, torch.bfloat16))

    take_rates()
    for name in names:
        for measured in _measure_model(name, scratch, threads, rounds, tell):
            take_rates()
            rows.append(_row(measured, best_of(rates[-2:]), probe.rates(sittings=2)))
    return best_of(rates), probe.rates(), rows


def _measure_model(
    name: str, scratch: Path, threads: int, rounds: int, tell: Callable[[str], None]
) -> Iterator[_Measured]:
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
    loaded = LoadedEngine(Engine(config, num_blocks=2 * longest // config.block_size), seed=0)
    try:
        loaded.prefill(64)
        for rows, context in _DECODE:
            tell(f"{name}: decode {rows}@{context}")
            times = [t for _ in range(rounds) for t in loaded.decode(rows, context, _STEPS).step_s]
            yield _Measured(name, config, rows, context + _STEPS // 2, min(times))
        for tokens in _PREFILL:
            tell(f"{name}: prefill {tokens}")
            yield _Measured(name, config, 0, tokens, min(loaded.prefill(tokens).elapsed_s for _ in range(rounds)))
    finally:
        loaded.close()


def _row(measured: _Measured, rates: MeasuredRates, probed: CpuRates) -> CpuRow:
    two = measured_cpu(_MEMORY_GB, rates.read_bytes_per_s / 1e9, rates.matmul_flops_per_s / 1e12)
    time, by_two = (_computed(measured, cpu) for cpu in (probed_cpu(_MEMORY_GB, probed), two))
    rows = measured.num_rows
    case = f"TPOT, {rows} rows at {measured.context}" if rows else f"prefill of {measured.context}"
    by_two_ms = by_two.expected_s * 1e3
    return CpuRow(measured.model, case, measured.seconds * 1e3, time.expected_s * 1e3, by_two_ms, time.binding)


def _computed(measured: _Measured, cpu: Gpu) -> Time:
    from kvferry.models.config import ModelConfig

    sizer = Sizer(measured.config, ModelConfig.from_dir(measured.config.model_dir), cpu, measured.context)
    return sizer.decode(measured.num_rows) if measured.num_rows else sizer.prompt(measured.context)
