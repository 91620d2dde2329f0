"""Both sides of a connection prove that they know the shared secret, and agree on the keys of its seals.

    accepting side                 connecting side
    Challenge(nonce)        ->
                            <-     Hello(id, nonce, mac)
    Welcome(id, mac)        ->                              or Refused(reason), and the connection ends

The connecting side says one secret, the accepting side believes any that it has: so a secret can be changed while all
runs (credentials.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from dataclasses import dataclass

from ..common.errors import ProtocolError
from .codec import Decoder, encode
from .credentials import SharedSecret
from .fields import Message
from .frames import FrameReader, size_prefix
from .hello import PROTOCOL_VERSION, Challenge, Hello, Refused, Welcome
from .seals import SealPair, Seals

HELLO_MAX_BYTES = 4096

_hello_decoder: Decoder[Challenge | Hello | Welcome | Refused] = Decoder(Challenge | Hello | Welcome | Refused)


@dataclass(frozen=True, slots=True)
class ProvenPeer:
    """A peer that has said who it is and proved that it may."""

    peer_id: str
    seals: SealPair | None  # None: there is no secret


async def prove_to_server(frames: FrameReader, writer: asyncio.StreamWriter, own_id: str, secret: bytes) -> ProvenPeer:
    """Do the connecting side's part. Raises ProtocolError where one side does not believe the other."""
    peer = frames.peer
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
    return ProvenPeer(answer.id, _seals(secret, challenge.nonce, nonce, connecting=True))


async def prove_to_client(
    frames: FrameReader, writer: asyncio.StreamWriter, own_id: str, secret: SharedSecret
) -> ProvenPeer:
    """Do the accepting side's part. Raises ProtocolError for a peer that is refused, after it was told why."""
    nonce = secrets.token_bytes(16)
    _write(writer, Challenge(protocol=PROTOCOL_VERSION, nonce=nonce))
    hello = _hello_decoder.decode(await frames.next(HELLO_MAX_BYTES))
    if not isinstance(hello, Hello):
        raise ProtocolError(f"{frames.peer} did not answer the challenge")
    proven = [
        value
        for value in secret.accepted
        if hmac.compare_digest(hello.mac, _mac(value, b"hello", nonce, hello.nonce, hello.id))
    ]
    kind = "hello"
    if hello.protocol != PROTOCOL_VERSION:
        reason = f"protocol {hello.protocol} is not ours ({PROTOCOL_VERSION})"
    elif not proven:
        kind, reason = "secret", "wrong or missing shared secret (--secret-file or KVFERRY_SECRET)"
    else:
        _write(writer, Welcome(id=own_id, mac=_mac(proven[0], b"welcome", hello.nonce, nonce, own_id)))
        return ProvenPeer(hello.id, _seals(proven[0], nonce, hello.nonce, connecting=False))
    _write(writer, Refused(reason=reason))
    await writer.drain()
    raise ProtocolError(f"{hello.id!r} refused: {reason}", kind=kind)


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
    writer.write(size_prefix(len(frame)) + frame)
