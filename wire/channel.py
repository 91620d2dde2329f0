"""Length-prefixed frames over asyncio streams, authenticated with a shared secret.

    accepting side                 connecting side
    handshake.py            <->    handshake.py             or the connection ends
    sealed frames           <->    sealed frames

With a secret, every frame after the hello ends with a seal (`seals.py`): what was changed, injected, replayed, left out
or put in another order ends the session. The secret proves who speaks; it does not hide what is said: between hosts
that do not share a trusted network, run the fabric over a private one. Without a secret, only this machine can be
listened to.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

from ..common.errors import ConfigError, ProtocolError, WorkerLost
from .address import Address
from .codec import encode
from .credentials import NO_SECRET, SharedSecret
from .fields import Message
from .frames import DEFAULT_MAX_FRAME_BYTES, READ_BUFFER_BYTES, FrameReader, size_prefix
from .handshake import ProvenPeer, prove_to_client, prove_to_server
from .seals import SEAL_BYTES

HELLO_TIMEOUT_S = 5.0
# Connections that have not proved anything yet. One more closes the oldest of them: a peer that knows the secret proves
# it at once, whoever else has connected and says nothing.
MAX_PENDING_HELLOS = 64
_NEXT_ADDRESS_S = 0.25  # of a name with several: one that swallows what it is sent would take all the time (RFC 8305)
_DEAD_LINK_S = 5  # a peer's machine acknowledges nothing for so long
_PROBE_EVERY_S = 2
_MAX_QUEUED_BYTES = 64 << 20  # a peer that reads nothing loses its connection here


class Channel:
    """One connection after its hello. `send` never waits; `recv` raises WorkerLost when the peer is gone."""

    def __init__(
        self,
        frames: FrameReader,
        writer: asyncio.StreamWriter,
        peer: ProvenPeer,
        max_frame_bytes: int,
    ) -> None:
        self.peer_id = frames.peer = peer.peer_id
        self._frames = frames
        self._writer = writer
        self._max_frame_bytes = max_frame_bytes
        self._seals = peer.seals
        self._unsent: list[bytes] = []  # of this turn of the event loop: they leave in one write at its end
        self._num_unsent_bytes = 0

    def send(self, message: Message) -> None:
        """Queue a message. One that is larger than the peer's bound is our bug and raises at once."""
        frame = encode(message)
        if len(frame) > self._max_frame_bytes:
            raise ProtocolError(f"{type(message).__name__} of {len(frame)} bytes > {self._max_frame_bytes}")
        if self._writer.is_closing():
            return  # the reader of this channel learns of the end and acts on it
        if self._writer.transport.get_write_buffer_size() + self._num_unsent_bytes > _MAX_QUEUED_BYTES:
            self._writer.transport.abort()
            return
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self.flush)
        if self._seals is None:
            self._unsent += (size_prefix(len(frame)), frame)
        else:
            self._unsent += (size_prefix(len(frame) + SEAL_BYTES), frame, self._seals.outgoing.next(frame))
        self._num_unsent_bytes += len(frame)

    def flush(self) -> None:
        """Hand over what is queued now, not at the end of the turn."""
        if self._unsent and not self._writer.is_closing():
            self._writer.write(b"".join(self._unsent))
        self._unsent.clear()
        self._num_unsent_bytes = 0

    async def recv(self) -> bytes:
        """Return the next frame, undecoded. Raises ProtocolError for one that is too large or not the peer's."""
        if self._seals is None:
            return await self._frames.next(self._max_frame_bytes)
        return self._seals.incoming.open(await self._frames.next(self._max_frame_bytes + SEAL_BYTES), self.peer_id)

    def abort(self) -> None:
        """End the connection now, unsent frames included."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Send what is queued, then end the connection."""
        self.flush()
        self._writer.close()
        with contextlib.suppress(OSError, asyncio.CancelledError, TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), 1.0)


async def connect(
    address: Address,
    own_id: str,
    *,
    secret: SharedSecret = NO_SECRET,
    timeout_s: float = HELLO_TIMEOUT_S,
    max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
) -> Channel:
    """Open a channel. Raises WorkerLost (not there, or gone) or ProtocolError (refused)."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(
                address.host, address.port, limit=READ_BUFFER_BYTES, **_several_addresses()
            )
            try:
                _tune(writer)
                frames = FrameReader(reader, str(address))
                peer = await prove_to_server(frames, writer, own_id, secret.said)
                return Channel(frames, writer, peer, max_frame_bytes)
            except BaseException:
                writer.transport.abort()
                raise
    except (OSError, TimeoutError) as error:
        raise WorkerLost(f"no connection to {address}: {str(error) or 'timed out'}") from error


def _several_addresses() -> dict[str, float]:
    """Return what makes a connection try a name's next address. A Ray actor's loop is uvloop's, which knows no way."""
    has_it = isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop)
    return {"happy_eyeballs_delay": _NEXT_ADDRESS_S} if has_it else {}


async def serve(
    address: Address,
    own_id: str,
    on_channel: Callable[[Channel], Awaitable[None]],
    *,
    secret: SharedSecret = NO_SECRET,
    max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
    on_refused: Callable[[ProtocolError], None] = lambda error: None,
) -> asyncio.Server:
    """Accept channels; `on_channel` runs for each until it returns or raises, then the connection ends.

    Raises ConfigError without a secret on an address that other machines reach.
    """
    if not secret and not address.is_loopback:
        raise ConfigError(
            f"{address} is reachable from other machines and no secret is set; "
            "set --secret-file (or KVFERRY_SECRET), or listen on 127.0.0.1"
        )
    pending: dict[asyncio.StreamWriter, None] = {}  # in the order of their coming

    async def accept_hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Channel:
        if len(pending) >= MAX_PENDING_HELLOS:
            oldest = next(iter(pending))
            del pending[oldest]
            oldest.transport.abort()
            text = f"{_name_of(oldest)} gave way to a newer one: {MAX_PENDING_HELLOS} have not said hello yet"
            on_refused(ProtocolError(text, kind="flood"))
        pending[writer] = None
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                _tune(writer)
                frames = FrameReader(reader, _name_of(writer))
                peer = await prove_to_client(frames, writer, own_id, secret)
                return Channel(frames, writer, peer, max_frame_bytes)
        finally:
            pending.pop(writer, None)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            channel = await accept_hello(reader, writer)
            try:
                await on_channel(channel)
            finally:
                channel.flush()
        except ProtocolError as error:
            on_refused(error)
        except TimeoutError:
            text = f"{_name_of(writer)} did not say all of a hello within {HELLO_TIMEOUT_S:g} s"
            on_refused(ProtocolError(text, kind="hello"))
        except (WorkerLost, OSError):
            pass  # whoever read the channel has acted on it
        except asyncio.CancelledError:
            pass  # the server is closing
        finally:
            writer.close()

    return await asyncio.start_server(accept, address.host, address.port, limit=READ_BUFFER_BYTES)


def _name_of(writer: asyncio.StreamWriter) -> str:
    """Return what a peer is called that has not proved yet who it is."""
    found = writer.get_extra_info("peername")
    return f"connecting peer {Address(*found[:2])}" if isinstance(found, tuple) else "connecting peer"


def server_address(server: asyncio.Server, host: str) -> Address:
    """Return where a server that was started on port 0 listens."""
    return Address(host, server.sockets[0].getsockname()[1])


def _tune(writer: asyncio.StreamWriter) -> None:
    """Send at once; and end a connection over a dead link, which TCP by itself would keep for a quarter of an hour.

    It also waits longer and longer between two tries, so that it would notice late that the link is back.
    """
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _DEAD_LINK_S)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # where nothing is sent for a while
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_EVERY_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_EVERY_S)
