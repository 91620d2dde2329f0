"""Sockets that listen for HTTP."""

from __future__ import annotations

import socket

from ..common.errors import ConfigError
from ..wire.address import Address

_BACKLOG = 2048

_SEND_BUFFER_BYTES = 128 * 2**10  # in the kernel for each connection: a client that does not read is noticed


def listen(address: Address, *, setting: str = "port") -> socket.socket:
    """Open a listening socket for HTTP; port 0 takes a free one. Raises ConfigError that names `setting`."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)  # accepted sockets inherit it
        sock.bind((address.host, address.port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        flag = "--" + setting.replace("_", "-")
        text = f"{setting}: cannot listen on {address}: {error.strerror or error}; set another {flag}"
        raise ConfigError(text) from error
    return sock
