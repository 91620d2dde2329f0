"""A simulated worker among others, as its shipments and reads see it, and the run, as its workers see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from ..wire.fields import Message
from ..wire.handoff import KVArrived
from ..wire.workers import WorkerHello
from ..worker.core import WorkerCore
from .costs.network import Link, Port
from .jobs import Job, JobContents
from .kernel import Kernel
from .scenario import Scenario

Worker = TypeVar("Worker")


class Neighbour(Protocol):
    """The part of a `SimWorker` that has to do with other workers."""

    worker_id: str
    incarnation: int
    core: WorkerCore
    now: Callable[[], float]

    @property
    def step_s(self) -> tuple[float, float]:
        """Return when the step that runs began, and when it ends."""
        ...

    def next_number(self) -> int:
        """Return a number that nothing else in this run has."""
        ...

    def after(self, delay_s: float, handler: Callable[..., object], *args: object) -> None:
        """Call back then, unless this worker is dead by that time."""
        ...

    def path_to(self, address: str) -> tuple[Link, Port]:
        """Return the way to a worker, and the port that it ends at."""
        ...

    def path_from(self, address: str) -> tuple[Link, Port]:
        """Return the way from a worker, and the port that it begins at."""
        ...

    def to_target(self, kv_address: str, message: Message) -> None:
        """Send a message to the worker with this address."""
        ...

    def notify(self, kv_address: str, message: KVArrived) -> None:
        """Tell a worker that all of a shipment is in its memory."""
        ...


class Cluster(Protocol[Worker]):
    """The part of a `World` that its workers know."""

    scenario: Scenario
    kernel: Kernel
    jobs: dict[str, Job]
    contents: JobContents

    @property
    def no_link(self) -> Link: ...
    def link(self, a: Worker, b: Worker) -> Link: ...
    def at(self, address: str) -> Worker | None: ...
    def next_number(self) -> int: ...
    def joined(self, worker: Worker, hello: WorkerHello) -> None: ...
    def on_message(self, worker: Worker, message: Message) -> None: ...
    def leave(self, worker: Worker) -> None: ...
    def dropped(self, worker: Worker, reason: str) -> None: ...
