"""Router and workers as child processes of this one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from ..common.channel import Address
from ..common.children import ROUTER_PROGRAM, WORKER_PROGRAM, child_environment, worker_child
from ..common.clock import Clock
from ..common.cores import CoreBoard
from ..common.errors import KVFerryError
from ..common.fleet import Fleet
from ..common.plan import Deployment, WorkerPlan
from ..common.process import Child, ChildTimes, Stopper
from ..common.progress import Display
from ..common.rolling import roll
from ..common.routers import RouterGroup
from .launcher import child_times
from .wishes import Wishes


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
        self._env = env = child_environment(env, deployment.secret, loopback=True)
        self._times = times = times or child_times(deployment)
        self._display = display
        self._clock = clock
        self._on_serving = on_serving
        self._worker_program = worker_program
        self._stopper = Stopper()
        self._rolling: asyncio.Task[bool] | None = None
        self._front: asyncio.TaskGroup | None = None  # while everything serves
        self._back: asyncio.TaskGroup | None = None
        self._cores = CoreBoard(2 * max(1, deployment.max_workers))
        self._fleet = Fleet(deployment, self._cores)
        self._wishes = Wishes(
            self._fleet,
            clock,
            display.note,
            start=self._add_worker,
            retire=self._retire_worker,
            is_busy=lambda: self._is_rolling,
        )
        self.routers = RouterGroup(
            deployment.router,
            deployment.num_routers,
            env,
            clock,
            display,
            program=router_program,
            times=times,
            on_restart_wanted=self.restart,
            on_wish=self._wishes.on_event,
        )
        self.workers = [self._child(plan) for plan in self._fleet.plans]

    def _child(self, plan: WorkerPlan) -> Child:
        return worker_child(
            plan,
            lambda: self.routers.controls,
            self._env,
            self._clock,
            self.routers.on_event,
            program=self._worker_program,
            times=self._times,
        )

    # --- from outside ---------------------------------------------------------------------------------------------

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

    @property
    def _is_rolling(self) -> bool:
        return self._rolling is not None and not self._rolling.done()

    def restart(self) -> None:
        if self._front is None or self._stopper.stopped:
            self._display.note("no rolling restart: not everything is up")
        elif self._is_rolling:
            self._display.note("no rolling restart: one is under way")
        else:
            workers = [child for child in self.workers if not child.is_retired]
            work = roll(self.routers, workers, self._fleet.roles, self._clock, self._display.note)
            self._rolling = self._front.create_task(work)

    # --- a life -----------------------------------------------------------------------------------------------------

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
                back.create_task(self._keep(worker))
            for worker in self.workers:
                await worker.was_ready.wait()
            await self.routers.wait_until_serving()
            self._display.done()
            self._on_serving(self.routers.http)
            for admin in self.routers.admins:
                self._display.note(f"admin listener: http://{admin}/admin/workers")
            self._front, self._back = front, back
            self._wishes.serve(self.routers)

    async def _keep(self, worker: Child, *, is_extra: bool = False) -> None:
        """Until it is retired. One of the first workers that cannot start ends the launch."""
        error: str | None = None
        try:
            await worker.run()
        except KVFerryError as failure:
            if not is_extra:
                raise
            error = str(failure)
        self.workers.remove(worker)
        self._wishes.gone(worker.name, error)

    def _add_worker(self, plan: WorkerPlan) -> None:
        assert self._back is not None
        child = self._child(plan)
        self.workers.append(child)
        self._back.create_task(self._keep(child, is_extra=True))

    def _retire_worker(self, worker_id: str, drains: bool) -> None:
        for child in self.workers:
            if child.name == worker_id:
                child.retire(drains=drains)
