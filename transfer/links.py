"""The control sockets of handoffs and fetches: who writes or reads connects to the worker that holds the blocks.

    KVLinks  (writes, reads)   one link per worker, opened at the first message to it, closed when it breaks
    KVServer (is written to)   accepts them; each connection is a session of its own, so that what an old one still had
                        queued cannot be taken for the new one's

Both live on the network thread and know no protocol: they carry frames and say when a peer is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count

import structlog

from ..common.errors import ConfigError, ProtocolError, WorkerLost
from ..wire.address import Address
from ..wire.channel import Channel, connect, serve, server_address
from ..wire.codec import Decoder, DecodeToPrefill, FetcherToLender, LenderToFetcher, PrefillToDecode
from ..wire.credentials import SharedSecret
from ..wire.fields import Message
from .protocol.peer_log import PeerLog

MAX_FRAME_BYTES = 1 << 18  # a renewal names many opens of a pair (`send/leases.py`)

log = structlog.get_logger(__name__)
_MAX_QUEUED_MESSAGES = 4096  # while a link is being opened

_to_server: Decoder[PrefillToDecode | FetcherToLender] = Decoder(PrefillToDecode | FetcherToLender)
_to_links: Decoder[DecodeToPrefill | LenderToFetcher] = Decoder(DecodeToPrefill | LenderToFetcher)


def _send(channel: Channel, message: Message) -> None:
    """Send, or end the connection: whoever waits for a message that is too large has to learn that it is lost."""
    try:
        channel.send(message)
    except ProtocolError as error:
        log.error("message_too_large", peer=channel.peer_id, error=str(error))
        channel.abort()


class KVLinks:
    """A prefill worker's links to decode workers, by their handoff address."""

    def __init__(
        self,
        worker_id: str,
        secret: SharedSecret,
        on_message: Callable[[str, DecodeToPrefill | LenderToFetcher], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._worker_id = worker_id
        self._secret = secret
        self._on_message = on_message
        self._on_lost = on_lost
        self._channels: dict[str, Channel | list[Message]] = {}  # open, or what waits for the link to open
        self._log = PeerLog("kv_link_refused")
        self._unreached = PeerLog("kv_link_not_made")
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, kv_address: str, message: Message) -> None:
        """Queue a message; a link that cannot be opened or breaks ends in `on_lost(kv_address)`."""
        link = self._channels.get(kv_address)
        if isinstance(link, Channel):
            _send(link, message)
        elif link is not None and len(link) < _MAX_QUEUED_MESSAGES:
            link.append(message)
        elif link is None:
            self._channels[kv_address] = [message]
            task = asyncio.get_running_loop().create_task(self._run(kv_address))
            self._tasks.add(task)
            task.add_done_callback(self._on_ended)

    async def _connect(self, kv_address: str) -> Channel:
        """Open a link. One that never was is told: routers only see that nobody opened a grant in time."""
        try:
            return await connect(
                Address.parse(kv_address), self._worker_id, secret=self._secret, max_frame_bytes=MAX_FRAME_BYTES
            )
        except WorkerLost as error:
            self._unreached.warn(kv_address, "unreached", detail=str(error))
            raise

    async def _run(self, kv_address: str) -> None:
        try:
            channel = await self._connect(kv_address)
            waiting = self._channels[kv_address]
            assert isinstance(waiting, list)
            self._channels[kv_address] = channel
            try:
                for message in waiting:
                    channel.send(message)
                while True:
                    self._on_message(kv_address, _to_links.decode(await channel.recv()))
            finally:
                channel.abort()
        except WorkerLost as error:
            log.debug("kv_link_lost", peer=kv_address, reason=str(error))
        except ProtocolError as error:  # another reason, and the same consequence
            self._log.warn(kv_address, "protocol", detail=str(error))
        finally:
            del self._channels[kv_address]
            self._on_lost(kv_address)

    def _on_ended(self, task: asyncio.Task[None]) -> None:
        """Tell why a link ended that should not have: with a worker whose other rank is gone, messages find nobody."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("kv_link_failed", error=f"{type(error).__name__}: {error}")

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class KVServer:
    """A decode worker's end of the links."""

    def __init__(
        self,
        worker_id: str,
        secret: SharedSecret,
        on_message: Callable[[str, PrefillToDecode | FetcherToLender], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._worker_id = worker_id
        self._secret = secret
        self._on_message = on_message
        self._on_lost = on_lost
        self._sessions: dict[str, Channel] = {}
        self._numbers = count(1)
        self._log = PeerLog("kv_peer_refused")
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> Address:
        """Listen; the address tells the port where 0 was asked for. Raises ConfigError where that cannot be."""
        address = Address(host, port)
        try:
            self._server = await serve(
                address,
                self._worker_id,
                self._accept,
                secret=self._secret,
                max_frame_bytes=MAX_FRAME_BYTES,
                on_refused=self._on_refused,
            )
        except OSError as error:
            raise ConfigError(f"handoff_port: cannot listen on {address}: {error.strerror or error}") from error
        return server_address(self._server, host)

    def send(self, session: str, message: Message) -> None:
        """Send to a session that may be gone already: then the message is dropped, its end was told by `on_lost`."""
        channel = self._sessions.get(session)
        if channel is not None:
            _send(channel, message)

    async def _accept(self, channel: Channel) -> None:
        session = f"{channel.peer_id}#{next(self._numbers)}"
        self._sessions[session] = channel
        try:
            while True:
                self._on_message(session, _to_server.decode(await channel.recv()))
        except ProtocolError as error:  # its session ends
            self._log.warn(channel.peer_id, error.kind, detail=str(error))
        finally:
            del self._sessions[session]
            self._on_lost(session)

    def _on_refused(self, error: ProtocolError) -> None:
        """Tell of a connection that came to no session. Strangers are one peer: they may give themselves any name."""
        self._log.warn("unknown", error.kind, detail=str(error))

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for channel in list(self._sessions.values()):
            channel.abort()
        await asyncio.sleep(0)
