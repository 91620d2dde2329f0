"""The transfer thread: the only one that touches a backend and its sender.

    call(fn, *args)                from any thread, in order ─────┐
    call_after(event, fn, *args)   once a GPU has come so far ────┼─> thread: run calls ─> sender.step
    watch(True)                    poll for arrivals ─────────────┘                          ─> notifications ─> wait
    rotate(generation, done)       arrivals, then a new agent

Calls behind events keep an order of their own: a GPU may lag by a whole step, and leases do not wait for it.
While something is under way it polls: at once after a write that has ended, else with short sleeps of 0.2 ms, and up
to 1 ms when nothing comes; a spinning thread would take a core from the model. With nothing to do it blocks until
the next call, but for one look a second: UCX lets go of connections that strangers opened and left only when it is
looked after, and each holds a descriptor.
An exception ends the thread and reaches `on_failure`.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ..common.batch import GpuEvent
from ..common.errors import ProtocolError, TransferError
from ..wire.codec import Decoder
from ..wire.grants import RegionInfo
from ..wire.handoff import KVArrived
from .backends.base import TransferBackend
from .protocol.peer_log import PeerLog
from .send.sender import KVSender

MIN_POLL_S = 0.0002
MAX_POLL_S = 0.001
_IDLE_S = 1.0  # between two looks with nothing to do
_WATCH_POLL_S = 0.0005  # where only arrivals are waited for; over TCP, writes advance when their target polls

_decoder: Decoder[KVArrived] = Decoder(KVArrived)
_Call = tuple[Callable[..., object], tuple[object, ...]]


class _Deferred(NamedTuple):
    event: GpuEvent | None
    function: Callable[..., object]
    args: tuple[object, ...]


class TransferThread:
    """Owns the backend from `start` to `close`, which also closes it."""

    def __init__(
        self,
        backend: TransferBackend,
        *,
        sender: KVSender | None = None,
        on_arrived: Callable[[str, KVArrived], None] | None = None,
        on_failure: Callable[[BaseException], None],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_arrived(agent, message)` runs on the transfer thread, for each notification of an arrival; `prepare` too,
        before all else: a thread has a current GPU of its own.
        """
        self._prepare = prepare
        self._backend = backend
        self._sender = sender
        self._on_arrived = on_arrived
        self._on_failure = on_failure
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._deferred: deque[_Deferred] = deque()  # the thread's own
        self._wanted = False  # what `watch` was told last
        self._watching = False  # what the thread does
        self._poll_s = MIN_POLL_S
        self._is_idle = False  # nothing was called since the last turn
        self._thread = threading.Thread(target=self._run, name="transfer", daemon=True)
        self.num_malformed = 0  # notifications that no correct peer sends, dropped
        self._log = PeerLog("notification_dropped")

    def start(self) -> None:
        self._thread.start()

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Run `function(*args)` on the transfer thread, in the order of the calls."""
        self._calls.put((function, args))

    def call_after(self, event: GpuEvent | None, function: Callable[..., object], *args: object) -> None:
        """Run as `call` does, once `event` has passed, in the order of these calls. None: it waits for nothing more."""
        self.call(self._defer, _Deferred(event, function, args))

    def _defer(self, deferred: _Deferred) -> None:
        self._deferred.append(deferred)
        self._run_deferred()

    def _run_deferred(self) -> None:
        while self._deferred and (self._deferred[0].event is None or self._deferred[0].event.query()):
            _, function, args = self._deferred.popleft()
            function(*args)
            self._poll_s = MIN_POLL_S

    def watch(self, on: bool) -> None:
        """Poll for notifications, or only while something is being sent. Callers take turns (the worker's lock)."""
        if on != self._wanted:
            self._wanted = on
            self.call(self._set_watching, on)

    def _set_watching(self, on: bool) -> None:
        self._watching = on

    def rotate(self, generation: int, done: Callable[[RegionInfo | TransferError], None]) -> None:
        """Replace the backend's agent, after what has arrived there was handed out. `done` runs on the thread."""
        self.call(self._rotate, generation, done)

    def _rotate(self, generation: int, done: Callable[[RegionInfo | TransferError], None]) -> None:
        self._deliver()
        try:
            result: RegionInfo | TransferError = self._backend.rotate(generation)
        except TransferError as error:
            result = error
        done(result)

    def close(self) -> None:
        """End the thread after the calls before this one, then close the backend. Idempotent."""
        self._calls.put(None)
        if self._thread.is_alive():
            self._thread.join()
        self._backend.close()

    def _run(self) -> None:
        try:
            self._prepare()
            timeout_s = 0.0
            while self._take_calls(timeout_s):
                timeout_s = self._turn()
        except BaseException as error:  # its owner decides: the thread must not die in silence
            self._on_failure(error)

    def _take_calls(self, timeout_s: float) -> bool:
        """Run what was called; wait for the first call at most so long. False: the thread is to end."""
        self._is_idle = True
        try:
            call = self._calls.get(timeout=timeout_s)
            self._is_idle = False
            while call is not None:
                function, args = call
                function(*args)
                self._poll_s = MIN_POLL_S
                call = self._calls.get_nowait()
            return False
        except queue.Empty:
            return True

    def _turn(self) -> float:
        """One round of progress; how long to wait for a call before the next."""
        self._run_deferred()
        wait_s = self._sender.step() if self._sender is not None else None
        if self._deferred:
            wait_s = 0.0  # a GPU tells nobody: ask again soon
        if not self._watching and wait_s != 0.0:
            if self._is_idle:
                self._deliver()
            return _IDLE_S if wait_s is None else min(wait_s, _IDLE_S)
        if self._deliver():
            self._poll_s = MIN_POLL_S
        if self._sender is not None and self._sender.made_progress:
            self._poll_s = MIN_POLL_S
            return 0.0
        if wait_s == 0.0:
            poll_s, self._poll_s = self._poll_s, min(2 * self._poll_s, MAX_POLL_S)
            return poll_s
        return _WATCH_POLL_S if wait_s is None else min(wait_s, _WATCH_POLL_S)

    def _deliver(self) -> bool:
        """Hand out notifications; reading them is also what makes progress."""
        notifications = self._backend.notifications()
        for agent, payload in notifications:
            try:
                message = _decoder.decode(payload)
            except ProtocolError as error:
                self.num_malformed += 1
                self._log.warn(agent, "malformed", detail=str(error))
                continue
            if self._on_arrived is not None:
                self._on_arrived(agent, message)
        return bool(notifications)
