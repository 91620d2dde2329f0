"""A worker's sessions with its routers: one connection each, kept up, opened again when it breaks.

    connect ─> WorkerHello ─> status ... messages both ways ... ─> broken ─> connect again (back-off)
                                                                    │
                                        away for ROUTER_GONE_S ─────┴──> on_lost: its requests are aborted

What was queued in a broken session is gone with it: the router learned from the break that it has to act. So a message
that is too large for a frame and cannot be split breaks its session, too.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import structlog

from ..common.errors import ProtocolError, WorkerLost
from ..wire.address import Address
from ..wire.channel import Channel, connect
from ..wire.codec import Decoder, RouterToWorker
from ..wire.credentials import SharedSecret
from ..wire.fields import Message
from ..wire.hello import Refused
from ..wire.results import StepTokens, halves
from ..wire.workers import Goodbye, WorkerHello, WorkerStatus
from .tasks import begin

ROUTER_GONE_S = 5.0
_BACKOFF_S = (0.1, 0.2, 0.5, 1.0)

_from_router: Decoder[RouterToWorker] = Decoder(RouterToWorker)


log = structlog.get_logger(__name__)


class _Unreached:
    """Tells once of a router that cannot be reached, and why: one that is only late, at its start, is no trouble."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._since: float | None = None  # None: it was reached
        self._is_told = False

    def note(self, reason: str, now: float) -> None:
        if self._since is None:
            self._since = now
        elif not self._is_told and now - self._since >= ROUTER_GONE_S:
            self._is_told = True
            log.warning("router_unreached", router=self._address, reason=reason, seconds=round(now - self._since, 1))

    def over(self) -> None:
        self._since, self._is_told = None, False


class RouterSessions:
    """Lives on the network thread; `send` may be called from any thread."""

    def __init__(
        self,
        addresses: tuple[str, ...],
        hello: WorkerHello,
        *,
        secret: SharedSecret,
        max_frame_bytes: int,
        on_message: Callable[[str, Message], None],
        on_lost: Callable[[str], None],
        status: Callable[[str], WorkerStatus],
        on_failure: Callable[[BaseException], None],
        on_joined: Callable[[str], None] = lambda router_id: None,
    ) -> None:
        """`on_failure`: a message could not be dealt with; no session with its router is opened again."""
        self._addresses = addresses
        self._hello = hello
        self._secret = secret
        self._max_frame_bytes = max_frame_bytes
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_failure = on_failure
        self._on_joined = on_joined
        self._status = status
        self._channels: dict[str, Channel] = {}
        self._outbox: list[tuple[str, Message]] = []
        self._outbox_lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._tasks: list[asyncio.Task[None]] = []
        self._lost_timers: dict[str, asyncio.TimerHandle] = {}
        self._twins: set[str] = set()  # addresses of routers that are reached by others as well
        self.are_ending = False  # the whole deployment stops: a session's end is no trouble
        self.refused: asyncio.Future[str] = self._loop.create_future()  # a router will not have this worker

    def start(self) -> None:
        self._tasks = [begin(self._keep(address), self._on_failure) for address in self._addresses]

    def send(self, router_id: str, message: Message) -> None:
        """Queue a message to a router; dropped if its session has ended."""
        with self._outbox_lock:
            self._outbox.append((router_id, message))
            first = len(self._outbox) == 1
        if first:
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        """Write what other threads have sent. What they have the loop call after it finds it written."""
        with self._outbox_lock:
            messages, self._outbox = self._outbox, []
        channels = {}
        for router_id, message in messages:
            channel = self._channels.get(router_id)
            if channel is not None:
                self._write(channel, message)
                channels[router_id] = channel
        for channel in channels.values():
            channel.flush()

    def _write(self, channel: Channel, message: Message) -> None:
        try:
            channel.send(message)
        except ProtocolError as error:
            if isinstance(message, StepTokens) and len(message.updates) > 1:
                for half in halves(message):
                    self._write(channel, half)
            else:
                log.error("message_too_large", router=channel.peer_id, error=str(error))
                channel.abort()

    def say_goodbye(self) -> None:
        """Tell every router that the end that comes is nobody's failure. `close` follows."""
        self._flush()
        for channel in self._channels.values():
            channel.send(Goodbye())
            channel.flush()

    def send_status(self) -> None:
        """A heartbeat to every router."""
        for router_id, channel in self._channels.items():
            channel.send(self._status(router_id))

    async def _keep(self, address: str) -> None:
        failures, unreached = 0, _Unreached(address)
        while True:
            try:
                channel = await connect(
                    Address.parse(address),
                    self._hello.worker_id,
                    secret=self._secret,
                    max_frame_bytes=self._max_frame_bytes,
                )
            except WorkerLost as error:
                failures += 1
                if not self.are_ending:
                    unreached.note(str(error), self._loop.time())
            except ProtocolError as error:
                self._refuse(f"router {address}: {error}")
                return
            else:
                unreached.over()
                if channel.peer_id in self._channels:
                    failures = len(_BACKOFF_S)  # another try is for a router that comes in its place
                    self._leave_twin(address, channel)
                else:
                    failures = 0
                    await self._converse(channel)
                if self.refused.done():
                    return
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])

    def _leave_twin(self, address: str, channel: Channel) -> None:
        """Open no second session with a router that has one by another of its addresses: it would end the first."""
        channel.abort()
        if address not in self._twins:
            self._twins.add(address)
            log.warning("router_named_twice", router=channel.peer_id, address=address)

    def _refuse(self, reason: str) -> None:
        if not self.refused.done():
            self.refused.set_result(reason)

    async def _converse(self, channel: Channel) -> None:
        router_id = channel.peer_id
        if (timer := self._lost_timers.pop(router_id, None)) is not None:
            timer.cancel()
        channel.send(self._hello)
        channel.send(self._status(router_id))
        self._channels[router_id] = channel
        self._on_joined(router_id)
        log.info("router_joined", router=router_id)
        try:
            while True:
                message = _from_router.decode(await channel.recv())
                if isinstance(message, Refused):
                    self._refuse(f"router {router_id}: {message.reason}")
                    return
                self._on_message(router_id, message)
        except WorkerLost:
            (log.debug if self.are_ending else log.warning)("router_session_ended", router=router_id)
        except ProtocolError as error:
            log.error("router_session_refused", router=router_id, error=str(error))
        finally:
            channel.abort()
            del self._channels[router_id]
            self._lost_timers[router_id] = self._loop.call_later(ROUTER_GONE_S, self._on_lost, router_id)

    async def close(self) -> None:
        """Send what is queued and end all sessions."""
        self._flush()
        for task in self._tasks:
            task.cancel()
        for channel in list(self._channels.values()):
            await channel.close()
        for timer in self._lost_timers.values():
            timer.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
