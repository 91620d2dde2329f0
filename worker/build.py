"""A worker is built from its config: the model is loaded, the KV pool registered, the other ranks waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from .. import __version__
from ..common import failpoints
from ..common.clock import SystemClock
from ..common.config import FAILPOINTS_VARIABLE, WorkerConfig, environment
from ..engine.adapters import open_adapters
from ..engine.calibrate import calibrate
from ..engine.disk import open_prefix_cache
from ..engine.engine import Engine
from ..engine.probe import probe
from ..grammar.compiler import GrammarCompiler
from ..grammar.matching import Vocabulary
from ..kvcache.frame_pool import block_pool
from ..transfer.backends.base import TransferBackend
from ..transfer.backends.choose import open_backend, set_ucx_defaults
from ..transfer.protocol.rank_messages import agent_name
from ..transfer.receive.processes import own_mark
from ..wire.address import Address
from ..wire.credentials import SharedSecret
from ..wire.fields import Message
from .deps import WorkerDeps, rows_of_a_step
from .ranks import Followers

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Outlets:
    """`Outlets` are what the parts of a worker call in the process that runs them. From any thread."""

    to_router: Callable[[str, Message], None]
    call_soon: Callable[[Callable[[], None]], None]  # onto the network thread
    on_failure: Callable[[BaseException], None]  # a thread has ended
    progress: Callable[[str, float], None]  # what is being loaded, and which part of it is done


def build_deps(
    config: WorkerConfig, secret: SharedSecret, incarnation: int, followers: Followers, outlets: Outlets
) -> WorkerDeps:
    """Load the model and register the KV pool, here and on the other ranks. Takes seconds. Raises KVFerryError."""
    _arm_failpoints(config)
    set_ucx_defaults(config.host)
    _warn_of_open_ports(config)
    _tell_rows(config)
    group = followers.start()
    engine: Engine = Engine(
        config.engine,
        tp_size=config.engine.tensor_parallel_size,
        group=group,
        progress=outlets.progress,
        cores=config.cores,
    )
    backend, outgoing = (_open_backend(config, incarnation, is_outgoing=is_outgoing) for is_outgoing in (False, True))
    region, _ = (
        one.register(engine.kv_pages, rank=0, tp_size=engine.tp_size, generation=0) for one in (backend, outgoing)
    )
    followers.wait_registered()
    if failpoints.armed:
        failpoints.hit("worker.start")
    own_marks = (own_mark(),) if outgoing.copies_itself else ()
    clock = SystemClock()
    pool = block_pool(
        engine.spec,
        engine.num_blocks,
        stride=engine.kv_pages.shape[1],
        enable_prefix_caching=config.engine.enable_prefix_caching,
    )
    return WorkerDeps(
        config=config,
        secret=secret,
        version=__version__,
        incarnation=incarnation,
        clock=clock,
        engine=engine,
        group=group,
        pool=pool,
        cache=open_prefix_cache(engine, pool, clock, group),
        grammars=GrammarCompiler(lambda: _vocabulary(engine, config), clock),
        adapters=open_adapters(engine, group),
        backend=backend,
        outgoing=outgoing,
        regions=(region, *followers.regions),
        to_router=outlets.to_router,
        call_soon=outlets.call_soon,
        on_failure=outlets.on_failure,
        processes=own_marks + followers.processes,
        samples=calibrate(engine, pool, config.calibration_s) if config.calibration_s else (),
        probe=probe(engine, pool) if config.engine.mixed_quantization else (),
    )


def _arm_failpoints(config: WorkerConfig) -> None:
    failpoints.arm(environment().get(FAILPOINTS_VARIABLE, ""), config.worker_id)
    if failpoints.armed:
        log.warning("failpoints_armed", worker_id=config.worker_id)


def _tell_rows(config: WorkerConfig) -> None:
    """Say once where a step has fewer rows than were asked for."""
    engine = config.engine
    if (num_rows := rows_of_a_step(engine)) < engine.max_num_seqs:
        log.warning(
            "fewer_sequences_in_a_step",
            worker_id=config.worker_id,
            max_num_seqs=engine.max_num_seqs,
            rows=num_rows,
            reason=f"each has a token in it, and max_num_batched_tokens is {engine.max_num_batched_tokens}",
        )


def _warn_of_open_ports(config: WorkerConfig) -> None:
    """Say once what no secret guards."""
    if not Address(config.host, 0).is_loopback:
        log.warning(
            "open_data_plane",
            worker_id=config.worker_id,
            devices=environment().get("UCX_NET_DEVICES", "all"),
            reason="whoever reaches these devices can read and write this worker's memory: keep them on a network "
            "of your own",
        )


def _open_backend(config: WorkerConfig, incarnation: int, *, is_outgoing: bool) -> TransferBackend:
    return open_backend(
        config.transfer.backend, agent_name(config.worker_id, incarnation, 0, 0, is_outgoing=is_outgoing)
    )


def _vocabulary(engine: Engine, config: WorkerConfig) -> Vocabulary:
    """Read what grammars are compiled against."""
    return Vocabulary.from_dir(
        config.engine.model_dir,
        vocab_size=engine.model_config.vocab_size,
        eos_token_ids=engine.model_config.eos_token_ids,
    )
