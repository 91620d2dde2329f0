"""Router and workers as child processes of this one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from ..common.clock import Clock
from ..common.cores import CoreBoard
from ..common.errors import ConfigError, KVFerryError
from ..wire.address import Address
from .children import ROUTER_PROGRAM, WORKER_PROGRAM, child_environment, make_fork_server, worker_child
from .fleet import Fleet
from .launcher import child_times
from .orphans import taking_orphans
from .plan import Deployment, WorkerPlan
from .process import Child, ChildTimes
from .progress import Display
from .reload import Reload, outcome, read_credentials
from .rolling import Roll
from .routers import RouterGroup
from .scale_requests import ScaleRequests
from .status import describe_child, describe_deployment
from .stopper import Stopper


class LocalLauncher:
    """A deployment on this machine."""

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
        router = deployment.router
        self._config, self._deployment_env = router, env
        # Children read a secret file themselves, again at each reload.
        self._env = env = child_environment(env, () if router.secret_file else deployment.secrets, loopback=True)
        self._times = times = times or child_times(deployment)
        self._display = display
        self._clock = clock
        self._on_serving = on_serving
        self._worker_program = worker_program
        self._stopper = Stopper()
        self._roll: Roll | None = None  # the last one
        self._rolling: asyncio.Task[bool] | None = None  # its work
        self._front: asyncio.TaskGroup | None = None  # while everything serves
        self._back: asyncio.TaskGroup | None = None
        self._reload = Reload()
        self._cores = CoreBoard(2 * max(1, deployment.max_workers))
        self._fleet = Fleet(deployment, self._cores)
        self._fork_server = make_fork_server(env, with_workers=any(not plan.gpus for plan in deployment.workers))
        self._scale_requests = ScaleRequests(
            self._fleet,
            clock,
            display.note,
            start=self._add_worker,
            retire=self._retire_worker,
            is_busy=lambda: self.is_ending or (self._roll is not None and self._roll.is_under_way),
        )
        self.routers = RouterGroup(
            router,
            deployment.num_routers,
            env,
            clock,
            display,
            program=router_program,
            times=times,
            fork_server=self._fork_server,
            on_restart_wanted=self._restart_as_asked,
            on_scale_event=self._scale_requests.on_event,
            on_reloaded=self._reload.on_event,
            on_blameless=self._excuse,
        )
        self.workers = [self._child(plan) for plan in self._fleet.plans]
        for child in (*self.routers.children, *self.workers):
            child.stderr_fd = display.children_stderr

    def _child(self, plan: WorkerPlan) -> Child:
        return worker_child(
            plan,
            lambda: self.routers.controls,
            self._env,
            self._clock,
            self.routers.on_event,
            program=self._worker_program,
            times=self._times,
            fork_server=self._fork_server,
        )

    # --- from outside ---------------------------------------------------------------------------------------------

    @property
    def is_ending(self) -> bool:
        return self._stopper.stopped

    def stop(self) -> None:
        self._end(drain=False)

    def drain(self) -> None:
        self._end(drain=True)

    def _end(self, *, drain: bool) -> None:
        for worker in self.workers:
            worker.send({"event": "stopping"})
        for child in (*self.routers.children, *self.workers):
            if self.is_ending:
                child.kill()
            else:
                child.shall_drain = drain
        self._stopper.stop()

    @property
    def _is_rolling(self) -> bool:
        return self._rolling is not None and not self._rolling.done()

    def _restart_as_asked(self) -> None:
        """An operator asked a router for it."""
        if self._front is not None and not self.is_ending:
            self._front.create_task(self.restart(lambda note: None))

    async def restart(self, note: Callable[[str], None], name: str | None = None) -> bool:
        def tell(text: str) -> None:
            self._display.note(text)
            note(text)

        names = {child.name for child in (*self.workers, *self.routers.children) if not child.is_retired}
        if self._front is None or self.is_ending:
            tell("no restart: not everything is up")
        elif self._is_rolling:
            tell("no restart: one is under way")
        elif name is not None and name not in names:
            tell(f"no restart: there is no process {name}")
        else:
            self._fork_server.renew()  # the programs may be newer than it is
            roll = Roll(self.routers, self.workers, self._roles, self._clock, tell, only=name)
            self._roll, self._rolling = roll, self._front.create_task(roll.run())
            try:
                return await asyncio.shield(self._rolling)
            except asyncio.CancelledError:  # whoever asked has left: what has begun is carried out all the same
                if not roll.is_under_way and self._rolling.cancel() and not self.is_ending:
                    tell("no restart: who asked for it has left before it began")
                raise
        return False

    async def reload(self) -> list[str]:
        try:
            await asyncio.to_thread(read_credentials, self._config, self._deployment_env)  # many keys take a while
        except ConfigError as error:
            failures = [str(error)]
        else:
            failures = await self._reload.ask([*self.routers.children, *self.workers])
        self._display.note(outcome(failures))
        return failures

    def status(self) -> dict[str, object]:
        roles = self._roles()
        workers = [describe_child(child, roles.get(child.name, "leaving")) for child in self.workers]
        ending = "ending" if self.is_ending else "restarting" if self._is_rolling else "serving"
        state = "starting" if self._front is None else ending
        name = self._config.served_model_name
        return describe_deployment(self.routers, workers, model=name, state=state, launcher="local")

    def _roles(self) -> dict[str, str]:
        return self.routers.roles_now(self._fleet.roles)

    # --- a life -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        try:
            async with taking_orphans():
                await self._stopper.run(self._run())
        finally:
            self._display.done()
            await self._fork_server.close()
            self._cores.close()

    async def _run(self) -> None:
        # The inner group ends first: the routers let go of their requests while the workers still answer.
        async with asyncio.TaskGroup() as back, asyncio.TaskGroup() as front:
            front.create_task(self.routers.run())
            await self.routers.wait_until_up()
            for worker in self.workers:
                back.create_task(self._keep(worker))
            for worker in self.workers:
                await worker.was_ready.wait()
            await self.routers.wait_until_serving()
            self._display.done()
            for child in (*self.routers.children, *self.workers):
                child.show_stderr()
            self._on_serving(self.routers.http)
            for admin in self.routers.admin_urls:
                self._display.note(f"admin listener: {admin}/admin/workers")
            self._front, self._back = front, back
            self._scale_requests.serve(self.routers)

    async def _keep(self, worker: Child, *, is_extra: bool = False) -> None:
        """Keep a worker running until it is retired. One of the first workers that cannot start ends the launch."""
        error: str | None = None
        try:
            await worker.run()
        except KVFerryError as failure:
            if not is_extra:
                raise
            error = str(failure)
        self.workers.remove(worker)
        self._scale_requests.on_worker_ended(worker.name, error)

    def _add_worker(self, plan: WorkerPlan) -> None:
        assert self._back is not None
        child = self._child(plan)
        self.workers.append(child)
        self._back.create_task(self._keep(child, is_extra=True))

    def _excuse(self, worker_id: str, incarnation: object) -> None:
        for child in self.workers:
            if child.name == worker_id:
                child.excuse(incarnation)

    def _retire_worker(self, worker_id: str, drains: bool) -> None:
        for child in self.workers:
            if child.name == worker_id:
                child.retire(drains=drains)
