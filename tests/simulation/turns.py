"""A worker's transfer thread and its control connections to the workers that it writes to and reads from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvferry.common.batch import GpuEvent
from kvferry.wire.fields import Message

from .network import Dial, End

if TYPE_CHECKING:
    from .workers import Worker

_POLL_S = 0.02  # of a transfer thread that waits for something that will not wake it


class TransferTurns:
    """The thread that owns a rank's sender: calls in their order, then a step of it. Implements `rank_calls.Calls`."""

    def __init__(self, worker: Worker, turn_s: float, step: Callable[[], float | None]) -> None:
        """`turn_s`: from a call to the turn that runs it. `step`: the sender's."""
        self._worker = worker
        self._turn_s = turn_s
        self._step = step
        self._calls: list[tuple[Callable[..., object], tuple[object, ...]]] = []
        self._turn_at_s = float("inf")

    def call(self, function: Callable[..., object], *args: object) -> None:
        self._calls.append((function, args))
        self.poke()

    def call_after(self, event: GpuEvent | None, function: Callable[..., object], *args: object) -> None:
        self.call(function, *args)

    def poke(self) -> None:
        """Have the thread look: there is something to do."""
        self._plan_turn(self._turn_s)

    def _plan_turn(self, delay_s: float) -> None:
        due = self._worker.world.kernel.now + delay_s
        if due < self._turn_at_s:
            self._turn_at_s = due
            self._worker.process.after(delay_s, self._turn, due)

    def _turn(self, due: float) -> None:
        if due != self._turn_at_s:
            return  # an earlier one was planned after this one
        self._turn_at_s = float("inf")
        calls, self._calls = self._calls, []
        for function, args in calls:
            function(*args)
        wait_s = self._step()
        if wait_s is not None:
            self._plan_turn(max(wait_s, _POLL_S))


class Links:
    """One connection to each worker that we write to or read from, as `transfer.links.KVLinks` keeps them."""

    def __init__(
        self, worker: Worker, on_message: Callable[[str, Message], None], on_lost: Callable[[str], None]
    ) -> None:
        self._worker = worker
        self._on_message = on_message
        self._on_lost = on_lost
        self._links: dict[str, End | list[Message]] = {}  # by address; a list while it is being opened

    def send(self, kv_address: str, message: Message) -> None:
        link = self._links.get(kv_address)
        if isinstance(link, End):
            link.send(message)
        elif link is not None:
            link.append(message)
        else:
            self._links[kv_address] = [message]
            self._dial(kv_address)

    def _dial(self, kv_address: str) -> None:
        worker, network = self._worker, self._worker.world.network
        target = worker.world.addresses[kv_address]
        Dial(
            network,
            network.path(worker.place, target.place),
            worker.process,
            target.process,
            lambda end: target.accept(end, worker.place),
            lambda end: self._on_open(kv_address, end),
            lambda: self._on_end(kv_address),
        )

    def _on_open(self, kv_address: str, end: End) -> None:
        waiting = self._links[kv_address]
        assert isinstance(waiting, list)
        self._links[kv_address] = end
        end.on_message = lambda message: self._on_message(kv_address, message)
        end.on_closed = lambda: self._on_end(kv_address)
        for message in waiting:
            end.send(message)

    def _on_end(self, kv_address: str) -> None:
        del self._links[kv_address]
        self._on_lost(kv_address)
