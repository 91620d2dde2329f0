"""Configurations of routers and workers, made from a scenario."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..common.config import TransferConfig
from ..common.kv_spec import KVCacheSpec
from ..common.router_config import RouterConfig
from ..sizing.shapes import ModelShape
from ..sizing.steps import StepModel, StepWork
from ..wire.fields import Labels
from ..wire.grants import RegionInfo
from ..wire.workers import StepSample, WorkerHello
from ..worker.effects import CoreConfig
from ..worker.roles import RoleName
from .jobs import END_IDS
from .scenario import Fleet, Scenario

MODEL = VERSION = TRANSPORT = "simulated"


@dataclass(slots=True, frozen=True)
class WorkerSpec:
    """A worker is made of this, the same for all of a run: their fleet's settings, and what follows from them."""

    fleet: Fleet
    kv: KVCacheSpec
    steps: StepModel
    num_blocks: int
    host_blocks: int
    copy_s: float  # of one block to host memory, or from there
    tpot_objective_s: float | None
    prefix_caching: bool
    jumps: bool


def router_config(scenario: Scenario) -> RouterConfig:
    """Return the config that `kvferry serve` would make from the flags."""
    router, goals = scenario.router, scenario.goals
    objectives: dict[str, float] = {}
    if router.knows_objectives:
        objectives = {
            "ttft_objective_ms": goals.ttft_s * 1e3,
            "ttft_stretch": goals.ttft_stretch,
            "tpot_objective_ms": goals.tpot_s * 1e3,
        }
    return RouterConfig(
        model_dir=Path("."),
        served_model_name=MODEL,
        local_prefill=router.local_prefill,
        max_local_prefill_tokens=router.max_local_prefill_tokens,
        expect_prefill=scenario.fleet.prefill > 0,
        max_queue=router.max_queue,
        policy=router.policy,
        seed=scenario.seed,
        **objectives,
    )


def kv_spec(shape: ModelShape, block_tokens: int) -> KVCacheSpec:
    """Return the contents of blocks. Sizes of heads are anybody's: bytes are told by the shape."""
    return KVCacheSpec(
        model=shape.name,
        num_layers=shape.num_pages or shape.num_layers,
        num_kv_heads=8,
        head_dim=128,
        block_size=block_tokens,
        dtype="bfloat16",
        windows=shape.windows,
        window_slack=shape.window_slack,
    )


def worker_spec(scenario: Scenario, block_tokens: int, hashed: bool) -> WorkerSpec:
    fleet = scenario.fleet
    return WorkerSpec(
        fleet=fleet,
        kv=kv_spec(fleet.shape, block_tokens),
        steps=fleet.step_model(),
        num_blocks=fleet.blocks(block_tokens),
        host_blocks=fleet.host_blocks if hashed else 0,
        copy_s=block_tokens * fleet.kv_token_bytes / fleet.host_bytes_per_s,
        tpot_objective_s=scenario.goals.tpot_s if fleet.has_objective else None,
        prefix_caching=hashed,
        jumps=scenario.jumps,
    )


def unloaded_s(spec: WorkerSpec, num_tokens: int) -> float:
    """Return the time from an empty prefill worker's receipt of a prompt to its first token (seconds): chunks of the
    largest step, one after another.
    """
    total_s, done = 0.0, 0
    while done < num_tokens:
        chunk = min(spec.fleet.prefill_tokens, num_tokens - done)
        total_s += spec.steps.step_s(StepWork(chunk, chunk * (done + chunk // 2)))
        done += chunk
    return total_s


def calibration(spec: WorkerSpec) -> tuple[StepSample, ...]:
    """Return the samples that a worker measures of itself at start-up."""
    budget = max(spec.fleet.prefill_tokens, spec.fleet.decode_tokens)
    works = [
        StepWork(tokens, tokens * (context + tokens // 2), 0, 0)
        for tokens in sorted({16, 64, 256, budget})
        for context in (0, budget)
    ]
    works += [StepWork(0, 0, rows, rows * context) for rows in (1, 4, 16) for context in (16, 1024)]
    return tuple(
        StepSample(
            spec.steps.step_s(work), work.prefill_tokens, work.prefill_pairs, work.decode_rows, work.decode_context
        )
        for work in works
    )


def core_config(spec: WorkerSpec, worker_id: str, incarnation: int, role: RoleName, address: str) -> CoreConfig:
    """Return what a worker's core knows from the start. The largest step is that of the role it starts with."""
    fleet = spec.fleet
    num_tokens = fleet.prefill_tokens if role == "prefill" else fleet.decode_tokens
    return CoreConfig(
        worker_id=worker_id,
        incarnation=incarnation,
        version=VERSION,
        served_model=MODEL,
        role=role,
        spec=spec.kv,
        tp_size=1,  # one shipment stands for those of all ranks, which do the same
        kv_address=address,
        incoming=TRANSPORT,
        outgoing=TRANSPORT,
        transfer=TransferConfig(kv_checksum="off"),
        eos_token_ids=END_IDS,
        max_model_len=fleet.max_model_len,
        max_num_batched_tokens=num_tokens,
        max_num_seqs=min(fleet.max_num_seqs, num_tokens),  # each has a token in a step
        speculative=fleet.drafts.config if fleet.drafts is not None else None,
        keeps_states=fleet.keeps_states,
        tpot_objective_s=spec.tpot_objective_s,
    )


def regions(spec: WorkerSpec, address: str, generation: int) -> tuple[RegionInfo, ...]:
    """Return the agents of a worker, of which there are as many as its core has ranks."""
    region = RegionInfo(
        rank=0,
        tp_size=1,
        agent=f"{address}.{generation}",
        generation=generation,
        agent_metadata=b"",
        base_addr=0,
        num_blocks=spec.num_blocks,
        page_bytes=spec.kv.page_bytes(),
        device="VRAM",
        device_id=0,
        transport=TRANSPORT,
    )
    return (region,)


def hello_of(spec: WorkerSpec, config: CoreConfig, labels: Labels) -> WorkerHello:
    return WorkerHello(
        worker_id=config.worker_id,
        role=config.role,
        incarnation=config.incarnation,
        version=VERSION,
        model=MODEL,
        spec=spec.kv,
        tp_size=spec.fleet.gpus_per_worker,
        num_blocks=spec.num_blocks,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        kv_address=config.kv_address,
        pid=1,
        transport=TRANSPORT,
        can_change_role=spec.fleet.can_change_role,
        labels=labels,
        samples=calibration(spec),
    )
