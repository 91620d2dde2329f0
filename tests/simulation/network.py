"""Control connections: FIFO each way, over paths that faults slow down, cut, and heal.

    dial ─> accept ─> two Ends; send ─> Pipe (queue, delay) ─> the other End's on_message ... close ─> on_closed

A cut path holds what is on it until it heals, as TCP does; a broken connection loses it and tells both ends. Some
messages make the way through their bytes, to see that they survive it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from kvferry.wire.codec import Decoder, encode
from kvferry.wire.fields import Message

from .kernel import Kernel, Process

DIAL_TIMEOUT_S = 5.0
_CLOSE = None  # what a pipe carries last
_ENCODE_EVERY = 29  # messages; a prime, so that it falls on all kinds


class Path:
    """What lies between two machines, one way to name it for faults. Blocked paths hold what is on them."""

    __slots__ = ("_blocks", "_kernel", "_slow", "_stalled", "delay_s", "name")

    def __init__(self, kernel: Kernel, name: str, delay_s: float) -> None:
        self.name = name
        self.delay_s = delay_s
        self._slow: list[float] = []  # by how much, for each fault that slows it down
        self._kernel = kernel
        self._blocks = 0  # overlapping cuts; the last one's end heals
        self._stalled: list[tuple[Callable[..., None], tuple[object, ...]]] = []

    @property
    def is_blocked(self) -> bool:
        return self._blocks > 0

    def draw_delay(self) -> float:
        factor = max(self._slow) if self._slow else 1.0
        return self.delay_s * factor * (0.5 + self._kernel.random.random())

    def slow_down(self, factor: float) -> None:
        self._slow.append(factor)

    def speed_up(self, factor: float) -> None:
        """The end of `slow_down` by so much."""
        self._slow.remove(factor)

    def stall(self, handler: Callable[..., None], *args: object) -> None:
        """Run it when the path heals."""
        self._stalled.append((handler, args))

    def block(self) -> None:
        self._blocks += 1

    def heal(self) -> None:
        if self._blocks:
            self._blocks -= 1
        if not self._blocks:
            stalled, self._stalled = self._stalled, []
            for handler, args in stalled:
                self._kernel.after(self.draw_delay(), handler, *args)


class Chances(Protocol):
    """What may befall a message."""

    def doubled_after_s(self, message: Message) -> float | None: ...


class Network:
    """Makes connections. `tap` sees every message that a process hands over, before it leaves."""

    def __init__(
        self, kernel: Kernel, decoder: Decoder[Message], chances: Chances, tap: Callable[[End, Message], None]
    ) -> None:
        self.kernel = kernel
        self.chances = chances
        self.tap = tap
        self.num_messages = 0
        self._decoder = decoder
        self._paths: dict[tuple[str, str], Path] = {}
        self.connections: dict[Path, list[End]] = {}  # open ones, by the connecting end

    def path(self, a: str, b: str, *, delay_s: float = 0.0005) -> Path:
        """The way between two places, or between two of their planes."""
        key = (a, b) if a < b else (b, a)
        found = self._paths.get(key)
        if found is None:
            found = self._paths[key] = Path(self.kernel, f"{key[0]}~{key[1]}", delay_s)
            self.connections[found] = []
        return found

    def paths(self) -> list[Path]:
        return list(self._paths.values())

    def through_bytes(self, message: Message) -> Message:
        """Sometimes: encoded, decoded, and equal to what was sent."""
        self.num_messages += 1
        if self.num_messages % _ENCODE_EVERY:
            return message
        decoded = self._decoder.decode(encode(message))
        assert decoded == message, f"{message} became {decoded}"
        return decoded


class End:
    """One side of a connection."""

    __slots__ = ("_last_s", "_queue", "is_open", "network", "on_closed", "on_message", "other", "path", "process")

    other: End

    def __init__(self, network: Network, path: Path, process: Process) -> None:
        self.network = network
        self.path = path
        self.process = process
        self.is_open = True
        self.on_message: Callable[[Message], None] = _ignore
        self.on_closed: Callable[[], None] = _nothing
        self._queue: deque[Message | None] = deque()  # on its way to the other end
        self._last_s = 0.0

    def send(self, message: Message) -> None:
        """Queue a message; dropped if the connection has ended."""
        self.network.tap(self, message)
        self.process.say(self._send, message)

    def _send(self, message: Message) -> None:
        if self.is_open:
            message = self.network.through_bytes(message)
            self._put(message)
            late_s = self.network.chances.doubled_after_s(message)
            if late_s is not None:
                self.network.kernel.after(late_s, self._put_again, message)

    def _put_again(self, message: Message) -> None:
        if self.is_open:
            self._put(message)

    def _put(self, message: Message | None) -> None:
        kernel = self.network.kernel
        self._queue.append(message)
        self._last_s = max(self._last_s, kernel.now + self.path.draw_delay())
        kernel.at(self._last_s, self._arrive)

    def _arrive(self) -> None:
        if not self._queue:
            return  # lost with the connection
        if self.path.is_blocked:
            self.path.stall(self._arrive)
            return
        message = self._queue.popleft()
        if message is _CLOSE:
            self.other.process.run(self.other._close_here)
        else:
            self.other.process.run(self.other._take, message)

    def _take(self, message: Message) -> None:
        if self.is_open:
            self.on_message(message)

    def _close_here(self) -> None:
        if self.is_open:
            self._forget()
            self.on_closed()

    def _forget(self) -> None:
        self.is_open = False
        connections = self.network.connections[self.path]
        for end in (self, self.other):
            if end in connections and not end.is_open and not end.other.is_open:
                connections.remove(end)

    def close(self, *, lossy: bool = False) -> None:
        """End it from here. The other side hears of it behind what was sent, or instead of that."""
        if self.is_open:
            self._forget()
            if lossy:
                self._queue.clear()
            self._put(_CLOSE)

    def cut(self) -> None:
        """The network ends the connection: both sides lose what was under way."""
        for end in (self, self.other):
            end._queue.clear()
            end._put(_CLOSE)


def _ignore(message: Message) -> None:
    """Nobody listens yet."""


def _nothing() -> None:
    """Nobody listens yet."""


class Dial:
    """An attempt to connect: ends in `on_open(end)` or `on_failed()` on the caller's process, unless cancelled."""

    __slots__ = ("_accept", "_done", "_network", "_on_failed", "_on_open", "_path", "_process")

    def __init__(
        self,
        network: Network,
        path: Path,
        process: Process,
        server: Process,
        accept: Callable[[End], None],
        on_open: Callable[[End], None],
        on_failed: Callable[[], None],
    ) -> None:
        self._network = network
        self._path = path
        self._process = process
        self._accept = accept
        self._on_open = on_open
        self._on_failed = on_failed
        self._done = False
        network.kernel.after(path.draw_delay(), self._reach, server)
        network.kernel.after(DIAL_TIMEOUT_S, process.run, self._fail)

    def _reach(self, server: Process) -> None:
        if self._path.is_blocked:
            return  # nobody answers: the time runs out
        if server.is_dead:
            self._network.kernel.after(self._path.draw_delay(), self._process.run, self._fail)
        else:
            server.run(self._connect, server)

    def _connect(self, server: Process) -> None:
        if self._done or self._process.is_dead:
            return
        ours, theirs = End(self._network, self._path, self._process), End(self._network, self._path, server)
        ours.other, theirs.other = theirs, ours
        self._network.connections[self._path].append(ours)
        self._network.kernel.after(self._path.draw_delay(), self._process.run, self._open, ours)
        self._accept(theirs)

    def _open(self, end: End) -> None:
        if self._done:
            end.close(lossy=True)
            return
        self._done = True
        if end.is_open:
            self._on_open(end)
        else:
            self._on_failed()

    def _fail(self) -> None:
        if not self._done:
            self._done = True
            self._on_failed()
