"""The simulated twin of a live deployment: the same router settings, the same pools, this machine's own step times.

tap of a live run ─> step times (measured_steps), blocks and limits (hello), bytes and seconds of transfers
+ what a request costs around its steps, measured on an idle system ─> Scenario
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from kvferry.benchmarks.shared.live_load import Objectives
from kvferry.benchmarks.shared.measured_steps import MeasuredSteps, fit_steps
from kvferry.benchmarks.shared.pools import Pools
from kvferry.benchmarks.shared.step_tap import Tap
from kvferry.common.errors import ConfigError
from kvferry.simulator import Fleet, Goals, Outcome, Router, Scenario, Traffic, simulate
from kvferry.simulator.costs.network import Link, Network
from kvferry.tools.load.stats import Distribution, describe
from kvferry.tools.load.traces import TraceRow

_TYPICAL_LINK = Link(2e9, 0.002)  # where nothing was handed over


@dataclass(slots=True, frozen=True)
class Machine:
    """What the simulator has to know of this machine."""

    steps: MeasuredSteps
    link: Link
    num_blocks: int
    block_tokens: int
    token_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int

    @classmethod
    def from_tap(cls, tap: Tap) -> Machine:
        if not tap.hellos:
            raise ConfigError("no worker has joined the tapped router")
        hello = tap.hellos[0]
        spec = hello.spec
        return cls(
            steps=fit_steps(tap.samples, tap.calibration),
            link=_link(tap),
            num_blocks=min(line.num_blocks for line in tap.hellos),
            block_tokens=spec.block_size,
            token_bytes=spec.block_bytes() // spec.block_size,
            max_num_seqs=hello.max_num_seqs,
            max_num_batched_tokens=hello.max_num_batched_tokens,
        )

    def as_json(self) -> dict[str, object]:
        return {
            "steps": self.steps.as_json(),
            "bytes_per_s": self.link.bytes_per_s,
            "exposed_s": self.link.latency_s,
            "num_blocks": self.num_blocks,
            "block_tokens": self.block_tokens,
            "token_bytes": self.token_bytes,
        }


def _link(tap: Tap) -> Link:
    """A shipment lasts as long as its layers are computed: only what comes after the last one tells of the network."""
    shipped = [line for line in tap.transfers if line.exposed_s > 0 and line.num_bytes]
    if not shipped:
        return _TYPICAL_LINK
    num_layers = tap.hellos[0].spec.num_layers
    return Link(
        max(line.num_bytes / num_layers / line.exposed_s for line in shipped),
        median(line.exposed_s for line in shipped),
    )


def twin(
    machine: Machine,
    rows: Sequence[TraceRow],
    pools: Pools,
    policy: str,
    objectives: Objectives,
    *,
    around_s: float = 0.0,
    seed: int = 0,
) -> Scenario:
    """`around_s`: of a request, beside everything that is simulated."""
    if any(row.block_ids and row.block_tokens % machine.block_tokens for row in rows):
        raise ConfigError(
            f"a shared block of the scaled trace has {rows[0].block_tokens} tokens, a block of the workers "
            f"{machine.block_tokens}: choose --length-scale so that one divides the other"
        )
    return Scenario(
        traffic=Traffic(trace=tuple(rows)),
        fleet=Fleet(
            prefill=pools.prefill,
            decode=pools.decode,
            steps=machine.steps,
            num_blocks=machine.num_blocks,
            block_tokens=machine.block_tokens,
            max_num_seqs=machine.max_num_seqs,
            max_model_len=1 << 20,
            prefill_tokens=machine.max_num_batched_tokens,
            decode_tokens=machine.max_num_batched_tokens,
            gpus_per_worker=1,
            network=Network(machine.link),
            token_bytes=machine.token_bytes,
        ),
        router=Router(policy=policy),
        goals=Goals(objectives.ttft_s, objectives.ttft_stretch, objectives.tpot_s),
        max_tokens=1,  # clients allow as many tokens as the answer has
        router_s=around_s,
        seed=seed,
    )


def lone_ttft_s(scenario: Scenario) -> list[float]:
    """First tokens of requests that come one at a time, in their order. Raises ConfigError where one has none."""
    seen = [request.ttft_s for request in simulate(scenario).requests]
    known = [ttft_s for ttft_s in seen if ttft_s is not None]
    if len(known) < len(seen):
        raise ConfigError(f"{len(seen) - len(known)} of {len(seen)} lone requests were not answered in the simulation")
    return known


def time_around(simulated_s: Sequence[float], live_s: Sequence[float]) -> float:
    """What a lone request takes beyond its simulation."""
    return max(0.0, median(live - simulated for live, simulated in zip(live_s, simulated_s, strict=True)))


@dataclass(slots=True, frozen=True)
class SimulatedFigures:
    """Counted as the live run's are: by the client's view of the same objectives."""

    num_sent: int
    num_good: int
    num_refused: int  # at once, or after a wait
    goodput_per_s: float
    output_tokens_per_s: float
    ttft_ms: Distribution
    tpot_ms: Distribution
    num_local: int
    cached_share: float


def figures_of(outcome: Outcome, objectives: Objectives, span_s: float) -> SimulatedFigures:
    finished = outcome.finished
    ends = [request.end_s for request in finished if request.end_s is not None]
    arrivals = [request.arrival_s for request in outcome.requests]
    duration_s = max(ends) - min(arrivals) if ends else 0.0
    good = sum(
        request.ttft_s is not None
        and request.ttft_s <= objectives.ttft_limit_s(request.num_prompt_tokens)
        and (request.tpot_s is None or request.tpot_s <= objectives.tpot_s)
        for request in finished
    )
    return SimulatedFigures(
        num_sent=len(outcome.requests),
        num_good=good,
        num_refused=len(outcome.requests) - len(finished),
        goodput_per_s=good / span_s,
        output_tokens_per_s=sum(r.num_output_tokens for r in finished) / duration_s if duration_s else 0.0,
        ttft_ms=describe(r.ttft_s * 1e3 for r in finished if r.ttft_s is not None),
        tpot_ms=describe(r.tpot_s * 1e3 for r in finished if r.tpot_s is not None),
        num_local=sum(request.is_local for request in finished),
        cached_share=outcome.hit_rate,
    )
