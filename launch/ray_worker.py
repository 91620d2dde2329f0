"""One worker of a Ray cluster, from the request for a place until nothing of it is left.

    place asked for ─> node ─> actor ─> run ─> lost, or ended by itself: run again
                                          ├──> cannot start: the error is raised, place given back
                                          └──> retired: drained by a router ─> ended, place given back

Ray starts a lost actor again and repeats its `run`; one whose loop answers no ping is killed so that it does. A ping's
answer says which life of the actor it is, and whether the worker is ready: `run` does not end with a life, and a call
between two lives waits for the next one, so neither shows that a life was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..common.clock import OwnTime, SystemClock
from ..common.errors import ConfigError, KVFerryError, WorkerLost
from . import ray_calls
from .plan import WorkerPlan
from .process import MAX_START_FAILURES, ChildTimes
from .routers import RouterGroup

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle
    from ray.exceptions import RayError
    from ray.util.placement_group import PlacementGroup

    from .ray_calls import Pulse, RunEnd, WorkerActor

_PING_EVERY_S = 1.0
_LOOK_EVERY_S = 0.25  # while one is not answered
_HANG_AFTER_S = 30.0
_START_S = 600.0  # until an actor says its first word: its node may be starting, and its files may be far away
_CALL_S = 10.0  # for one call to the cluster
_CANNOT_START = 2  # the exit code of a worker that a second start would not help
_LIFE_LOST = "its process or its node was lost (Ray's logs say how)"


@dataclass(slots=True, frozen=True)
class RaySite:
    """All workers of a deployment on Ray share these."""

    routers: RouterGroup
    secrets: Callable[[], tuple[bytes, ...]]  # as they are now
    entry: str  # the function that an actor runs, as MODULE:NAME
    loopback: bool
    drain_timeout: float
    times: ChildTimes
    on_event: Callable[[str, dict[str, object]], None]


class RayWorker:
    """A worker of the cluster; `keep` is its life."""

    def __init__(self, plan: WorkerPlan, place: PlacementGroup, site: RaySite) -> None:
        self.plan = plan
        self.place = place
        self.actor: ActorHandle[WorkerActor] | None = None  # None: no node yet
        self.work: ObjectRef[RunEnd] | None = None  # its running `run`
        self.is_ready = False  # as its actor said last
        self.was_ready = asyncio.Event()
        self.retired = asyncio.Event()
        self._num_failed_starts = 0
        self._site = site

    @property
    def worker_id(self) -> str:
        return self.plan.config.worker_id

    @property
    def state(self) -> str:
        """Return the word that `kvferry status` has for it."""
        if self.actor is None:
            return "waits for a node"
        return "leaving" if self.retired.is_set() else "up" if self.is_ready else "starting"

    async def keep(self) -> None:
        """Return when it has been retired, raise KVFerryError if it cannot start; nothing of it is left either way."""
        try:
            await self._live()
        except KVFerryError:
            await ray_calls.in_thread(self._remove, _CALL_S)
            raise
        await ray_calls.in_thread(self._remove, _CALL_S)

    async def _live(self) -> None:
        from ray.exceptions import RayError

        placed = asyncio.ensure_future(_ready(self.place))
        retired = asyncio.create_task(self.retired.wait())
        try:
            await asyncio.wait((placed, retired), return_when=asyncio.FIRST_COMPLETED)
            if placed.done() and not self.retired.is_set():
                try:
                    placed.result()
                    self.actor = ray_calls.create_actor(self.plan, self.place, loopback=self._site.loopback)
                except RayError as error:  # as where Ray's head has come back without what it knew
                    raise WorkerLost(f"{self.worker_id} has lost its place: {_last_line(error)}") from error
                await self._serve(retired)
        finally:
            placed.cancel()
            retired.cancel()

    async def _serve(self, retired: asyncio.Task[Literal[True]]) -> None:
        """Run it until it is retired; then until it has drained, or for as long as that may take."""
        running = asyncio.ensure_future(self._keep_running())
        watching = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait((running, watching, retired), return_when=asyncio.FIRST_COMPLETED)
            for task in (running, watching):
                if task.done():
                    task.result()
            routers, limit_s = self._site.routers, self._site.drain_timeout
            routers.tell({"event": "drain", "worker_id": self.worker_id, "limit_s": limit_s}, to=routers.leader)
            await asyncio.wait((running,), timeout=self._site.times.drain_s)
        finally:
            running.cancel()
            watching.cancel()

    async def _keep_running(self) -> None:
        """`run` ends only where the worker itself gave up, or drained: Ray repeats it after the loss of an actor.

        Raises ConfigError or WorkerLost where it was never ready and will not be.
        """
        assert self.actor is not None
        site = self._site
        config = self.plan.config.model_copy(update={"routers": site.routers.controls, "secret_file": None})
        clock, num_ends = SystemClock(), 0
        while True:
            began_s = clock.now()
            arguments = (config.model_dump_json(), site.secrets(), site.entry, site.loopback)
            self.work = work = self.actor.run.remote(*arguments)
            end = await _end_of(work)
            reason = end.error or f"exit code {end.code}"
            self.is_ready = False
            if end.was_ready:
                self.was_ready.set()
            if self.retired.is_set():
                return
            if end.code == _CANNOT_START and not self.was_ready.is_set():
                raise ConfigError(f"{self.worker_id}: {reason}")
            self._count_failed_start(reason)
            # Nobody tells here since when it serves. One that ran for longer than the longest pause did not fail at
            # once: it drained, or served before it ended.
            num_ends = 1 if clock.now() - began_s > site.times.max_backoff_s else num_ends + 1
            self._tell_restart(reason, delay_s := site.times.backoff_s(num_ends))
            await asyncio.sleep(delay_s)

    async def _watch(self) -> None:
        """Follow the actor through its lives. Raises WorkerLost where the worker was never ready and will not be."""
        import ray
        from ray.exceptions import RayError

        actor = self.actor
        assert actor is not None
        life: str | None = None  # the one that spoke last; None: that one's loss is told
        limit_s = _START_S
        while True:
            await asyncio.sleep(_PING_EVERY_S)
            ping = actor.ping.options(max_task_retries=0).remote()
            try:
                if (pulse := await _answer_to(ping, limit_s)) is not None:
                    self._take(pulse.is_ready)
                    if life not in (None, pulse.life):
                        self._take_loss(_LIFE_LOST)
                    life, limit_s = pulse.life, _HANG_AFTER_S
                    continue
                self._take(False)
                self._take_loss(f"no sign of life for {limit_s:g} s")
                await ray_calls.in_thread(lambda: ray.kill(actor, no_restart=False), _HANG_AFTER_S)
                life, limit_s = None, _START_S
            except RayError:
                self._take(False)
                limit_s = _START_S  # it ended, and Ray is starting it again; or Ray's head is away

    def _take(self, is_ready: bool) -> None:
        self.is_ready = is_ready
        if is_ready:
            self.was_ready.set()

    def _take_loss(self, reason: str) -> None:
        """A life of the actor is over, and Ray starts the next."""
        self._count_failed_start(reason)
        self._tell_restart(reason, 0.0)

    def _count_failed_start(self, reason: str) -> None:
        """Count an end of a worker that was never ready. Raises WorkerLost where that was the last try."""
        if self.was_ready.is_set() or self.retired.is_set():
            return
        self._num_failed_starts += 1
        if self._num_failed_starts >= MAX_START_FAILURES:
            raise WorkerLost(f"{self.worker_id} did not start, {self._num_failed_starts} times: {reason}")

    def _tell_restart(self, reason: str, delay_s: float) -> None:
        self._site.on_event(self.worker_id, {"event": "restart", "reason": reason, "delay_s": delay_s})

    def _remove(self) -> None:
        import ray

        if self.actor is not None:
            ray.kill(self.actor, no_restart=True)
        ray_calls.free_place(self.place)


async def _end_of(work: ObjectRef[RunEnd]) -> RunEnd:
    """Wait for the end of a `run`. One that Ray could not go on with has no exit code."""
    from ray.exceptions import RayError

    try:
        end: RunEnd = await work
    except RayError as error:
        return ray_calls.RunEnd(None, _last_line(error))
    return end


def _last_line(error: RayError) -> str:
    return str(error).strip().rpartition("\n")[2]


async def _answer_to(ping: ObjectRef[Pulse], limit_s: float) -> Pulse | None:
    """Return what comes in the time, but for what this process does not run of it; None: nothing. Raises RayError."""

    async def answered() -> Pulse:
        pulse: Pulse = await ping
        return pulse

    own_time, answer = OwnTime(SystemClock()), asyncio.ensure_future(answered())
    until_s = own_time.now() + limit_s
    try:
        while own_time.now() < until_s:
            if (await asyncio.wait((answer,), timeout=min(_LOOK_EVERY_S, limit_s)))[0]:
                return answer.result()
        return None
    finally:
        answer.cancel()


async def _ready(place: PlacementGroup) -> None:
    await place.ready()
