"""A client that asks a port of TLS by plain HTTP is told so, in the words of an API's error.

first byte that comes ─> 0x16, a TLS record: a handshake
                     └─> a capital letter, a method's first one: 400, which names https
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from ...common.errors import RequestError
from ..state.errors import failure_of
from .ways_out import last_answer

_UNREAD_BYTES = 2**16  # of the request, which are read so that its client reads the answer before the end
_UNREAD_S = 1.0


async def is_plain(sock: socket.socket) -> bool:
    """Wait for a connection's first byte, which stays unread, and tell whether it is of plain HTTP. Raises OSError."""
    loop, there = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sock, there.set)
    try:
        await there.wait()
    finally:
        loop.remove_reader(sock)
    return sock.recv(1, socket.MSG_PEEK).isupper()


def has_come(sock: socket.socket) -> bool:
    """Tell whether a connection has something to read, its end included."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


async def tell_to_use_tls(sock: socket.socket) -> None:
    """Answer, and wait a moment for the client's end. Raises OSError."""
    failure = failure_of(
        RequestError("this port speaks HTTPS, and was asked by plain HTTP: use https://", code="https_required")
    )
    loop = asyncio.get_running_loop()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_UNREAD_S):
            await loop.sock_sendall(sock, last_answer(failure))
            sock.shutdown(socket.SHUT_WR)
            num_bytes = 0
            while num_bytes < _UNREAD_BYTES and (data := await loop.sock_recv(sock, _UNREAD_BYTES)):
                num_bytes += len(data)
