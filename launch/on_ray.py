"""The routers as children of this process, the workers as actors on a Ray cluster.

A single worker is in ray_worker.py. Ray starts a lost actor again and repeats its `run`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..common.clock import Clock
from ..common.errors import ConfigError, KVFerryError
from ..wire.address import Address
from . import ray_calls
from .children import ROUTER_PROGRAM, child_environment
from .fleet import Fleet
from .launcher import child_times
from .plan import Deployment, WorkerPlan, fit_to_host
from .process import ChildTimes
from .progress import Display
from .ray_worker import RaySite, RayWorker
from .reload import Reload, outcome, read_credentials
from .routers import RouterGroup
from .scale_requests import ScaleRequests
from .status import describe_deployment
from .stopper import Stopper

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from .ray_calls import WorkerActor

_CALL_S = 10.0  # for one call to the cluster
_GRACE_S = 5.0
_END_S = 10.0  # for all calls to a cluster at the end: its head may be gone
_NO_RESTART = "no restart: Ray's workers are drained one by one, through the admin listener"


class RayLauncher:
    """A deployment on a cluster."""

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
        worker_entry: str = "kvferry.worker.process:serve_worker",
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
        self._times = times or child_times(deployment)
        self._stopper = Stopper()
        self._routers: RouterGroup | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._scale_requests: ScaleRequests | None = None
        self._workers: dict[str, RayWorker] = {}
        self._secrets = deployment.secrets
        self._reload = Reload()
        self._is_serving = False

    @property
    def actors(self) -> dict[str, ActorHandle[WorkerActor]]:
        """Return the actors by worker id."""
        return {name: worker.actor for name, worker in self._workers.items() if worker.actor is not None}

    # --- from outside ---------------------------------------------------------------------------------------------

    @property
    def is_ending(self) -> bool:
        return self._stopper.stopped

    def stop(self) -> None:
        self._end(drain=False)

    def drain(self) -> None:
        self._end(drain=True)

    def _end(self, *, drain: bool) -> None:
        for child in self._routers.children if self._routers is not None else ():
            if self.is_ending:
                child.kill()
            else:
                child.shall_drain = drain
        self._stopper.stop()

    async def restart(self, note: Callable[[str], None], name: str | None = None) -> bool:
        self._restart_as_asked()
        note(_NO_RESTART)
        return False

    def _restart_as_asked(self) -> None:
        self._display.note(_NO_RESTART)

    async def reload(self) -> list[str]:
        failures = await self._read_again()
        self._display.note(outcome(failures))
        return failures

    async def _read_again(self) -> list[str]:
        """Read the files again, here and in every process. Workers get the secrets from here: their nodes may lack the
        file."""
        if self._routers is None:
            return ["nothing serves yet"]
        try:
            # On a thread: many keys take a while.
            secrets = await asyncio.to_thread(read_credentials, self._deployment.router, self._env)
            self._secrets = secrets or self._secrets
        except ConfigError as error:
            return [str(error)]
        failures = await self._reload.ask(self._routers.children)
        actors = self.actors
        answers = await asyncio.gather(
            *(_within_limit(actor.take_secrets.remote(self._secrets)) for actor in actors.values() if self._secrets)
        )
        return failures + [f"{name}: no answer" for name, ok in zip(actors, answers, strict=False) if not ok]

    def status(self) -> dict[str, object]:
        roles: dict[str, str] = {name: worker.plan.config.role for name, worker in self._workers.items()}
        roles = self._routers.roles_now(roles) if self._routers is not None else roles
        workers = [
            {"name": worker.worker_id, "role": roles[worker.worker_id], "state": worker.state}
            for worker in self._workers.values()
        ]
        state = "ending" if self.is_ending else "serving" if self._is_serving else "starting"
        model = self._deployment.router.served_model_name
        return describe_deployment(self._routers, workers, model=model, state=state, launcher="ray")

    # --- a life -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        try:
            ray_calls.connect(self._address, self._deployment.max_ranks)
        except SystemExit:  # Ray's own handler of SIGTERM is in place meanwhile: it has cleared up, and leaves so
            self._stopper.stop()
            return
        try:
            await self._stopper.run(self._run())
        finally:
            if not await ray_calls.in_thread(self._end_actors, _END_S):
                self._display.note("Ray's head does not answer: its nodes end the workers")
            self._display.done()

    @property
    def _loopback(self) -> bool:
        return self._address is None

    async def _run(self) -> None:
        # Fitted to what the cluster has now; a GPU is chosen by Ray.
        deployment = replace(fit_to_host(self._deployment, ray_calls.cluster_as_host()), gpus=())
        fleet = Fleet(deployment)
        self._scale_requests = scale_requests = ScaleRequests(
            fleet,
            self._clock,
            self._display.note,
            start=self._add_worker,
            retire=self._retire_worker,
            is_busy=lambda: self.is_ending,
        )
        self._routers = routers = self._make_routers(deployment, scale_requests)
        workers = [self._worker(plan) for plan in fleet.plans]
        self._workers = {worker.worker_id: worker for worker in workers}
        await ray_calls.wait_for_places(fleet.plans, [worker.place for worker in workers])
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            tasks.create_task(routers.run())
            await routers.wait_until_up()
            for worker in workers:
                tasks.create_task(self._keep(worker))
            for worker in workers:
                await worker.was_ready.wait()
            await routers.wait_until_serving()
            self._display.done()
            for child in routers.children:
                child.show_stderr()
            self._on_serving(routers.http)
            for admin in routers.admin_urls:
                self._display.note(f"admin listener: {admin}/admin/workers")
            self._is_serving = True
            scale_requests.serve(routers)

    def _make_routers(self, deployment: Deployment, scale_requests: ScaleRequests) -> RouterGroup:
        config = deployment.router
        if not self._loopback:
            config = config.model_copy(update={"control_host": ray_calls.node_ip()})
        routers = RouterGroup(
            config,
            deployment.num_routers,
            child_environment(self._env, () if config.secret_file else self._secrets, loopback=self._loopback),
            self._clock,
            self._display,
            program=self._router_program,
            times=self._times,
            on_restart_wanted=self._restart_as_asked,
            on_scale_event=scale_requests.on_event,
            on_reloaded=self._reload.on_event,
        )
        for child in routers.children:
            child.stderr_fd = self._display.children_stderr
        return routers

    # --- one worker -------------------------------------------------------------------------------------------------

    def _worker(self, plan: WorkerPlan) -> RayWorker:
        assert self._routers is not None
        site = RaySite(
            self._routers,
            secrets=lambda: self._secrets,
            entry=self._worker_entry,
            loopback=self._loopback,
            drain_timeout=self._deployment.router.drain_timeout,
            times=self._times,
            on_event=self._display.on_event,
        )
        return RayWorker(plan, ray_calls.ask_for_place(plan), site)

    def _add_worker(self, plan: WorkerPlan) -> None:
        assert self._tasks is not None
        worker = self._worker(plan)
        self._workers[worker.worker_id] = worker
        self._tasks.create_task(self._keep(worker, is_extra=True))

    def _retire_worker(self, worker_id: str, drains: bool) -> None:
        """Tell a worker to end, perhaps again: whether it `drains` already or not."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.retired.set()

    async def _keep(self, worker: RayWorker, *, is_extra: bool = False) -> None:
        """Keep a worker running until it is retired. One of the first workers that cannot start ends the launch."""
        assert self._scale_requests is not None
        error: str | None = None
        try:
            await worker.keep()
        except KVFerryError as failure:
            if not is_extra:
                raise
            error = str(failure)
        self._workers.pop(worker.worker_id, None)
        self._scale_requests.on_worker_ended(worker.worker_id, error)

    def _end_actors(self) -> None:
        """Let each worker end by itself, then take the actor away."""
        import ray

        work = [worker.work for worker in self._workers.values() if worker.work is not None]
        for running in work:
            ray.cancel(running)
        if work:
            ray.wait(work, num_returns=len(work), timeout=_GRACE_S)
        for actor in self.actors.values():
            ray.kill(actor, no_restart=True)
        ray.shutdown()


async def _within_limit(call: Awaitable[object]) -> bool:
    """Say whether an actor answered in time."""
    from ray.exceptions import RayError

    try:
        async with asyncio.timeout(_CALL_S):
            await call
    except (TimeoutError, RayError):
        return False
    return True
