"""The control socket: workers connect, say who they are, and stay.

    channel hello (shared secret) ─> WorkerHello ─ checked ─> session ─> messages both ways ... ─> ended: worker lost
                                          └─ does not fit ─> Refused, naming both values

One session is one life of one worker's connection; a newer session of the same worker ends the older. A life that was
ended so by another life does not come back: it is another worker of the same name, or a lost one's ghost. Frames are
decoded here, into closed message types, and handed to the dispatcher of the worker's group; a bad one ends its session.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from itertools import count

import structlog

from ...common.clock import Clock, OwnTime, SystemClock
from ...common.errors import ProtocolError, WorkerLost
from ...wire.address import Address
from ...wire.channel import HELLO_TIMEOUT_S, Channel, serve, server_address
from ...wire.codec import Decoder, WorkerToRouter
from ...wire.credentials import NO_SECRET, SharedSecret
from ...wire.fields import Message
from ...wire.frames import DEFAULT_MAX_FRAME_BYTES
from ...wire.hello import Refused
from ...wire.workers import WorkerHello
from ..state.failures import ROUTER_STOPS
from .worker_group import WorkerGroup, find_group

TICK_S = 0.1
SLICE_BYTES = 8 * 2**10  # of one session's messages in a row: a few milliseconds of work at most
_MOST_REPLACED = 16  # lives of one worker that are remembered: more at once have one name

log = structlog.get_logger(__name__)


class WorkerSession:
    """One connection with one worker. Implements `pools.WorkerLink`."""

    def __init__(self, channel: Channel, hello: WorkerHello, number: int, group: WorkerGroup) -> None:
        self.group = group
        self.worker_id = hello.worker_id
        self.hello = hello
        self.number = number
        self._channel = channel

    def send(self, message: Message) -> None:
        self._channel.send(message)

    def drop(self, reason: str) -> None:
        log.warning("worker_session_dropped", worker_id=self.worker_id, session=self.number, reason=reason)
        self.abort()

    def abort(self) -> None:
        """End the connection at once."""
        self._channel.abort()


class ControlServer:
    """Accepts workers, each into the group that it fits, and ticks the groups' dispatchers."""

    def __init__(
        self,
        groups: Iterable[WorkerGroup],
        *,
        router_id: str,
        frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
        secret: SharedSecret = NO_SECRET,
        count_refusal: Callable[[str], None] = lambda kind: None,
        clock: Clock | None = None,
    ) -> None:
        self._count_refusal = count_refusal
        self._groups = groups  # asked anew each time: the catalogue
        self._router_id = router_id
        self._frame_bytes = frame_bytes
        self._secret = secret
        self._decoder: Decoder[Message] = Decoder(WorkerToRouter)
        self._clock = clock if clock is not None else SystemClock()
        self._numbers = count(1)
        self._sessions: dict[str, WorkerSession] = {}
        self._replaced: dict[str, deque[int]] = {}  # by worker: incarnations that were here when another one came
        self._server: asyncio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None

    async def start(self, address: Address) -> Address:
        """Listen; port 0 takes a free one. Returns where."""
        self._server = await serve(
            address,
            self._router_id,
            self._on_channel,
            secret=self._secret,
            max_frame_bytes=self._frame_bytes,
            on_refused=self._on_refused,
        )
        self._ticker = asyncio.create_task(self._tick())
        return server_address(self._server, address.host)

    async def wait(self) -> None:
        """Wait until `close`. Raises what the ticker raised: a router that does not tick must not go on."""
        assert self._ticker is not None
        await asyncio.wait([self._ticker])
        if not self._ticker.cancelled():
            self._ticker.result()

    async def close(self) -> None:
        """End all sessions and stop listening."""
        assert self._server is not None and self._ticker is not None
        self._server.close()
        self._ticker.cancel()
        for session in list(self._sessions.values()):
            self._end(session, ROUTER_STOPS)
            session.abort()
        await asyncio.wait([self._ticker])
        await self._server.wait_closed()

    def _on_refused(self, error: ProtocolError) -> None:
        log.warning("worker_refused", reason=str(error), kind=error.kind)
        self._count_refusal(error.kind)

    async def _tick(self) -> None:
        own_time = OwnTime(self._clock)
        while True:
            await asyncio.sleep(TICK_S)
            has_stood_still = own_time.look()
            for group in self._groups:
                if has_stood_still:
                    group.dispatcher.stood_still()
                else:
                    group.dispatcher.tick()

    async def _on_channel(self, channel: Channel) -> None:
        """Hold one worker's session, from its hello to its end."""
        hello, group = await self._receive_hello(channel)
        session = WorkerSession(channel, hello, next(self._numbers), group)
        self._replace(hello)
        self._sessions[hello.worker_id] = session
        group.dispatcher.worker_joined(session, hello)
        log.info("worker_joined", worker_id=hello.worker_id, role=hello.role, session=session.number, pid=hello.pid)
        reason = "the router failed"
        try:
            await self._converse(session, channel)
        except (WorkerLost, ProtocolError) as error:
            reason = str(error)
            raise
        finally:
            self._end(session, reason)

    async def _converse(self, session: WorkerSession, channel: Channel) -> None:
        """Take messages until the session ends. Where much has come at once, others have their turn in between."""
        num_bytes, dispatcher = 0, session.group.dispatcher
        while True:
            frame = await channel.recv()
            dispatcher.on_message(session, self._decoder.decode(frame))
            num_bytes += len(frame)
            if num_bytes > SLICE_BYTES:
                num_bytes = 0
                await asyncio.sleep(0)

    async def _receive_hello(self, channel: Channel) -> tuple[WorkerHello, WorkerGroup]:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = self._decoder.decode(await channel.recv())
        except TimeoutError:
            reason = (
                f"{channel.peer_id} is connected and said no WorkerHello within {HELLO_TIMEOUT_S:g} s: "
                "its larger packets may not pass on the way to here; compare MTUs"
            )
            raise ProtocolError(reason, kind="hello") from None
        if not isinstance(hello, WorkerHello):
            raise ProtocolError(f"{channel.peer_id} began with {type(hello).__name__}, not with WorkerHello")
        try:
            return hello, self._group_of(channel, hello)
        except ProtocolError as error:
            channel.send(Refused(reason=str(error)[:4096]))
            await channel.close()
            raise

    def _group_of(self, channel: Channel, hello: WorkerHello) -> WorkerGroup:
        if hello.worker_id != channel.peer_id:
            reason = f"worker id {hello.worker_id!r} is not the connection's {channel.peer_id!r}"
            raise ProtocolError(reason, kind="mismatch")
        if hello.incarnation in self._replaced.get(hello.worker_id, ()):
            reason = f"worker id {hello.worker_id!r} is another worker's, which joined later: give each its own"
            raise ProtocolError(reason, kind="mismatch")

        def peer_in(group: WorkerGroup) -> WorkerHello | None:
            sessions = self._sessions.values()
            return next((s.hello for s in sessions if s.group is group and s.worker_id != hello.worker_id), None)

        return find_group(hello, self._groups, peer_in)

    def _replace(self, hello: WorkerHello) -> None:
        old = self._sessions.get(hello.worker_id)
        if old is not None:
            if old.hello.incarnation != hello.incarnation:
                replaced = self._replaced.setdefault(hello.worker_id, deque(maxlen=_MOST_REPLACED))
                replaced.append(old.hello.incarnation)
            self._end(old, "replaced by a newer session")
            old.abort()

    def _end(self, session: WorkerSession, reason: str) -> None:
        """End a session. Idempotent."""
        if self._sessions.get(session.worker_id) is session:
            del self._sessions[session.worker_id]
        session.group.dispatcher.worker_left(session, reason)
