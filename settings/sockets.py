"""Sockets that listen, and whether they can."""

from __future__ import annotations

import errno
import socket

from ..common.errors import ConfigError
from ..wire.address import Address

_BACKLOG = 2048

_SEND_BUFFER_BYTES = 128 * 2**10  # in the kernel for each connection: a client that does not read is noticed


def open_listener(address: Address) -> socket.socket:
    """Open a listening socket; port 0 takes a free one. Of a name's addresses it is the first of IPv4, if it has one.

    Raises OSError.
    """
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    family, _, _, _, place = min(found, key=lambda each: each[0] != socket.AF_INET)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)  # accepted sockets inherit it
        sock.bind(place)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def listen(address: Address, *, setting: str = "port", flag: str | None = None) -> socket.socket:
    """Open a listening socket. Raises ConfigError that names what cannot be: `setting`, a port, or the host of it."""
    try:
        return open_listener(address)
    except OSError as error:
        flag = flag or "--" + setting.replace("_", "-")
        hint = f"; set another {flag}, port 0 takes any free one" if error.errno == errno.EADDRINUSE else ""
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            setting = setting.replace("port", "host")
        raise ConfigError(f"{setting}: cannot listen on {address}: {error.strerror or error}{hint}") from error
