"""uvicorn as this program runs it: on a socket that listens already, ended by whoever started it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from ...common.errors import CapacityError
from ..state.errors import failure_of
from .connection_limits import Connections
from .leaving import Connection
from .protocol import WRITE_LIMIT_S, DeadlineProtocol
from .tls_listener import Certificates, Handshake, TlsListener
from .ways_out import send_failure

KEEP_ALIVE_S = 620  # longer than proxies keep idle ones, whose requests would meet the end: Google's do for 600 s
VANISHED_S = 2 * WRITE_LIMIT_S  # no sign of life: later than one that only does not read is cut for that
_PROBE_EVERY_S = 10
_FLUSH_S = 2  # for the last bytes of the last answers
_LEFT_POLL_S = 0.02


class HttpServer:
    """uvicorn without its signal handlers: who runs it says when it ends."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        protocol: type[DeadlineProtocol] = Connection,
        books: Connections | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        """`certificates`: with a context, clients come by TLS."""
        books = Connections() if books is None else books
        protocol = protocol.keeping(books)
        config = uvicorn.Config(
            _Ending(app, self),
            loop="none",
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=_FLUSH_S,
        )
        self._server = _Uvicorn(config)
        self._server.certificates = certificates

    @property
    def is_stopping(self) -> bool:
        return self._server.should_exit

    @contextlib.asynccontextmanager
    async def serving(self, sock: socket.socket) -> AsyncIterator[HttpServer]:
        """Accept connections on `sock` until the block ends or `stop` is called."""
        _notice_who_vanishes(sock)
        task = asyncio.create_task(self._server.serve(sockets=[sock]))
        try:
            yield self
        finally:
            self.stop()
            await task

    def leave(self, idle_s: float) -> None:
        """Accept no more connections; those that are open end one by one, as `leaving` tells."""
        for server in self._server.servers if self._server.started else ():
            server.close()
            if isinstance(server, TlsListener):
                server.leave(idle_s)
        for connection in self.connections:
            assert isinstance(connection, Connection)
            connection.leave(idle_s)

    @property
    def connections(self) -> list[DeadlineProtocol]:
        return [each for each in self._server.server_state.connections if isinstance(each, DeadlineProtocol)]

    async def left(self) -> None:
        """Wait until no connection is left."""
        while self._server.server_state.connections or self._server.is_shaking:  # noqa: ASYNC110  # uvicorn tells nobody
            await asyncio.sleep(_LEFT_POLL_S)

    def stop(self) -> None:
        """End what idles; the answers under way may flush."""
        self._server.should_exit = True


def _notice_who_vanishes(sock: socket.socket) -> None:
    """End connections of clients whose machine or network is gone: nothing else tells while their answer is computed.

    What is set on a socket that listens holds for those that it accepts.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, round(VANISHED_S / 2))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_EVERY_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * VANISHED_S))


class _Ending:
    """Answers requests that the end of the server cancels: uvicorn would tell of a bug, with a traceback."""

    def __init__(self, app: ASGIApp, server: HttpServer) -> None:
        self._app = app
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if not self._server.is_stopping:
                raise
            failure = failure_of(CapacityError("the server is shutting down", status=503))
            with contextlib.suppress(RuntimeError):  # the head is out: its connection just ends
                await send_failure(send, failure, failure.body)


class _Uvicorn(uvicorn.Server):
    certificates: Certificates | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if sockets is None or self.certificates is None or self.certificates.context is None:
            await super().startup(sockets)
            return
        protocol = self.config.http_protocol_class
        assert issubclass(protocol, DeadlineProtocol)

        def make(handshake: Handshake) -> DeadlineProtocol:
            made = protocol(self.config, self.server_state, self.lifespan.state)
            made.handshake = handshake
            return made

        listeners = [TlsListener(sock, make, self.certificates, protocol.books) for sock in sockets]
        self.servers = listeners  # type: ignore[assignment]  # they answer what is asked of asyncio's
        self.started = True

    @property
    def is_shaking(self) -> bool:
        servers = self.servers if self.started else ()
        return any(server.is_shaking for server in servers if isinstance(server, TlsListener))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
