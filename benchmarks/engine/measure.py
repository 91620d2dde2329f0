"""The engine's cases, run under load and set beside their floors.

Cases -> Measured, one for each case -> (once the rates are final) Case with floor, ratio and bar
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import mean, median
from time import perf_counter
from typing import Literal

from kvferry.benchmarks.engine.cases import WARM_UP_TOKENS, Cases, DecodeCase
from kvferry.benchmarks.engine.load import LoadedEngine
from kvferry.benchmarks.engine.report import Case, decode_name, max_ratio
from kvferry.benchmarks.gpu.timing import gpu_busy_s
from kvferry.benchmarks.shared.floors import Rates, decode_work, prefill_work
from kvferry.sizing.weights import item_bytes

_PROFILED_STEPS = 16


@dataclass(slots=True, frozen=True)
class Measured:
    """One case's times."""

    kind: Literal["decode", "prefill"]
    num_rows: int
    context: int  # as asked for
    mean_context: float  # as it was
    times_s: tuple[float, ...]
    num_steps: int  # of one prompt
    busy_s: float | None = None  # of a decode step: the device computes
    num_drafts: int = 0  # of each row


def measure_cases(loaded: LoadedEngine, cases: Cases, on_case: Callable[[str], None]) -> Iterator[Measured]:
    """Every case in turn; `on_case` hears the name of the one that begins."""
    on_case("warm-up")
    loaded.prefill(WARM_UP_TOKENS)
    for case in cases.decode:
        on_case(decode_name(*case))
        yield _measure_decode(loaded, case, cases)
    for num_tokens in cases.prefill:
        on_case(f"prefill {num_tokens}")
        yield _measure_prefill(loaded, num_tokens, cases)


def _measure_decode(loaded: LoadedEngine, case: DecodeCase, cases: Cases) -> Measured:
    samples = [loaded.decode(*case[:2], cases.num_steps, num_drafts=case.num_drafts) for _ in _rounds(cases)]
    return Measured(
        "decode",
        case.num_rows,
        case.context,
        mean_context=mean(sample.context for sample in samples),
        times_s=tuple(time_s for sample in samples for time_s in sample.step_s),
        num_steps=1,
        busy_s=_busy_step_s(loaded, case) if loaded.engine.kv_pages.is_cuda else None,
        num_drafts=case.num_drafts,
    )


def _busy_step_s(loaded: LoadedEngine, case: DecodeCase) -> float | None:
    def steps() -> None:
        loaded.decode(*case[:2], _PROFILED_STEPS, num_warm_up_steps=0, num_drafts=case.num_drafts)

    total_s = gpu_busy_s(steps)
    return None if total_s is None else total_s / _PROFILED_STEPS


def _measure_prefill(loaded: LoadedEngine, num_tokens: int, cases: Cases) -> Measured:
    samples = [loaded.prefill(num_tokens) for _ in _rounds(cases)]
    times_s = tuple(sample.elapsed_s for sample in samples)
    return Measured("prefill", 1, num_tokens, float(num_tokens), times_s, samples[-1].num_steps)


def _rounds(cases: Cases) -> Iterator[int]:
    began_s = perf_counter()
    for index in range(cases.num_rounds):
        if index and perf_counter() - began_s > cases.max_case_s:
            return
        yield index


def judge(measured: Measured, loaded: LoadedEngine, rates: Rates, shape: str | None) -> Case:
    """Beside its floor. `shape`: the name of a shape that bars are set for."""
    engine = loaded.engine
    model, weight_bytes = engine.model_config, item_bytes(engine.config, engine.model_config)
    if measured.kind == "decode":
        row_bytes = engine.kv_pages.shape[-1] * engine.kv_pages.element_size()
        work = decode_work(model, measured.num_rows, measured.mean_context, weight_bytes, row_bytes)
        work = replace(work, flops=work.flops * (1 + measured.num_drafts))
    else:
        work = prefill_work(model, measured.context, weight_bytes)
    step_s = median(measured.times_s)
    return Case(
        kind=measured.kind,
        num_rows=measured.num_rows,
        context=measured.context,
        median_s=step_s,
        min_s=min(measured.times_s),
        count=len(measured.times_s),
        num_steps=measured.num_steps,
        floor_s=work.floor_s(rates),
        bound=work.bound(rates),
        host_gap=None if measured.busy_s is None else max(0.0, 1 - measured.busy_s / step_s),
        max_ratio=None
        if measured.num_drafts
        else max_ratio(engine.kv_pages.device.type, shape, measured.kind, measured.num_rows, measured.context),
        num_drafts=measured.num_drafts,
    )
