"""Five times more requests than the machine can serve, for a minute.

1. capacity  closed loop: what the system can answer per second
2. 1x        open loop at that rate: goodput (answered whole, first token within the objective), per second
3. 5x        open loop at five times that rate: goodput, what refusals take, the first token of what was admitted, and
             whether memory grows

The server knows the objective (`--ttft-objective-ms`) and refuses at once what it cannot serve in time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from kvferry.benchmarks.shared.live_load import REFUSALS, VOCAB, endpoint_of, sending
from kvferry.tools.chaos.serve_system import System
from kvferry.tools.load.load import LoadResult, PlannedRequest, poisson_arrivals, run_closed_loop, run_open_loop
from kvferry.tools.load.prompts import PromptSource
from kvferry.tools.load.stats import Distribution, describe

TTFT_OBJECTIVE_MS = 2000
OVERLOAD = 5.0
_INPUT_LEN = 128
_OUTPUT_LEN = 16
_CLOSED_LANES = 8


@dataclass(slots=True, frozen=True)
class LoadFigures:
    """One phase."""

    offered_per_s: float
    num_sent: int
    num_good: int
    num_refused: int
    num_failed: int  # neither answered nor refused
    goodput_per_s: float
    ttft_ms: Distribution  # of what was admitted
    refusal_ms: Distribution


@dataclass(slots=True, frozen=True)
class OverloadResult:
    capacity_per_s: float
    single: LoadFigures
    overload: LoadFigures
    memory_mib: tuple[float, float]  # of all processes, before and after the overload


async def measure_overload(system: System, *, duration_s: float, seed: int) -> OverloadResult:
    endpoint = endpoint_of(system)
    prompts, send = PromptSource(seed, VOCAB), sending(endpoint)

    def planned(rate_per_s: float, phase_seed: int) -> Iterator[PlannedRequest]:
        arrivals = poisson_arrivals(rate_per_s, phase_seed)
        return (
            PlannedRequest(index, prompts.make(_INPUT_LEN), _OUTPUT_LEN, at_s)
            for index, at_s in zip(itertools.count(), arrivals, strict=False)
        )

    try:
        await run_closed_loop(planned(float("inf"), seed), send, _CLOSED_LANES, duration_s / 6)  # warm-up
        closed = await run_closed_loop(planned(float("inf"), seed), send, _CLOSED_LANES, duration_s / 2)
        capacity_per_s = sum(record.is_ok for record in closed.records) / closed.duration_s
        single = await run_open_loop(planned(capacity_per_s, seed + 1), send, duration_s)
        before_mib = system.resident_mib()
        over = await run_open_loop(planned(OVERLOAD * capacity_per_s, seed + 2), send, duration_s)
        return OverloadResult(
            capacity_per_s,
            _figures(single, capacity_per_s, duration_s),
            _figures(over, OVERLOAD * capacity_per_s, duration_s),
            (before_mib, system.resident_mib()),
        )
    finally:
        endpoint.close()


def _figures(load: LoadResult, offered_per_s: float, duration_s: float) -> LoadFigures:
    """Goodput counts what came within the phase: what ends after it belongs to the same offered load."""
    answered = [record for record in load.records if record.is_ok]
    refused = [record for record in load.records if record.status in REFUSALS]
    good = [record for record in answered if record.ttft_s is not None and record.ttft_s * 1e3 <= TTFT_OBJECTIVE_MS]
    return LoadFigures(
        offered_per_s=offered_per_s,
        num_sent=len(load.records),
        num_good=len(good),
        num_refused=len(refused),
        num_failed=len(load.records) - len(answered) - len(refused),
        goodput_per_s=len(good) / duration_s,
        ttft_ms=describe(record.ttft_s * 1e3 for record in answered if record.ttft_s is not None),
        refusal_ms=describe((record.e2e_s or 0.0) * 1e3 for record in refused),
    )
