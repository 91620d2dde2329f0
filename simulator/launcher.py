"""The launcher of an autoscaled fleet: the real `Scaling` of the router asks, workers start and drain.

    scale {add, remove} ─> a worker that joins after `start_s`, or one that drains and leaves ─> fleet {...}

A worker costs from the wish for it to its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..common.router_config import RouterConfig
from ..router.autoscaler.load_record import LoadRecord
from ..router.autoscaler.scaling import Scaling
from ..router.dispatch.dispatcher import Dispatcher
from ..router.state.objectives import Objectives
from ..router.state.predictor import Predictor
from ..worker.roles import RoleName
from .kernel import Kernel
from .recorder import Recorder
from .scenario import Scaled, Scenario
from .worker import SimWorker

_ROLES: tuple[RoleName, ...] = ("prefill", "decode")
_TICK_S = 0.25
_DRAIN_S = 120.0


class Fleet(Protocol):
    """The part of a `World` in which workers start."""

    scenario: Scenario
    kernel: Kernel
    dispatcher: Dispatcher
    recorder: Recorder
    workers: dict[str, SimWorker]

    def start(self, worker_id: str, role: RoleName) -> SimWorker: ...


class SimLauncher:
    """Owns the router's scaling and the list of workers that should be there."""

    def __init__(self, fleet: Fleet, scaled: Scaled, config: RouterConfig, predictor: Predictor) -> None:
        self._fleet = fleet
        self._start_s = scaled.start_s
        self._roles: dict[str, RoleName] = {worker.worker_id: worker.role for worker in fleet.workers.values()}
        self._leaving: set[str] = set()
        self._seq = -1
        self._desired: object = []
        self._reason = ""
        self._next = len(self._roles)
        self.record = LoadRecord()
        goals = fleet.scenario.goals
        self.scaling = Scaling(
            scaled.config,
            Objectives(ttft_s=goals.ttft_s, ttft_stretch=goals.ttft_stretch, tpot_s=goals.tpot_s),
            fleet.dispatcher,
            predictor,
            self.record,
            fleet.kernel,
            lambda: scaled.week_s + fleet.kernel.now(),
            launcher=self._on_event,
        )
        self._tell()
        fleet.kernel.after(_TICK_S, self._tick)

    @property
    def num_pending(self) -> int:
        """Wished for, and not there yet."""
        return sum(name not in self._fleet.workers for name in self._roles)

    def _tick(self) -> None:
        self.scaling.tick()
        self._fleet.kernel.after(_TICK_S, self._tick)

    def _on_event(self, event: Mapping[str, object]) -> None:
        if event["event"] == "scale":
            # The answer comes later, as over a pipe: the router is in the middle of its decision.
            self._fleet.kernel.after(self._fleet.scenario.message_s, self._on_scale, event)

    def _on_scale(self, event: Mapping[str, object]) -> None:
        seq, add = event["seq"], event["add"]
        assert isinstance(seq, int) and isinstance(add, Mapping)
        self._seq, self._desired, self._reason = seq, event["desired"], str(event["reason"])
        for role in _ROLES:
            for _ in range(add.get(role, 0)):
                self._add(role)
        for name in (*_names(event["remove"]), *_names(event["lost"])):
            self._remove(name)
        self._tell()

    def _add(self, role: RoleName) -> None:
        name = f"{role}-{self._next}"
        self._next += 1
        self._roles[name] = role
        self._fleet.kernel.after(self._start_s, self._start, name, role, self._fleet.kernel.now())

    def _start(self, name: str, role: RoleName, wished_s: float) -> None:
        if name in self._roles and name not in self._leaving:
            self._fleet.start(name, role).wished_s = wished_s
        else:  # not wanted any more before it was there; it has cost all the same
            self._fleet.recorder.on_wasted(self._fleet.kernel.now() - wished_s)
            self._forget(name)

    def _remove(self, name: str) -> None:
        if name not in self._roles:
            return
        self._leaving.add(name)
        if name in self._fleet.workers:
            self.scaling.on_launcher({"event": "drain", "worker_id": name, "limit_s": _DRAIN_S})

    def on_left(self, name: str) -> None:
        """Take note that a worker has drained."""
        self._forget(name)
        self._tell()

    def _forget(self, name: str) -> None:
        self._roles.pop(name, None)
        self._leaving.discard(name)

    def _tell(self) -> None:
        self.scaling.on_launcher(
            {
                "event": "fleet",
                "workers": dict(self._roles),
                "leaving": sorted(self._leaving),
                "seq": self._seq,
                "held": None,
                "desired": self._desired,
                "reason": self._reason,
                "leader": True,
            }
        )


def _names(value: object) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list | tuple) else []
