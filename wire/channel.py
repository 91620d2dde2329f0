"""Length-prefixed frames over asyncio streams, authenticated with a shared secret.

    accepting side                 connecting side
    Challenge(nonce)        ->
                            <-     Hello(id, nonce, mac)
    Welcome(id, mac)        ->                              or Refused(reason), and the connection ends
    sealed frames           <->    sealed frames

The connecting side says one secret, the accepting side believes any that it has: so a secret can be changed while all
runs (credentials.py). A frame is 4 bytes of length (big endian) and that many bytes. The length is checked before
anything is read, so a peer can make us hold at most one frame. With a secret, every frame after the hello ends with a
seal (`Seals`): what was changed, injected, replayed, left out or put in another order ends the session. The secret
proves who speaks; it does not hide what is said: between hosts that do not share a trusted network, run the fabric
over a private one. Without a secret, only this machine can be listened to.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ..common.errors import ConfigError, ProtocolError, WorkerLost
from ..common.request import MAX_CHOICES
from .codec import Decoder, encode
from .credentials import NO_SECRET, SharedSecret
from .fields import Message
from .hello import PROTOCOL_VERSION, Challenge, Hello, Refused, Welcome

HELLO_MAX_BYTES = 4096
HELLO_TIMEOUT_S = 5.0
DEFAULT_MAX_FRAME_BYTES = 1 << 20
_FRAME_SLACK_BYTES = 1 << 17  # everything else that a message says, a grammar among it
SEAL_BYTES = 16
_SIZE_BYTES = 4  # of a frame's size, before it
MAX_PENDING_HELLOS = 64  # connections that have not proved anything yet; more are closed unheard
_READ_BUFFER_BYTES = 1 << 18  # asyncio stops reading a connection at twice as much
_DEAD_LINK_S = 5  # a peer's machine acknowledges nothing for so long
_PROBE_EVERY_S = 2
_MAX_QUEUED_BYTES = 64 << 20  # a peer that reads nothing loses its connection here

_hello_decoder: Decoder[Challenge | Hello | Welcome | Refused] = Decoder(Challenge | Hello | Welcome | Refused)


@dataclass(frozen=True, slots=True)
class Address:
    """host:port of a TCP socket."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ProtocolError(f"{text!r} is not host:port")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Tell whether only this machine can reach the address. Of names, localhost alone is believed."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class Seals:
    """The authentication of one direction of one session.

    A seal is a keyed BLAKE2b over the frame, with the frame's number as the salt. The key comes from the shared secret
    and both nonces, so that a frame is good in one session, in one direction and at one place only.
    """

    __slots__ = ("_key", "_number")

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._number = 0  # frames so far

    def next(self, frame: bytes) -> bytes:
        """The seal of the next frame, which is `frame`."""
        salt = self._number.to_bytes(16, "little")
        self._number += 1
        return hashlib.blake2b(frame, digest_size=SEAL_BYTES, key=self._key, salt=salt).digest()

    def open(self, sealed: bytes, peer: str) -> bytes:
        """The next frame without its seal, if it is the peer's."""
        frame, seal = sealed[:-SEAL_BYTES], sealed[-SEAL_BYTES:]
        if len(sealed) < SEAL_BYTES or not hmac.compare_digest(seal, self.next(frame)):
            raise ProtocolError(
                f"frame {self._number} from {peer} has a wrong seal: changed, injected, repeated or out of order",
                kind="seal",
            )
        return frame


@dataclass(slots=True)
class SealPair:
    """The seals of one end of a session."""

    outgoing: Seals
    incoming: Seals


class FrameReader:
    """Frames out of a stream: each is its size in four bytes, and as many bytes. One read may bring many."""

    def __init__(self, stream: asyncio.StreamReader, peer: str) -> None:
        self.peer = peer  # for error texts
        self._stream = stream
        self._received = b""  # what has come of frames that `next` has not returned, and before that what it has
        self._begin = 0  # of the next frame in it

    async def next(self, max_bytes: int) -> bytes:
        """Return the next frame. Raises ProtocolError for one that is larger, WorkerLost where the peer is gone."""
        while True:
            begin = self._begin + _SIZE_BYTES
            num_missing = begin - len(self._received)
            if num_missing <= 0:
                size = int.from_bytes(self._received[self._begin : begin], "big")
                if size > max_bytes:
                    text = f"{self.peer} announced a frame of {size} bytes, the bound is {max_bytes}"
                    raise ProtocolError(text, kind="size")
                num_missing += size
                if num_missing <= 0:
                    self._begin = begin + size
                    return self._received[begin : self._begin]
            await self._receive(num_missing)

    async def _receive(self, num_bytes: int) -> None:
        """Take what has come: of a small frame perhaps many more, of a large one the rest of it."""
        try:
            if num_bytes > _READ_BUFFER_BYTES:
                data = await self._stream.readexactly(num_bytes)
            else:
                data = await self._stream.read(_READ_BUFFER_BYTES)
                if not data:
                    raise asyncio.IncompleteReadError(data, num_bytes)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise WorkerLost(f"connection to {self.peer} ended: {error}") from error
        self._received, self._begin = self._received[self._begin :] + data, 0


class Channel:
    """One connection after its hello. `send` never waits; `recv` raises WorkerLost when the peer is gone."""

    def __init__(
        self,
        frames: FrameReader,
        writer: asyncio.StreamWriter,
        peer_id: str,
        max_frame_bytes: int,
        seals: SealPair | None = None,
    ) -> None:
        self.peer_id = frames.peer = peer_id
        self._frames = frames
        self._writer = writer
        self._max_frame_bytes = max_frame_bytes
        self._seals = seals  # None: there is no secret
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
            self._unsent += (len(frame).to_bytes(4, "big"), frame)
        else:
            size = len(frame) + SEAL_BYTES
            self._unsent += (size.to_bytes(4, "big"), frame, self._seals.outgoing.next(frame))
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


def _mac(secret: bytes, label: bytes, first: bytes, second: bytes, peer_id: str) -> bytes:
    if not secret:
        return b""
    text = b"\0".join((label, first.hex().encode(), second.hex().encode(), peer_id.encode()))
    return hmac.new(secret, text, hashlib.sha256).digest()


def _seals(secret: bytes, challenge: bytes, hello: bytes, *, connecting: bool) -> SealPair | None:
    """`challenge` and `hello` are the nonces of the accepting and of the connecting side."""
    if not secret:
        return None
    keys = [_mac(secret, label, challenge, hello, "") for label in (b"frames of connecting", b"frames of accepting")]
    outgoing, incoming = keys if connecting else reversed(keys)
    return SealPair(Seals(outgoing), Seals(incoming))


def _write(writer: asyncio.StreamWriter, message: Message) -> None:
    frame = encode(message)
    writer.write(len(frame).to_bytes(4, "big") + frame)


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
            reader, writer = await asyncio.open_connection(address.host, address.port, limit=_READ_BUFFER_BYTES)
            try:
                return await _connect_hello(reader, writer, str(address), own_id, secret.said, max_frame_bytes)
            except BaseException:
                writer.transport.abort()
                raise
    except (OSError, TimeoutError) as error:
        raise WorkerLost(f"no connection to {address}: {error or 'timed out'}") from error


async def _connect_hello(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    peer: str,
    own_id: str,
    secret: bytes,
    max_frame_bytes: int,
) -> Channel:
    _tune(writer)
    frames = FrameReader(reader, peer)
    challenge = _hello_decoder.decode(await frames.next(HELLO_MAX_BYTES))
    if not isinstance(challenge, Challenge):
        raise ProtocolError(f"{peer} did not begin with a challenge")
    if challenge.protocol != PROTOCOL_VERSION:
        raise ProtocolError(f"{peer} speaks protocol {challenge.protocol}, we speak {PROTOCOL_VERSION}")
    nonce = secrets.token_bytes(16)
    mac = _mac(secret, b"hello", challenge.nonce, nonce, own_id)
    _write(writer, Hello(protocol=PROTOCOL_VERSION, id=own_id, nonce=nonce, mac=mac))
    answer = _hello_decoder.decode(await frames.next(HELLO_MAX_BYTES))
    if isinstance(answer, Refused):
        raise ProtocolError(f"{peer} refused: {answer.reason}")
    if not isinstance(answer, Welcome) or not hmac.compare_digest(
        answer.mac, _mac(secret, b"welcome", nonce, challenge.nonce, answer.id)
    ):
        raise ProtocolError(f"{peer} did not prove that it knows the shared secret")
    seals = _seals(secret, challenge.nonce, nonce, connecting=True)
    return Channel(frames, writer, answer.id, max_frame_bytes, seals)


async def _accept_hello(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    own_id: str,
    secret: SharedSecret,
    max_frame_bytes: int,
) -> Channel:
    _tune(writer)
    frames = FrameReader(reader, "connecting peer")
    nonce = secrets.token_bytes(16)
    _write(writer, Challenge(protocol=PROTOCOL_VERSION, nonce=nonce))
    hello = _hello_decoder.decode(await frames.next(HELLO_MAX_BYTES))
    if not isinstance(hello, Hello):
        raise ProtocolError("the peer did not answer the challenge")
    proven = [
        value
        for value in secret.accepted
        if hmac.compare_digest(hello.mac, _mac(value, b"hello", nonce, hello.nonce, hello.id))
    ]
    if hello.protocol != PROTOCOL_VERSION:
        reason = f"protocol {hello.protocol} is not ours ({PROTOCOL_VERSION})"
    elif not proven:
        reason = "wrong or missing shared secret (--secret-file or KVFERRY_SECRET)"
    else:
        _write(writer, Welcome(id=own_id, mac=_mac(proven[0], b"welcome", hello.nonce, nonce, own_id)))
        seals = _seals(proven[0], nonce, hello.nonce, connecting=False)
        return Channel(frames, writer, hello.id, max_frame_bytes, seals)
    _write(writer, Refused(reason=reason))
    await writer.drain()
    raise ProtocolError(f"{hello.id!r} refused: {reason}", kind="hello")


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
    num_pending = 0

    async def accept_hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Channel:
        nonlocal num_pending
        if num_pending >= MAX_PENDING_HELLOS:
            raise ProtocolError(f"{num_pending} connections have not said hello yet", kind="flood")
        num_pending += 1
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                return await _accept_hello(reader, writer, own_id, secret, max_frame_bytes)
        finally:
            num_pending -= 1

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
            on_refused(ProtocolError("hello timed out", kind="hello"))
        except (WorkerLost, OSError):
            pass  # whoever read the channel has acted on it
        except asyncio.CancelledError:
            pass  # the server is closing
        finally:
            writer.close()

    return await asyncio.start_server(accept, address.host, address.port, limit=_READ_BUFFER_BYTES)


def server_address(server: asyncio.Server, host: str) -> Address:
    """Return where a server that was started on port 0 listens."""
    return Address(host, server.sockets[0].getsockname()[1])


def max_frame_bytes(max_model_len: int) -> int:
    """The largest frame between router and worker: prompt and accepted tokens of every choice, 4 bytes each."""
    return max(DEFAULT_MAX_FRAME_BYTES, 4 * max_model_len * (1 + MAX_CHOICES) + _FRAME_SLACK_BYTES)
