"""Sessions of workers begin and end. A worker has one, the newest; what it had when that ends goes on elsewhere.

begin ─> an older one ends; a worker that was here before drops what it still has ─> it is in its pool
end   ─> it is in no pool; `losses` says what becomes of its requests
"""

from __future__ import annotations

from ...wire.workers import LiveRequests, WorkerHello
from ..queue.admission import Admission
from ..state.failures import OTHERS_FIRST_S, WorkerLife
from ..state.pools import Pools
from ..state.worker import RouterWorker, WorkerLink
from .in_flight import InFlightRequests
from .losses import Losses
from .placer import Placer


class WorkerSessions:
    """`WorkerSessions` knows which life of each worker was here last."""

    def __init__(
        self,
        pools: Pools,
        in_flight: InFlightRequests,
        placer: Placer,
        admission: Admission,
        losses: Losses,
    ) -> None:
        self._pools = pools
        self._in_flight = in_flight
        self._placer = placer
        self._admission = admission
        self._losses = losses
        self._incarnations: dict[str, int] = {}  # the last one seen of each worker
        self._stuck: dict[WorkerLife, int] = {}  # in which step each of those was that hung when it was last given up

    def begin(self, link: WorkerLink, hello: WorkerHello, now: float) -> None:
        """Take in a worker. A session of the same worker that is still open is over."""
        old = self._pools.named(hello.worker_id)
        if old is not None:
            self.drop(old, "replaced by a newer session", now)
        if self._incarnations.get(hello.worker_id) == hello.incarnation:
            # When its last session broke, all that it had was placed anew or left to the decode worker.
            link.send(LiveRequests(attempts=()))
            self._losses.on_returned((hello.worker_id, hello.incarnation))
        else:
            self._stuck.pop((hello.worker_id, self._incarnations.get(hello.worker_id, 0)), None)
        self._incarnations[hello.worker_id] = hello.incarnation
        is_only = not self._pools.has_ready(hello.role)
        worker = self._pools.join(link, hello, now)
        worker.stuck_step = self._stuck.get(worker.life)
        if is_only:
            self._in_flight.let_others_first(now + OTHERS_FIRST_S)
        self._admission.forecast.on_workers_changed()

    def end(self, link: WorkerLink, reason: str, now: float) -> None:
        """Give up a worker whose session has ended. Idempotent."""
        worker = self._pools.leave(link)
        if worker is None:
            return
        self._losses.on_left(worker, reason, now)
        self._admission.forecast.on_workers_changed()
        self._placer.run(now)

    def drop_hung(self, worker: RouterWorker, reason: str, now: float) -> None:
        """End the session of a worker that hangs. One that comes back in the same step has not got on."""
        if worker.status is not None and worker.status.busy_for_s:
            self._stuck[worker.life] = worker.status.steps
        self.drop(worker, reason, now)

    def drop(self, worker: RouterWorker, reason: str, now: float) -> None:
        """End a session that is open."""
        self.end(worker.link, reason, now)
        worker.link.drop(reason)
