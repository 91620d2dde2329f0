"""A simulated deployment that grows, shrinks and lends workers: the product's autoscaler and its launcher's books.

    Router.tick ─> Scaling ─> SetRole to workers
                         └─> scale ─(pipe)─> ScaleRequests + Fleet ─> a worker starts, or drains and ends ─> fleet

A worker that is added has a place of its own. One that was told to leave and does not is killed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvferry.common.config import EngineConfig, WorkerConfig
from kvferry.launch.fleet import Fleet
from kvferry.launch.plan import Deployment, WorkerPlan
from kvferry.launch.scale_requests import ScaleRequests
from kvferry.router.state.views import PoolView, WorkerView

from .breach import Breach
from .kernel import ProcessClock

if TYPE_CHECKING:
    from .routers import Router
    from .scenario import Scenario
    from .world import World

DRAIN_S = 2.0  # a worker that leaves has so long
_GIVEN_S = 5.0  # a worker counts as of the role that it was given so lately


class Launcher:
    """The books of a launcher over simulated processes. `children` and `leader` are a `RouterGroup`'s."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pipe_s = world.scenario.pipe_s
        self._fleet = Fleet(_deployment(world.scenario))
        self.children = tuple(_Child(f"r-{number}") for number in range(world.scenario.num_routers))
        self._requests = ScaleRequests(
            self._fleet, ProcessClock(world.kernel, 0.0, 1.0), world.kernel.say, start=self._start, retire=self._retire
        )
        self._requests.serve(self)  # type: ignore[arg-type]  # what it needs of a group of routers

    # --- as a group of routers ------------------------------------------------------------------------------

    @property
    def leader(self) -> _Child | None:
        alive = {router.place for router in self._world.routers if not router.process.is_dead}
        return next((child for child in self.children if child.name in alive), None)

    def tell(self, event: Mapping[str, object], *, to: _Child) -> None:
        """Write to a router's pipe."""
        router = next((router for router in self._world.routers if router.place == to.name), None)
        if router is not None:
            router.process.after(self._pipe_s, router.on_launcher, json.loads(json.dumps(event)))

    def on_event(self, router: Router, event: Mapping[str, object]) -> None:
        """Read what a router has written."""
        self._world.kernel.after(self._pipe_s, self._on_event, router.place, json.loads(json.dumps(event)))

    def _on_event(self, name: str, event: dict[str, Any]) -> None:
        self._requests.on_event(name, event)
        if event["event"] == "scale" and sum(event["add"].values()) and len(self._fleet) > sum(event["desired"]):
            raise Breach("A2", f"{name} wants {event['desired']} and asked for {event['add']}: {self._fleet.roles}")

    # --- workers ----------------------------------------------------------------------------------------------

    def is_leaving(self, place: str) -> bool:
        return place in self._fleet.leaving

    def on_ended(self, place: str) -> None:
        """A worker that was to leave has ended."""
        self._requests.on_worker_ended(place)

    def _start(self, plan: WorkerPlan) -> None:
        random, place = self._world.kernel.random, plan.config.worker_id
        self._world.tally.seen["workers added"] += 1
        self._world.kernel.after(random.uniform(0.1, 1.0), self._begin, place)

    def _begin(self, place: str) -> None:
        if self.is_leaving(place):  # nobody wants it any more
            self.on_ended(place)
        else:
            self._world.start(place)

    def _retire(self, place: str, drains: bool) -> None:
        """`drains`: it does so already."""
        world, worker = self._world, self._world.workers.get(place)
        world.tally.seen["workers removed"] += 1
        if worker is None:
            return  # it has not begun
        if not drains and self.leader is not None:
            self.tell({"event": "drain", "worker_id": place, "limit_s": DRAIN_S}, to=self.leader)
        world.kernel.after(DRAIN_S + 1.0, self._end, place)

    def _end(self, place: str) -> None:
        if self.is_leaving(place):
            self._world.kill(place, restart_s=0.1)


class _Child:
    """A router's pipe, whichever of its lives is at the other end."""

    def __init__(self, name: str) -> None:
        self.name = name


class ScaleOperations:
    """Implements `router.autoscaler.scaling.ScaleOperations` over a router, and looks at what is done (A1)."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._given: dict[str, tuple[str, float]] = {}  # roles that workers were given lately, until when

    def view(self) -> PoolView:
        return self._router.dispatcher.view()

    def set_role(self, worker_id: str, role: str) -> bool:
        was_told = self._router.dispatcher.set_role(worker_id, role)
        if was_told:
            left = "decode" if role == "prefill" else "prefill"
            self._router.note("roles changed by the autoscaler")
            self._given[worker_id] = (role, self._router.clock.now() + _GIVEN_S)
            self._check_left(left, f"{worker_id} is to be a {role} worker")
        return was_told

    def drain_worker(self, worker_id: str, deadline_s: float) -> bool:
        self._router.drain_worker(worker_id, deadline_s)
        return True

    def check_request(self, event: Mapping[str, Any]) -> None:
        """Look at what the launcher is asked for."""
        leaving = set(event["remove"])
        if leaving:
            for pool in {self._pool(worker) for worker in self.view().workers if worker.worker_id in leaving}:
                self._check_left(pool, f"{sorted(leaving)} are to leave", leaving)

    def _check_left(self, pool: str, text: str, leaving: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        ready = [worker for worker in self.view().workers if worker.is_ready and worker.worker_id not in leaving]
        if not any(self._pool(worker) == pool for worker in ready):
            raise Breach("A1", f"{self._router.place}: {text}, and no {pool} worker takes work")

    def _pool(self, worker: WorkerView) -> str:
        role, until_s = self._given.get(worker.worker_id, ("", 0.0))
        return role if self._router.clock.now() < until_s else worker.role


def _deployment(scenario: Scenario) -> Deployment:
    """The plan of the workers that a scenario begins with, and of one more of each pool."""
    places: list[tuple[str, Literal["prefill", "decode"]]] = [
        *((f"p-{number}", "prefill") for number in range(len(scenario.prefill))),
        *((f"d-{number}", "decode") for number in range(len(scenario.decode))),
    ]
    workers = tuple(_plan(place, role) for place, role in places)
    return Deployment(scenario.router, workers, templates=(_plan("p", "prefill"), _plan("d", "decode")))


def _plan(place: str, role: Literal["prefill", "decode"]) -> WorkerPlan:
    engine = EngineConfig(model_dir=Path("m"), served_model_name="m")
    return WorkerPlan(WorkerConfig(worker_id=place, role=role, engine=engine, routers=("127.0.0.1:1",)))
