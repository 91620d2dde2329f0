"""Routers' requests for a larger or smaller fleet, and what they are told about it.

    router  scale {add, remove, lost, desired, reason}  from the leader alone  ->  workers start, drain and end
    router  hold {counts, for_s}                   an operator's edit, from any  ->  kept here, told to all
    router  load {...}                             what it saw             ->  passed on to the leader
    all     fleet {leader, workers, leaving, seq, held, desired, reason}   <-  after every change

One router decides: the first that runs. All know what it decided, so any of them can be asked. What a decision was
made from is told by `seq`: the leader decides again only after it was told what became of its last request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..common.clock import Clock
from ..wire.lifeline import Event
from .fleet import Fleet
from .plan import WorkerPlan
from .routers import RouterGroup

_AFTER_FAILURE_S = 60.0  # nothing is added for so long after a new worker could not start


class ScaleRequests:
    """One deployment's requests. `start` and `retire` return at once; `on_worker_ended` takes the end of a worker."""

    def __init__(
        self,
        fleet: Fleet,
        clock: Clock,
        note: Callable[[str], None],
        *,
        start: Callable[[WorkerPlan], None],
        retire: Callable[[str, bool], None],
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """`retire`: the worker, and whether it drains already.

        `is_busy`: the launcher restarts workers, or ends them all, and none may come or go."""
        self._fleet = fleet
        self._clock = clock
        self._note = note
        self._start = start
        self._retire = retire
        self._is_busy = is_busy
        self._routers: RouterGroup | None = None  # once everything serves
        self._seq = -1
        self._desired: Sequence[object] = ()
        self._reason = ""
        self._held: tuple[list[int], float | None] | None = None  # counts, until when
        self._fails_until = 0.0

    def serve(self, routers: RouterGroup) -> None:
        """Carry out requests from here on."""
        self._routers = routers
        self.tell()

    def on_event(self, name: str, event: dict[str, object]) -> None:
        """Take a request of a router. Before everything serves nothing is carried out."""
        if self._routers is None:
            return
        leader = self._routers.leader
        match event["event"]:
            case "load" if leader is not None and leader.name != name:
                self._routers.tell(event, to=leader)
                return
            case "hold":
                self._on_hold(event)
            case "scale" if leader is not None and leader.name == name:
                self._on_scale(event)
            case "ready" | "restart":
                pass  # another may be the leader now, and it knows nothing
            case _:
                return
        self.tell()

    def on_worker_ended(self, worker_id: str, error: str | None = None) -> None:
        """Note that a worker has ended for good. `error`: it could not start."""
        if error is not None:
            self._fails_until = self._clock.now() + _AFTER_FAILURE_S
            self._note(f"{worker_id} could not start, none is added for {_AFTER_FAILURE_S:g} s: {error}")
        self._fleet.forget(worker_id)
        self.tell()

    def _on_hold(self, event: Event) -> None:
        counts, for_s = event.get("counts"), event.get("for_s")
        if isinstance(counts, list):
            until = self._clock.now() + for_s if isinstance(for_s, int | float) else None
            self._held = ([int(count) for count in counts], until)
        else:
            self._held = None

    def _on_scale(self, event: Event) -> None:
        if self._is_busy():
            return  # it will ask again: `seq` stays what it was
        self._seq = _int(event.get("seq"), self._seq)
        desired, add, remove = event.get("desired"), event.get("add"), event.get("remove")
        self._desired = desired if isinstance(desired, list) else ()
        self._reason = str(event.get("reason", ""))
        removed = self._leave(remove)
        lost = self._leave(event.get("lost"))
        added = self._add(add if isinstance(add, dict) else {})
        if added or removed or lost:
            changes = [*(f"+{name}" for name in added), *(f"-{name}" for name in (*removed, *lost))]
            self._note(f"workers {' '.join(changes)}: {self._reason}")
        for name in removed:
            self._retire(name, False)
        for name in lost:
            self._retire(name, True)

    def _leave(self, names: object) -> list[str]:
        return [str(name) for name in names if self._fleet.leave(str(name))] if isinstance(names, list) else []

    def _add(self, counts: dict[str, object]) -> list[str]:
        if self._clock.now() < self._fails_until:
            return []
        asked = [role for role, count in counts.items() for _ in range(_int(count, 0))]
        plans = [plan for role in asked if (plan := self._fleet.add(role)) is not None]
        for plan in plans:
            self._start(plan)
        return [plan.config.worker_id for plan in plans]

    def tell(self) -> None:
        """All routers, how things are."""
        if self._routers is None:
            return
        leader = self._routers.leader
        known = {
            "event": "fleet",
            "workers": dict(self._fleet.roles),
            "leaving": self._fleet.leaving,
            "seq": self._seq,
            "held": self._still_held(),
            "desired": self._desired,
            "reason": self._reason,
        }
        for child in self._routers.children:
            self._routers.tell({**known, "leader": child is leader}, to=child)

    def _still_held(self) -> list[object] | None:
        """Counts and the seconds that are left, if any."""
        if self._held is None:
            return None
        counts, until = self._held
        left_s = until - self._clock.now() if until is not None else None
        if left_s is not None and left_s <= 0:
            self._held = None
            return None
        return [*counts, left_s]


def _int(value: object, default: int) -> int:
    return value if isinstance(value, int) else default
