"""Starts a deployment, watches it and ends it: processes on this machine, or workers as actors on a Ray cluster.

    routers up (their control addresses are known) -> workers up -> every router is ready -> announced
    -> children that end or hang are started again; restart: one after the other, while the others serve
    -> stop, drain: all of them are gone when `run` returns

Routers are local children in both cases. A worker does the same work under both launchers, and no request ever
passes through here. This is the only module that imports ray, inside what needs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from .common.channel import Address
from .common.children import ROUTER_PROGRAM, WORKER_PROGRAM, child_environment, worker_child, worker_environment
from .common.clock import Clock
from .common.config import WorkerConfig
from .common.cores import CoreBoard
from .common.errors import ConfigError
from .common.host import Gpu, Host, usable_cpus
from .common.logs import configure_logging
from .common.plan import Deployment, WorkerPlan, fit_to_host
from .common.process import ChildTimes, Stopper
from .common.progress import Display
from .common.rolling import roll
from .common.routers import RouterGroup

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

_ACTOR_PING_EVERY_S = 1.0
_ACTOR_HANG_AFTER_S = 30.0
_PLACEMENT_TIMEOUT_S = 60.0
_ACTOR_GRACE_S = 5.0
_RAY_END_S = 10.0  # for all calls to a cluster at the end: its head may be gone
_HEAD_AWAY_S = 86400  # Ray ends a process that misses the cluster's head for so long; no token passes through it
_DRAIN_SLACK_S = 10.0  # to SIGKILL, after a child should have ended by itself


class Launcher(Protocol):
    """Owns the processes of one deployment."""

    async def run(self) -> None:
        """Until `stop`, or until something cannot start (raises). Nothing is left behind either way."""
        ...

    def stop(self) -> None:
        """End everything soon; at once, if it is ending already."""
        ...

    def drain(self) -> None:
        """Take nothing new, let what runs finish within its limit, then end; at once, if it is ending already."""
        ...

    def restart(self) -> None:
        """Restart every process, one after the other, while the others serve."""
        ...


class LocalLauncher:
    """Router and workers as child processes of this one."""

    def __init__(
        self,
        deployment: Deployment,
        env: Mapping[str, str],
        clock: Clock,
        display: Display,
        *,
        on_serving: Callable[[Address], None] = lambda http: None,
        router_program: tuple[str, ...] = ROUTER_PROGRAM,
        worker_program: tuple[str, ...] = WORKER_PROGRAM,
        times: ChildTimes | None = None,
    ) -> None:
        env = child_environment(env, deployment.secret, loopback=True)
        times = times or _child_times(deployment)
        self._display = display
        self._clock = clock
        self._on_serving = on_serving
        self._stopper = Stopper()
        self._rolling: asyncio.Task[bool] | None = None
        self._tasks: asyncio.TaskGroup | None = None  # while everything serves
        self.routers = RouterGroup(
            deployment.router,
            deployment.num_routers,
            env,
            clock,
            display,
            program=router_program,
            times=times,
            on_restart_wanted=self.restart,
        )
        self._cores = CoreBoard(max(1, len(deployment.workers)))
        self._roles = {worker.config.worker_id: worker.config.role for worker in deployment.workers}
        self.workers = [
            worker_child(
                _share_cores(worker, self._cores, index),
                lambda: self.routers.controls,
                env,
                clock,
                self.routers.on_event,
                program=worker_program,
                times=times,
            )
            for index, worker in enumerate(deployment.workers)
        ]

    def stop(self) -> None:
        self._end(drain=False)

    def drain(self) -> None:
        self._end(drain=True)

    def _end(self, *, drain: bool) -> None:
        for child in (*self.routers.children, *self.workers):
            if self._stopper.stopped:
                child.kill()
            else:
                child.shall_drain = drain
        self._stopper.stop()

    def restart(self) -> None:
        if self._tasks is None or self._stopper.stopped:
            self._display.note("no rolling restart: not everything is up")
        elif self._rolling is not None and not self._rolling.done():
            self._display.note("no rolling restart: one is under way")
        else:
            work = roll(self.routers, self.workers, self._roles, self._clock, self._display.note)
            self._rolling = self._tasks.create_task(work)

    async def run(self) -> None:
        try:
            await self._stopper.run(self._run())
        finally:
            self._display.done()
            self._cores.close()

    async def _run(self) -> None:
        # The inner group ends first: the routers let go of their requests while the workers still answer.
        async with asyncio.TaskGroup() as back, asyncio.TaskGroup() as front:
            front.create_task(self.routers.run())
            await self.routers.wait_until_up()
            for worker in self.workers:
                back.create_task(worker.run())
            for worker in self.workers:
                await worker.was_ready.wait()
            await self.routers.wait_until_serving()
            self._display.done()
            self._on_serving(self.routers.http)
            for admin in self.routers.admins:
                self._display.note(f"admin listener: http://{admin}/admin/workers")
            self._tasks = front


def _child_times(deployment: Deployment) -> ChildTimes:
    return ChildTimes(drain_s=deployment.router.drain_timeout_s + _DRAIN_SLACK_S)


def _share_cores(worker: WorkerPlan, board: CoreBoard, index: int) -> WorkerPlan:
    if worker.max_threads is None:
        return worker
    return replace(worker, config=worker.config.model_copy(update={"cores": board.slot(index, worker.max_threads)}))


class RayLauncher:
    """The router as a child of this process, the workers as actors in a placement group of a Ray cluster.

    Ray starts a lost actor again and repeats its `run`; one whose loop answers no ping is killed so that it does.
    """

    def __init__(
        self,
        deployment: Deployment,
        env: Mapping[str, str],
        clock: Clock,
        display: Display,
        *,
        address: str | None = None,  # None: a cluster of its own on this machine
        on_serving: Callable[[Address], None] = lambda http: None,
        router_program: tuple[str, ...] = ROUTER_PROGRAM,
        worker_entry: str = "kvferry.worker:serve_worker",
        times: ChildTimes | None = None,
    ) -> None:
        self._deployment = deployment
        self._env = env
        self._clock = clock
        self._display = display
        self._address = address
        self._on_serving = on_serving
        self._router_program = router_program
        self._worker_entry = worker_entry
        self._times = times or _child_times(deployment)
        self._stopper = Stopper()
        self._routers: RouterGroup | None = None
        self._work: dict[str, ObjectRef[int]] = {}  # by worker_id: its running `run`
        self.actors: dict[str, ActorHandle[WorkerActor]] = {}

    def stop(self) -> None:
        self._end(drain=False)

    def drain(self) -> None:
        self._end(drain=True)

    def _end(self, *, drain: bool) -> None:
        for child in self._routers.children if self._routers is not None else ():
            if self._stopper.stopped:
                child.kill()
            else:
                child.shall_drain = drain
        self._stopper.stop()

    def restart(self) -> None:
        self._display.note("no rolling restart: Ray's workers are drained one by one, through the admin listener")

    async def run(self) -> None:
        _connect_ray(self._address, self._deployment.num_ranks)
        try:
            await self._stopper.run(self._run())
        finally:
            if not await _in_thread(self._end_actors, _RAY_END_S):
                self._display.note("Ray's head does not answer: its nodes end the workers")
            self._display.done()

    async def _run(self) -> None:
        loopback = self._address is None
        deployment = fit_to_host(self._deployment, _cluster_as_host())
        env = child_environment(self._env, deployment.secret, loopback=loopback)
        config = deployment.router if loopback else deployment.router.model_copy(update={"control_host": _node_ip()})
        self._routers = routers = RouterGroup(
            config,
            deployment.num_routers,
            env,
            self._clock,
            self._display,
            program=self._router_program,
            times=self._times,
            on_restart_wanted=self.restart,
        )
        group = await _place(deployment)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(routers.run())
            await routers.wait_until_up()
            for index, worker in enumerate(deployment.workers):
                worker = replace(worker, config=worker.config.model_copy(update={"routers": routers.controls}))
                actor = _create_actor(worker, group, index, loopback=loopback)
                self.actors[worker.config.worker_id] = actor
                tasks.create_task(self._keep_running(worker.config, actor, loopback=loopback))
                tasks.create_task(self._watch(worker.config.worker_id, actor))
            await routers.wait_until_serving()
            self._display.done()
            self._on_serving(routers.http)

    async def _keep_running(self, config: WorkerConfig, actor: ActorHandle[WorkerActor], *, loopback: bool) -> None:
        """`run` ends only where the worker itself gave up: Ray repeats it after the loss of an actor."""
        from ray.exceptions import RayError

        num_ends = 0
        while True:
            arguments = (config.model_dump_json(), self._deployment.secret, self._worker_entry, loopback)
            self._work[config.worker_id] = work = actor.run.remote(*arguments)
            try:
                reason = f"exit code {await work}"
            except RayError as error:
                reason = str(error).strip().splitlines()[-1]
            num_ends += 1
            self._tell_restart(config.worker_id, reason, delay_s := self._times.backoff_s(num_ends))
            await asyncio.sleep(delay_s)

    async def _watch(self, worker_id: str, actor: ActorHandle[WorkerActor]) -> None:
        import ray
        from ray.exceptions import RayError

        while True:
            await asyncio.sleep(_ACTOR_PING_EVERY_S)
            ping = actor.ping.options(max_task_retries=0).remote()
            try:
                async with asyncio.timeout(_ACTOR_HANG_AFTER_S):
                    await ping
            except TimeoutError:
                self._tell_restart(worker_id, f"no sign of life for {_ACTOR_HANG_AFTER_S:g} s", 0.0)
                await _in_thread(lambda: ray.kill(actor, no_restart=False), _ACTOR_HANG_AFTER_S)
            except RayError:
                pass  # it ended, and Ray is starting it again; or Ray's head is away

    def _tell_restart(self, worker_id: str, reason: str, delay_s: float) -> None:
        self._display.on_event(worker_id, {"event": "restart", "reason": reason, "delay_s": delay_s})

    def _end_actors(self) -> None:
        """Let each worker end by itself, then take the actor away."""
        import ray

        for work in self._work.values():
            ray.cancel(work)
        if self._work:
            ray.wait(list(self._work.values()), num_returns=len(self._work), timeout=_ACTOR_GRACE_S)
        for actor in self.actors.values():
            ray.kill(actor, no_restart=True)
        ray.shutdown()


class WorkerActor:
    """One worker inside a Ray actor; `run` is repeated by Ray when the actor had to be started again."""

    async def run(self, config_json: str, secret: bytes, entry: str, loopback: bool) -> int:
        config = WorkerConfig.model_validate_json(config_json)
        if not loopback:
            config = config.model_copy(update={"host": _node_ip()})
        configure_logging(config.log_level, worker_id=config.worker_id)
        module, _, name = entry.partition(":")
        code: int = await getattr(importlib.import_module(module), name)(config, secret, None)
        return code

    async def ping(self) -> int:
        """The process id, while the actor's loop turns."""
        return os.getpid()


def _connect_ray(address: str | None, num_ranks: int) -> None:
    try:
        import ray
    except ImportError:
        raise ConfigError("launcher: ray is not installed: pip install 'kvferry[ray]'") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing calls home
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(_HEAD_AWAY_S))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            ray.init(num_cpus=max(usable_cpus(), num_ranks), include_dashboard=False, logging_level="warning")
        else:
            ray.init(address, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"ray_address: no Ray cluster at {address}: {error}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own would end this process at once


async def _in_thread(function: Callable[[], None], limit_s: float) -> bool:
    """Whether it ended within the limit. One that does not is left to the end of this process."""
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


def _cluster_as_host() -> Host:
    """All nodes as one machine: how many cores and GPUs there are to share."""
    import ray

    resources = ray.cluster_resources()
    gpus = tuple(Gpu(str(index), "", 0, 0) for index in range(int(resources.get("GPU", 0))))
    num_nodes = max(1, len(ray.nodes()))
    return Host(int(resources.get("CPU", 1)), int(resources.get("memory", 0)) // num_nodes, gpus)


async def _place(deployment: Deployment) -> PlacementGroup:
    """A bundle for each worker, on as many nodes as there are."""
    import ray
    from ray.util.placement_group import placement_group

    bundles = [_bundle(worker) for worker in deployment.workers]
    group = placement_group(bundles, strategy="SPREAD")
    try:
        async with asyncio.timeout(_PLACEMENT_TIMEOUT_S):
            await group.ready()
    except TimeoutError:
        free = ray.available_resources()
        raise ConfigError(f"the Ray cluster has no room for {bundles}: {free} of {ray.cluster_resources()}") from None
    return group


def _bundle(worker: WorkerPlan) -> dict[str, float]:
    bundle = {"CPU": float(worker.num_ranks)}
    if worker.gpus:
        bundle["GPU"] = worker.num_ranks * worker.gpu_share
    return bundle


def _create_actor(worker: WorkerPlan, group: PlacementGroup, index: int, *, loopback: bool) -> ActorHandle[WorkerActor]:
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
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        )
        .remote()
    )


def _node_ip() -> str:
    import ray

    return str(ray.util.get_node_ip_address())
