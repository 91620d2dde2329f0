"""A connection's socket, past its transport: what the kernel holds of it. One that has ended holds nothing."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import socket
import termios


def num_unread(transport: asyncio.Transport) -> int:
    """Return how many bytes have come that nobody has read."""
    return _num_bytes(transport, termios.FIONREAD)


def num_unsent(transport: asyncio.Transport) -> int:
    """Return how many bytes the other machine has not got."""
    return _num_bytes(transport, termios.TIOCOUTQ)


def end_reading(transport: asyncio.Transport) -> None:
    """Let a transport see the other one's end, though it has not come: it goes on as if it had."""
    if (number := _number(transport)) >= 0:
        own = socket.socket(fileno=number)  # no file of its own: there may be no more
        with contextlib.suppress(OSError):
            own.shutdown(socket.SHUT_RD)
        own.detach()


def _num_bytes(transport: asyncio.Transport, queue: int) -> int:
    count = array.array("i", [0])
    if (number := _number(transport)) >= 0:
        fcntl.ioctl(number, queue, count)
    return count[0]


def _number(transport: asyncio.Transport) -> int:
    """Return the socket's number, -1 of none: a TLS transport may have lost it before its protocol hears of that."""
    sock = transport.get_extra_info("socket")
    return -1 if sock is None else int(sock.fileno())
