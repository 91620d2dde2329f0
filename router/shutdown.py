"""The router process ends in steps: who may finish what, and for how long.

SIGTERM          running answers get the drain limit; each open connection may ask once more. What sends it to all
                 processes of a service reaches a router twice, as the launcher tells it too: that is one
SIGINT           they get a few seconds
a second signal  none
then             what is left ends with an error event
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterator

import structlog

from .catalogue.catalogue import Catalogue
from .http.http_server import HttpServer
from .http.in_flight import InFlight

INTERRUPT_LIMIT_S = 3.0  # for running answers after SIGINT; less than the launcher's patience
SAME_S = 1.0  # two SIGTERMs within are one; a launcher that is busy takes some tens of milliseconds to pass it on
IDLE_S = 1.0  # an idle connection's last chance to ask, after SIGTERM

log = structlog.get_logger(__name__)


class Stop:
    """A stop as signals ask for it: SIGTERM to drain, SIGINT to end soon; after either, another one to end at once."""

    def __init__(self, drain_s: float) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()
        self.is_patient = False
        self._drain_s = drain_s
        self._asked_s = 0.0

    @property
    def limit_s(self) -> float:
        """The limit for running answers."""
        return self._drain_s if self.is_patient else INTERRUPT_LIMIT_S

    def _on_signal(self, number: int) -> None:
        now = asyncio.get_running_loop().time()
        if not self.asked.is_set():
            self.is_patient, self._asked_s = number == signal.SIGTERM, now
            self.asked.set()
        elif not (number == signal.SIGTERM and self.is_patient and now < self._asked_s + SAME_S):
            self.at_once.set()

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield self
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


async def wind_down(front: HttpServer, catalogue: Catalogue, in_flight: InFlight, stop: Stop) -> None:
    """Let what runs finish within the limit, and each open connection ask once more; then all get an error."""
    log.info("router_drains", in_flight=len(in_flight), limit_s=stop.limit_s)
    in_flight.is_leaving = True
    front.leave(IDLE_S if stop.is_patient else 0.0)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(stop.limit_s):
            await first_of(front.left(), stop.at_once.wait())
    log.info("router_stops", in_flight=len(in_flight))
    in_flight.is_closing = True
    await catalogue.drain(0.0)
    in_flight.end_all()


async def first_of(*work: Coroutine[object, object, object]) -> set[asyncio.Task[object]]:
    """Wait until one of them ends. Returns what has ended; the others are cancelled."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done
    finally:
        for task in tasks:
            task.cancel()
