"""TLS in front of HTTP: a connection is one when its client and this server have shaken hands.

    accepted ─> a place among the connections ─> handshake within HANDSHAKE_LIMIT_S ─> its HTTP connection has the place
                    │                               └─ not, or no TLS: closed, plain HTTP with an answer
                    └─ none ─> handshake all the same, for some at a time ─> 503

A handshake holds its place as an idle connection does: it goes for a newcomer, so nobody is kept out by clients that
begin and do not go on. What it is made with is asked for at its beginning, so that a reload reaches the next one.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Protocol

import structlog

from .connection_limits import Connections
from .leaving import Connection
from .plain_http import has_come, is_plain, tell_to_use_tls
from .protocol import DeadlineProtocol

HANDSHAKE_LIMIT_S = 5.0
_MAX_REFUSING = 64  # handshakes at once of clients that are then told of no room; those beyond are just closed
_MAX_ACCEPTED = 64  # in one turn of the loop
_ACCEPT_AGAIN_S = 0.2  # after no file could be opened

log = structlog.get_logger(__name__)


class Certificates(Protocol):
    """A `Certificates` has what connections are made with; None: plain HTTP."""

    @property
    def context(self) -> ssl.SSLContext | None: ...


class Handshake:
    """One connection until it is HTTP's."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.is_refused = False  # there was no room, and it is told so
        self.has_begun = False  # its client has sent something
        self.is_whole = False  # the HTTP connection has the socket
        self.task: asyncio.Task[None] | None = None

    def evict(self) -> bool:
        """A newcomer needs the room."""
        if self.task is not None:
            self.task.cancel()
        return True


class TlsListener:
    """Stands where uvicorn has a server of asyncio's. Belongs to its loop."""

    def __init__(
        self,
        sock: socket.socket,
        make: Callable[[Handshake], DeadlineProtocol],
        certificates: Certificates,
        books: Connections,
    ) -> None:
        """`make`: an HTTP connection in place of a handshake."""
        self._sock = sock.dup()  # whose end is ours: the other one's owner closes that while we wait at it
        self._sock.setblocking(False)
        self._make, self._certificates, self._books = make, certificates, books
        self._handshakes: set[Handshake] = set()
        self._num_refusing = 0
        self._idle_s = 0.0  # of connections that come when no more are accepted
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._sock, self._accept)

    @property
    def is_shaking(self) -> bool:
        return bool(self._handshakes)

    def close(self) -> None:
        """Accept no more; handshakes that have begun go on. Idempotent."""
        if self._sock.fileno() < 0:
            return
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()

    def leave(self, idle_s: float) -> None:
        """Let connections that are still to come of handshakes leave; those of silent clients end after so long."""
        self._idle_s = idle_s
        self._loop.call_later(idle_s, self._end_silent)

    def _end_silent(self) -> None:
        for handshake in self._handshakes:
            if not handshake.has_begun and not has_come(handshake.sock):
                handshake.evict()

    async def wait_closed(self) -> None:
        tasks = [each.task for each in self._handshakes if each.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self) -> None:
        """Accept what has come. Not by `sock_accept`: what that has accepted when it is cancelled would be lost."""
        for _ in range(_MAX_ACCEPTED):
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # another router has it, or it left
                return
            except OSError as error:
                log.warning("cannot_accept", error=error.strerror)
                self._loop.remove_reader(self._sock)
                self._again = self._loop.call_later(_ACCEPT_AGAIN_S, self._loop.add_reader, self._sock, self._accept)
                return
            sock.setblocking(False)
            self._begin(Handshake(sock), str(address[0]))

    def _begin(self, handshake: Handshake, host: str) -> None:
        full = self._books.open(handshake, host, is_final=False)
        if full and self._num_refusing >= _MAX_REFUSING:
            self._books.observer.on_refused_connection(full)
            handshake.sock.close()
            return
        handshake.is_refused = bool(full)
        self._num_refusing += handshake.is_refused
        self._handshakes.add(handshake)
        handshake.task = self._loop.create_task(self._shake(handshake))
        handshake.task.add_done_callback(lambda task: self._end(handshake))  # one may be evicted before it runs

    def _end(self, handshake: Handshake) -> None:
        self._books.close(handshake)
        self._handshakes.discard(handshake)
        self._num_refusing -= handshake.is_refused
        if not handshake.is_whole:
            handshake.sock.close()

    async def _shake(self, handshake: Handshake) -> None:
        connection, until_s = self._make(handshake), self._loop.time() + HANDSHAKE_LIMIT_S
        try:
            async with asyncio.timeout_at(until_s):
                has_no_tls = await is_plain(handshake.sock)
            handshake.has_begun = True
            if has_no_tls:
                await tell_to_use_tls(handshake.sock)
                raise ConnectionAbortedError
            await self._loop.connect_accepted_socket(
                lambda: connection,
                handshake.sock,
                ssl=self._certificates.context,
                ssl_handshake_timeout=max(until_s - self._loop.time(), 0.001),
            )
            handshake.is_whole = True
            if self._sock.fileno() < 0 and isinstance(connection, Connection):
                connection.leave(self._idle_s)
        except OSError:  # of TLS, of the network, or as it takes too long
            self._books.observer.on_slow_client("handshake")
