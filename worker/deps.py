"""`WorkerDeps` is what a worker works with: made once by `build.py`, taken by `worker.py`.

It has two transfer agents over the same pages. Through one of them others write into our pages; it is replaced to
fence a writer. The other one writes into pages elsewhere; it is replaced when its own writes cannot be waited for.
Neither replacement may end what goes the other way.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from ..common.clock import Clock
from ..common.config import EngineConfig, WorkerConfig
from ..engine.adapters import RankAdapters
from ..engine.engine import Engine
from ..engine.ranks.group import RankGroup
from ..grammar.compiler import GrammarCompiler
from ..kvcache.blocks import BlockPool
from ..kvcache.prefix_cache import PrefixCache
from ..transfer.backends.base import TransferBackend
from ..wire.credentials import SharedSecret
from ..wire.fields import Message
from ..wire.grants import ProcessMark, RegionInfo
from ..wire.workers import StepSample, WorkerHello
from .effects import CoreConfig


@dataclass(frozen=True, slots=True)
class WorkerDeps:
    config: WorkerConfig
    secret: SharedSecret
    version: str
    incarnation: int
    clock: Clock
    engine: Engine
    group: RankGroup | None  # the other tensor-parallel ranks
    pool: BlockPool
    cache: PrefixCache  # around it
    grammars: GrammarCompiler
    adapters: RankAdapters | None  # None: none are applied
    backend: TransferBackend  # others write through it
    outgoing: TransferBackend  # we write through it
    regions: tuple[RegionInfo, ...]  # of every rank's `backend`
    to_router: Callable[[str, Message], None]  # from any thread
    call_soon: Callable[[Callable[[], None]], None]  # onto the network thread, from any thread
    on_failure: Callable[[BaseException], None]  # a thread of this worker has ended
    processes: tuple[ProcessMark, ...] = ()  # of every rank, where they may copy into other processes' memory
    samples: tuple[StepSample, ...] = ()  # of the calibration at start-up
    probe: tuple[float, ...] = ()  # log-probabilities of fixed tokens, to be compared with other workers'


def rows_of_a_step(config: EngineConfig) -> int:
    """Return how many sequences decode in a step: each has a token in it."""
    return min(config.max_num_seqs, config.max_num_batched_tokens)


def core_config(
    deps: WorkerDeps, kv_address: str, *, checks_bytes: bool, sums_writes: bool, sums_loans: bool
) -> CoreConfig:
    """Gather what the core is to know, when the handoff's address is known."""
    config, engine = deps.config, deps.engine
    objective_ms = config.engine.tpot_objective_ms
    return CoreConfig(
        worker_id=config.worker_id,
        incarnation=deps.incarnation,
        version=deps.version,
        served_model=config.engine.served_model_name,
        role=config.role,
        spec=engine.spec,
        tp_size=engine.tp_size,
        kv_address=kv_address,
        incoming=deps.backend.name,
        outgoing=deps.outgoing.name,
        transfer=config.transfer,
        eos_token_ids=engine.model_config.eos_token_ids,
        max_model_len=engine.model_config.max_model_len,
        max_num_batched_tokens=config.engine.max_num_batched_tokens,
        max_num_seqs=rows_of_a_step(config.engine),
        num_swap_blocks=engine.num_swap_blocks,
        speculative=config.engine.speculative_config,
        keeps_states=engine.model_config.states is not None,
        tpot_objective_s=None if objective_ms is None else objective_ms / 1e3,
        checks_bytes=checks_bytes,
        sums_writes=sums_writes,
        sums_loans=sums_loans,
    )


def worker_hello(deps: WorkerDeps, kv_address: str) -> WorkerHello:
    """Say what routers are to know of the worker, when the handoff's address is known."""
    config, engine = deps.config.engine, deps.engine
    return WorkerHello(
        worker_id=deps.config.worker_id,
        role=deps.config.role,
        incarnation=deps.incarnation,
        version=deps.version,
        model=config.served_model_name,
        spec=engine.spec,
        tp_size=config.tensor_parallel_size,
        num_blocks=engine.num_blocks,
        max_model_len=engine.model_config.max_model_len,
        max_num_seqs=rows_of_a_step(config),
        max_num_batched_tokens=config.max_num_batched_tokens,
        kv_address=kv_address,
        pid=os.getpid(),
        transport=deps.backend.name,
        can_change_role=True,
        labels=deps.config.labels or (("host", socket.gethostname()),),
        samples=deps.samples,
        quantization=engine.model_config.weights_form,
        probe=deps.probe,
    )
