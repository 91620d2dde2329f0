"""Everything that is asked of Ray: connect, place, start and end an actor. Calls that block go to a thread.

Each worker has a placement group of its own, so that what it takes is free again when it leaves, and a cluster that
scales itself sees what is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import structlog

from ..common.config import WorkerConfig
from ..common.errors import ConfigError
from ..common.extras import RAY
from ..common.logs import configure_logging
from ..common.machine import usable_cpus
from ..wire.credentials import SharedSecret
from ..wire.lifeline import MAX_EVENT_BYTES, Lifeline, decode_event, lifeline_pair
from .children import worker_environment
from .host import Gpu, Host
from .plan import WorkerPlan

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

log = structlog.get_logger(__name__)

_PLACEMENT_TIMEOUT_S = 60.0
_NICENESS = 0  # Ray's own is 15: beside anything else on its cores, a worker would stand still
_HEAD_AWAY_S = 86400  # Ray ends a process that misses the cluster's head for so long; no token passes through it


class RunEnd(NamedTuple):
    """The end of one `run`: the exit code, and what the worker said by then."""

    code: int | None
    error: str = ""  # why it ended
    was_ready: bool = False


class Pulse(NamedTuple):
    """The answer to a ping."""

    life: str  # each process of an actor calls itself otherwise
    is_ready: bool  # the worker


class WorkerActor:
    """One worker inside a Ray actor; `run` is repeated by Ray when the actor had to be started again."""

    def __init__(self) -> None:
        self._life = uuid4().hex
        self._secret = SharedSecret()
        self._word = _Word()
        self._num_threads: int | None = None  # of a rank; asked for once: Ray's head, which knows, may go

    async def run(self, config_json: str, secrets: tuple[bytes, ...], entry: str, loopback: bool) -> RunEnd:
        self._secret = SharedSecret(*secrets)
        config = WorkerConfig.model_validate_json(config_json)
        if not loopback:
            config = config.model_copy(update={"host": node_ip()})
        configure_logging(config.log_level, log_format=config.log_format, worker_id=config.worker_id)
        _take_ordinary_priority()
        if config.engine.num_threads is None:
            if self._num_threads is None:
                self._num_threads = await asyncio.to_thread(_threads_of_a_rank)
            config = _with_threads(config, self._num_threads)
        module, _, name = entry.partition(":")
        # Not on the loop, which answers pings: a worker's libraries may take longer than a hang.
        loaded = await asyncio.to_thread(importlib.import_module, module)
        self._word = word = _Word()
        with word.heard() as lifeline:
            code: int = await getattr(loaded, name)(config, self._secret, lifeline)
        return RunEnd(code, word.error, word.was_ready)

    async def take_secrets(self, secrets: tuple[bytes, ...]) -> None:
        """Go on with others: the first is said, all are believed."""
        self._secret.replace(secrets)

    async def ping(self) -> Pulse:
        """Say who lives here and whether the worker is ready, while the actor's loop turns."""
        return Pulse(self._life, self._word.is_ready)


class _Word:
    """A worker's words over its lifeline, whose other end is in the same process."""

    def __init__(self) -> None:
        self.is_ready = self.was_ready = False
        self.error = ""  # why it ends

    @contextlib.contextmanager
    def heard(self) -> Iterator[Lifeline]:
        """Listen for the length of the block."""
        loop, (ours, theirs) = asyncio.get_running_loop(), lifeline_pair()
        with ours:
            loop.add_reader(ours, self._read, ours)
            try:
                yield Lifeline(theirs, on_lost=lambda: None)  # this end is closed where the worker has ended
            finally:
                loop.remove_reader(ours)
                self._read(ours)
                self.is_ready = False

    def _read(self, ours: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while packet := ours.recv(MAX_EVENT_BYTES):
                event = decode_event(packet) or {}
                if event.get("event") == "ready":
                    self.is_ready = self.was_ready = True
                elif event.get("event") in ("failed", "broke"):
                    self.error = str(event.get("error", ""))


def connect(address: str | None, num_ranks: int) -> None:
    try:
        import ray
    except ImportError:
        raise ConfigError(f"launcher: {RAY.missing}") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing calls home
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", str(_NICENESS))
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(_HEAD_AWAY_S))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            # Not None: Ray would go by RAY_ADDRESS, or by what runs on this machine.
            ray.init("local", num_cpus=max(usable_cpus(), num_ranks), include_dashboard=False, logging_level="warning")
        else:
            ray.init(address, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "could be started here" if address is None else f"at {address}"
        raise ConfigError(f"ray_address: no Ray cluster {where}: {error}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own would end this process at once


async def in_thread(function: Callable[[], None], limit_s: float) -> bool:
    """Say whether a call ended within the limit. One that does not is left to the end of this process."""
    from ray.exceptions import RayError

    ended, loop = asyncio.Event(), asyncio.get_running_loop()

    def run() -> None:
        with contextlib.suppress(RayError, RuntimeError):  # the head is away, or this process is ending
            function()
            loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=run, name="ray", daemon=True).start()
    try:
        async with asyncio.timeout(limit_s):
            await ended.wait()
    except TimeoutError:
        return False
    return True


def cluster_as_host() -> Host:
    """All nodes as one machine: which GPUs there are to share. Its cores are not one worker's: see `fair_threads`."""
    import ray

    resources = ray.cluster_resources()
    gpus = tuple(Gpu(str(index), "", 0, 0) for index in range(int(resources.get("GPU", 0))))
    num_nodes = max(1, len(ray.nodes()))
    return Host(int(resources.get("CPU", 1)), int(resources.get("memory", 0)) // num_nodes, gpus, is_cluster=True)


def _threads_of_a_rank() -> int:
    """Ask Ray how many CPU threads a rank of this actor's worker has. Blocks."""
    import ray
    from ray.util.placement_group import placement_group_table

    node_id = ray.get_runtime_context().get_node_id()
    given = sum(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["NodeID"] == node_id)
    return fair_threads(node_id, min(usable_cpus(), int(given)), placement_group_table().values())


def fair_threads(node_id: str, num_cpus: int, groups: Iterable[Mapping[str, Any]]) -> int:
    """Share a node's cores among the ranks that have a place on it. `groups`: as Ray's table of them has each."""
    places = [
        group["bundles"][index].get("CPU", 0)
        for group in groups
        if group["state"] == "CREATED"
        for index, where in group["bundles_to_node_id"].items()
        if where == node_id
    ]
    return max(1, num_cpus // max(1, int(sum(places))))


def _with_threads(config: WorkerConfig, num_threads: int) -> WorkerConfig:
    """Set the threads of each rank, for libraries that are imported from here on, too."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    return config.model_copy(update={"engine": config.engine.model_copy(update={"num_threads": num_threads})})


def ask_for_place(worker: WorkerPlan) -> PlacementGroup:
    """A request for what one worker needs. It waits in the cluster until there is a node with that much."""
    from ray.util.placement_group import placement_group

    return placement_group([_bundle(worker)], strategy="SPREAD")


async def wait_for_places(workers: Sequence[WorkerPlan], groups: Sequence[PlacementGroup]) -> None:
    """Raises ConfigError if the cluster has no room for all of them."""
    import ray

    try:
        async with asyncio.timeout(_PLACEMENT_TIMEOUT_S):
            for group in groups:
                await group.ready()
    except TimeoutError:
        wanted = [_bundle(worker) for worker in workers]
        there, free = ray.cluster_resources(), ray.available_resources()
        left = " and ".join(f"{free.get(name, 0):g} of {there.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        raise ConfigError(f"the Ray cluster has no room for {wanted}, each on one node: {left} are free") from None


def free_place(group: PlacementGroup) -> None:
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(group)


def create_actor(worker: WorkerPlan, group: PlacementGroup, *, loopback: bool) -> ActorHandle[WorkerActor]:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    env = worker_environment({"UCX_NET_DEVICES": "lo"} if loopback else {}, replace(worker, gpus=()))
    bundle = _bundle(worker)
    return (
        ray.remote(WorkerActor)
        .options(
            name=f"kvferry-{os.getpid()}-{worker.config.worker_id}",
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=8,
            runtime_env={"env_vars": env},
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        )
        .remote()
    )


def _bundle(worker: WorkerPlan) -> dict[str, float]:
    bundle = {"CPU": float(worker.num_ranks)}
    if worker.config.engine.device == "cuda":
        bundle["GPU"] = worker.num_ranks * worker.gpu_share
    return bundle


def _take_ordinary_priority() -> None:
    """Set it for this thread and those it starts: a node may have been started with Ray's niceness."""
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    if niceness > _NICENESS:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
        except PermissionError:
            log.warning("worker_is_nice", niceness=niceness, mend="start Ray's nodes with RAY_worker_niceness=0")


def node_ip() -> str:
    import ray

    return str(ray.util.get_node_ip_address())
