"""A process for work that a client or a model directory may make long: it can be killed, this one must not stand still.

    ask ─> waits its turn ─> sent ─> answered ─> the next one
                              └─> not within its limit, or the process ended: HelperLost, and a new process for the next

The process is started when it is first needed, has bounded memory and none of the router's secrets, and ends with the
router. What it can do is `program.py`'s. Frames both ways: a byte that says what it is, the length, the bytes.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .wire import FRAME, READY, SETUP

START_LIMIT_S = 30.0  # of a new process: imports, on a machine that is busy
_SECRET_PREFIX = "KVFERRY_"
_READ_BYTES = 2**18


class HelperLost(Exception):
    """The process did not answer within the limit (`is_late`), or `has_ended`. Nothing else is known of the work."""

    def __init__(self, reason: str, *, is_late: bool = False, has_ended: bool = False) -> None:
        super().__init__(reason)
        self.is_late = is_late
        self.has_ended = has_ended


@dataclass(slots=True)
class _Ask:
    kind: bytes
    payload: bytes
    limit_s: float
    answer: asyncio.Future[tuple[bytes, bytes]]


class Helper:
    """One process at a time, with one piece of work at a time. Belongs to one loop."""

    def __init__(self, setup: tuple[bytes, bytes] | None = None) -> None:
        """`setup`: kind and payload of a frame that every new process gets first."""
        self._setup = setup
        self._waiting: deque[_Ask] = deque()
        self._running: _Ask | None = None
        self._process: _Process | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def ask_again(self, kind: bytes, payload: bytes, limit_s: float) -> tuple[bytes, bytes]:
        """Ask, and where the process ends, once more: it may have been killed by no fault of the work's."""
        try:
            return await self.ask(kind, payload, limit_s)
        except HelperLost as error:
            if not error.has_ended:
                raise
        return await self.ask(kind, payload, limit_s)

    async def ask(self, kind: bytes, payload: bytes, limit_s: float) -> tuple[bytes, bytes]:
        """Kind and payload of the answer. The limit counts from when its turn comes. Raises HelperLost."""
        ask = _Ask(kind, payload, limit_s, asyncio.get_running_loop().create_future())
        self._waiting.append(ask)
        self._next()
        return await ask.answer

    def start(self) -> None:
        """Start the process now: the first who asks need not wait for it."""
        if self._process is None:
            self._process = _Process(self._take, self._lost, has_setup=self._setup is not None)
            if self._setup is not None:
                self._process.send(*self._setup)

    def close(self) -> None:
        """End the process; what is asked is lost."""
        asks = [self._running, *self._waiting]
        self._running = None
        self._waiting.clear()
        self._end_process()
        for ask in asks:
            if ask is not None:
                _fail(ask, HelperLost("the router stops"))

    def _next(self) -> None:
        while self._waiting and self._running is None:
            ask = self._waiting.popleft()
            if ask.answer.done():
                continue  # nobody waits for it any more
            try:
                self.start()
            except OSError as error:
                _fail(ask, HelperLost(f"no process can be started: {error}"))
            else:
                self._running = ask
                self._send(ask)

    def _send(self, ask: _Ask) -> None:
        """Once the process is ready."""
        assert self._process is not None
        self._limit(ask.limit_s if self._process.is_ready else START_LIMIT_S)
        if self._process.is_ready:
            self._process.send(ask.kind, ask.payload)

    def _take(self, kind: bytes, payload: bytes) -> None:
        assert self._process is not None
        ask = self._running
        if kind == READY:
            self._process.is_ready = True
            if ask is not None:
                self._send(ask)
            return
        assert ask is not None
        self._running = None
        self._limit(None)
        if not ask.answer.done():
            ask.answer.set_result((kind, payload))
        self._next()

    def _lost(self, error: HelperLost) -> None:
        self._end_process()
        ask, self._running = self._running, None
        if ask is not None:
            _fail(ask, error)
        self._next()

    def _limit(self, limit_s: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if limit_s is not None:
            error = HelperLost(f"it did not answer within {limit_s:g} s", is_late=True)
            self._timer = asyncio.get_running_loop().call_later(limit_s, self._lost, error)

    def _end_process(self) -> None:
        self._limit(None)
        process, self._process = self._process, None
        if process is not None:
            process.end()


def _fail(ask: _Ask, error: HelperLost) -> None:
    if not ask.answer.done():
        ask.answer.set_exception(error)


class _Process:
    """The process and the socket to it. It ends when nobody refers to it any more."""

    def __init__(
        self,
        on_frame: Callable[[bytes, bytes], None],
        on_lost: Callable[[HelperLost], None],
        *,
        has_setup: bool,
    ) -> None:
        """`has_setup`: the process is ready when it has done what its first frame says."""
        self.is_ready = False
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[memoryview] = deque()
        self._received = bytearray()
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        env = {name: value for name, value in os.environ.items() if not name.startswith(_SECRET_PREFIX)}
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "kvferry.router.helpers.program", *([SETUP] if has_setup else [])],
                stdin=theirs.fileno(),
                env=env,
                process_group=0,  # a terminal's Ctrl-C is the router's to act on
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self.pid = process.pid
        self._process = process
        self._unattended = weakref.finalize(self, _kill, process, self._socket)
        self._loop.add_reader(self._socket, self._read)

    def send(self, kind: bytes, payload: bytes) -> None:
        was_sending = bool(self._unsent)
        self._unsent.append(memoryview(FRAME.pack(kind, len(payload)) + payload))
        if not was_sending:
            self._write()

    def end(self) -> None:
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._unattended.detach()
        self._process.kill()
        self._socket.close()
        # The kernel takes a while to take gigabytes back.
        threading.Thread(target=self._process.wait, name="helper-end", daemon=True).start()

    def _write(self) -> None:
        try:
            while self._unsent:
                part = self._unsent[0]
                num_sent = self._socket.send(part)
                if num_sent < len(part):
                    self._unsent[0] = part[num_sent:]
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._write)
        except OSError:
            self._unsent.clear()  # it has ended: reading tells
        else:
            self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        try:
            part = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if not part:
            self._on_lost(HelperLost("its process ended", has_ended=True))
            return
        self._received += part
        while len(self._received) >= FRAME.size:
            kind, size = FRAME.unpack_from(self._received)
            end = FRAME.size + size
            if len(self._received) < end:
                return
            payload = bytes(memoryview(self._received)[FRAME.size : end])
            del self._received[:end]
            self._on_frame(kind, payload)


def _kill(process: subprocess.Popen[bytes], sock: socket.socket) -> None:
    """Kill the process of a helper that nobody closed."""
    process.kill()
    sock.close()
    process.wait()
