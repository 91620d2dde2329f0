"""A worker's sessions with the routers, and a router's with its workers.

As `worker/sessions.py` and `router/dispatch/control.py` keep them: hello first, heartbeats, connect anew after a break,
give up a router that is away.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING

from kvferry.wire.fields import Message
from kvferry.wire.hello import Refused
from kvferry.wire.workers import WorkerHello, WorkerStatus
from kvferry.worker.sessions import ROUTER_GONE_S

from .kernel import Process
from .network import Dial, End, Network

if TYPE_CHECKING:
    from .routers import Router

VERSION = "sim"  # of all workers
_BACKOFF_S = (0.1, 0.2, 0.5, 1.0)


class RouterSession:
    """A worker's connection to one router place, opened again whenever it breaks."""

    def __init__(
        self,
        network: Network,
        place: str,
        process: Process,
        router: Callable[[], Router],
        *,
        hello: WorkerHello,
        status: Callable[[str], WorkerStatus],
        on_message: Callable[[str, Message], None],
        on_lost: Callable[[str], None],
        on_joined: Callable[[str], None],
    ) -> None:
        self._network = network
        self._path = network.path(place, router().place)
        self._process = process
        self._router = router  # the life of it that is there now
        self._hello = hello
        self._status = status
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_joined = on_joined
        self._failures = 0
        self._gone: dict[str, int] = {}  # router id -> number of the timer that may give it up
        self._numbers = count()
        self.end: End | None = None
        self.router_id = ""
        self._closed = False
        self._connect()

    def _connect(self) -> None:
        if not self._closed:
            router = self._router()
            Dial(self._network, self._path, self._process, router.process, router.accept, self._on_open, self._again)

    def _again(self) -> None:
        self._process.after(_BACKOFF_S[min(self._failures, 3)], self._connect)
        self._failures += 1

    def _on_open(self, end: End) -> None:
        self._failures = 0
        self.end = end
        self.router_id = end.other.process.name
        self._gone.pop(self.router_id, None)
        end.on_message = self._take
        end.on_closed = self._on_closed
        end.send(self._hello)
        end.send(self._status(self.router_id))
        self._on_joined(self.router_id)

    def _take(self, message: Message) -> None:
        assert not isinstance(message, Refused), message
        self._on_message(self.router_id, message)

    def _on_closed(self) -> None:
        router_id, self.end = self.router_id, None
        number = self._gone[router_id] = next(self._numbers)
        self._process.after(ROUTER_GONE_S, self._give_up, router_id, number)
        self._again()

    def _give_up(self, router_id: str, number: int) -> None:
        if self._gone.get(router_id) == number:
            del self._gone[router_id]
            self._on_lost(router_id)

    def send_status(self) -> None:
        """A heartbeat."""
        if self.end is not None:
            self.end.send(self._status(self.router_id))

    def send(self, message: Message) -> None:
        """Dropped while there is no session."""
        if self.end is not None:
            self.end.send(message)

    def close(self) -> None:
        """Send what is queued and end."""
        self._closed = True
        if self.end is not None:
            self.end.close()


class WorkerSession:
    """A router's end of one session. Implements `pools.WorkerLink`."""

    def __init__(self, end: End, worker_id: str, number: int, check: Callable[[WorkerSession, Message], None]) -> None:
        self.worker_id = worker_id
        self.number = number
        self.end = end
        self._check = check

    def send(self, message: Message) -> None:
        self._check(self, message)
        self.end.send(message)

    def drop(self, reason: str) -> None:
        self.end.close(lossy=True)
