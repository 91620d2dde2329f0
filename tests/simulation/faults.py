"""Faults as they happen to a world: each begins, lasts, and is over before the world calms down."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from kvferry.router.autoscaler.scale_types import Counts
from kvferry.wire.fields import Message
from kvferry.wire.handoff import KVClosed, KVOpen, KVOpened, KVRenew
from kvferry.wire.results import FirstToken, Grant, HandoffDone, HandoffFailed, StepTokens
from kvferry.wire.tasks import PrefillTask

from .network import Path
from .scenario import Fault, Scenario

if TYPE_CHECKING:
    from .kernel import Kernel
    from .world import World

_MAY_DOUBLE = (
    PrefillTask, Grant, HandoffDone, HandoffFailed, StepTokens, FirstToken, KVOpen, KVOpened, KVClosed, KVRenew
)  # fmt: skip


class Sky:
    """Chances of messages, writes and notifications. Implements `network.Chances` and `fabric.Weather`."""

    def __init__(self, kernel: Kernel, scenario: Scenario) -> None:
        self._random = kernel.random
        self._doubling = scenario.doubling
        self._spoiling = scenario.spoiling
        self.failing: dict[Path, float] = {}
        self.late: dict[Path, float] = {}
        self.losing: dict[Path, float] = {}
        self.spoiling: dict[Path, float] = {}
        self.no_agents: Counter[str] = Counter()  # places where no new agent can be made
        self.bad_disks: Counter[str] = Counter()  # places whose disk fails
        self.slow_disks: Counter[str] = Counter()
        self.num_doubled = 0

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def doubled_after_s(self, message: Message) -> float | None:
        """None: it comes once."""
        if not self._doubling or not isinstance(message, _MAY_DOUBLE) or not self.chance(self._doubling):
            return None
        self.num_doubled += 1
        return 0.0 if self.chance(0.5) else self._random.expovariate(5.0)

    def fails(self, path: Path) -> bool:
        return path in self.failing and self.chance(self.failing[path])

    def late_s(self, path: Path) -> float:
        mean_s = self.late.get(path)
        return self._random.expovariate(1 / mean_s) if mean_s else 0.0

    def loses(self, path: Path) -> bool:
        return path in self.losing and self.chance(self.losing[path])

    def spoils(self, path: Path) -> bool:
        chance = max(self._spoiling, self.spoiling.get(path, 0.0))
        return chance > 0 and self.chance(chance)

    def fails_rotation(self, place: str) -> bool:
        return bool(self.no_agents[place])

    def fails_disk(self, place: str) -> bool:
        return bool(self.bad_disks[place]) and self.chance(0.7)

    def draw_disk_s(self, place: str) -> float:
        """How long the disk takes for one block."""
        return self._random.expovariate(1 / (0.3 if self.slow_disks[place] else 0.001))

    def calm(self) -> None:
        self._doubling = self._spoiling = 0.0
        for weather in (self.failing, self.late, self.losing, self.spoiling):
            weather.clear()


class Faults:
    """Applies a scenario's faults to its world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.tally: Counter[str] = Counter()
        self._at_points: dict[str, list[Fault]] = {}
        self._passed: Counter[str] = Counter()
        for fault in world.scenario.faults:
            if fault.point:
                self._at_points.setdefault(fault.point, []).append(fault)
            else:
                world.kernel.at(fault.at_s, self._begin, fault, fault.target, fault.other)

    def pass_point(self, point: str, place: str, peer: str) -> None:
        """A process comes to a point where something may be waiting for it."""
        waiting = self._at_points.get(point)
        if waiting is None:
            return
        self._passed[point] += 1
        for fault in waiting:
            if fault.nth == self._passed[point] and self._world.kernel.now < self._world.scenario.calm_at_s:
                target, other = (place, peer) if fault.target == "self" else (peer, place)
                if target:
                    self._begin(fault, target, other)

    def _begin(self, fault: Fault, target: str, other: str) -> None:
        world = self._world
        lasts_s = min(fault.lasts_s, world.scenario.calm_at_s - world.kernel.now)
        if lasts_s <= 0:
            return
        world.kernel.say(f"FAULT {fault} {target} {other}")
        kind = fault.kind
        if target.startswith("r-") and kind in ("kill", "hang", "set_role"):
            target, other = other, target  # routers have a fault of their own, which is rarer
        if kind in ("cut_control", "cut_data", "break") and not other:
            kind = "isolate"
        self.tally[kind if not fault.point else f"{kind}@{fault.point}"] += 1
        getattr(self, f"_{kind}")(target, other, lasts_s, fault.strength)

    # --- processes ------------------------------------------------------------------------------------------

    def _kill(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        self._world.kill(target, restart_s=min(lasts_s, 1.0))

    def _lose_host(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        """The machine is gone without a word; its successor comes when the network is back."""
        self._isolate(target, other, lasts_s, strength)
        self._world.kill(target, restart_s=lasts_s, is_silent=True)

    def _hang(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        world = self._world
        worker = world.workers.get(target)
        if worker is None or worker.process.is_dead:
            return
        worker.process.stop()
        if lasts_s > 3.5 and world.sky.chance(0.3):
            world.kernel.after(3.5, world.kill_life, worker, 0.5)  # its launcher hears no beat any more
        else:
            world.kernel.after(lasts_s, worker.process.go_on)

    def _drain(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        for router in self._world.routers:
            if not router.process.is_dead:
                router.process.run(router.drain_worker, target, lasts_s)

    def _set_role(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        """The worker gets the other role, and its first one back when the fault is over."""
        world, worker = self._world, self._world.workers.get(target)
        if worker is not None:
            world.set_role(target, "decode" if worker.core.roles.active_role == "prefill" else "prefill")
            world.kernel.after(lasts_s, world.set_role, target, worker.home)

    def _edit(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        """An operator wants a fleet of some size for a while."""
        router = self._world.routers[int(target[2:])]
        most = self._world.scenario.router.autoscale.max_workers
        prefill = self._world.kernel.random.randint(1, most - 1)
        decode = self._world.kernel.random.randint(1, most - prefill)
        router.process.run(router.hold, Counts(prefill, decode), lasts_s)

    def _kill_router(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        self._world.kill_router(int(target[2:]), restart_s=min(lasts_s, 1.0))

    def _fail_rotation(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        self._count(self._world.sky.no_agents, target, lasts_s)

    def _fail_disk(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        self._count(self._world.sky.bad_disks, target, lasts_s)

    def _slow_disk(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        self._count(self._world.sky.slow_disks, target, lasts_s)

    def _count(self, places: Counter[str], target: str, lasts_s: float) -> None:
        places[target] += 1
        self._world.kernel.after(lasts_s, places.subtract, [target])

    # --- paths ----------------------------------------------------------------------------------------------

    def _block(self, path: Path, lasts_s: float) -> None:
        path.block()
        self._world.kernel.after(lasts_s, path.heal)

    def _control(self, target: str, other: str) -> Path:
        return self._world.network.path(target, other)

    def _data(self, target: str, other: str) -> Path:
        return self._world.data_path(target, other)

    def _cut_control(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        self._block(self._control(target, other), lasts_s)

    _cut_session = _cut_control

    def _cut_data(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        self._block(self._data(target, other), lasts_s)

    def _cut_pair(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        self._cut_control(target, other, lasts_s, strength)
        self._cut_data(target, other, lasts_s, strength)

    def _isolate(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        for path in self._world.paths_of(target):
            self._block(path, lasts_s)

    def _break(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        for end in list(self._world.network.connections[self._control(target, other)]):
            end.cut()

    def _slow(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        path, factor = self._control(target, other), 10 ** (1 + 2 * strength)
        path.slow_down(factor)
        self._world.kernel.after(lasts_s, path.speed_up, factor)

    def _swizzle(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        """Every path is clogged in a random order, and unclogged in another."""
        kernel = self._world.kernel
        for path in self._world.network.paths():
            if kernel.random.random() < 0.8:
                begin_s = kernel.random.uniform(0, lasts_s / 2)
                kernel.after(begin_s, path.block)
                kernel.after(kernel.random.uniform(lasts_s / 2, lasts_s), path.heal)

    # --- writes ---------------------------------------------------------------------------------------------

    def _weather(self, weather: dict[Path, float], path: Path, value: float, lasts_s: float) -> None:
        weather[path] = value
        self._world.kernel.after(lasts_s, weather.pop, path, None)

    def _fail_writes(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        self._weather(self._world.sky.failing, self._data(target, other), strength, lasts_s)

    def _corrupt(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        """Bytes change on their way. Without checksums nobody can tell, and nothing is promised."""
        if self._world.scenario.has_checksums:
            self._weather(self._world.sky.spoiling, self._data(target, other), strength / 4, lasts_s)

    def _late_writes(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        self._weather(self._world.sky.late, self._data(target, other), strength, lasts_s)

    def _lose_notes(self, target: str, other: str, lasts_s: float, strength: float) -> None:
        self._weather(self._world.sky.losing, self._data(target, other), strength, lasts_s)
