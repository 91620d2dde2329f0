"""A name is listened at under the address that it has."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from kvferry.settings.sockets import open_listener
from kvferry.wire.address import Address

IPV4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
IPV6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))


@pytest.mark.parametrize(
    ("found", "host"), [([IPV6], "::1"), ([IPV6, IPV4], "127.0.0.1"), ([IPV4], "127.0.0.1")], ids=["6", "6 and 4", "4"]
)
def test_a_name_may_have_addresses_of_either_kind(monkeypatch: pytest.MonkeyPatch, found: list[Any], host: str) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)
    with open_listener(Address("a-pod", 0)) as listener:
        assert listener.getsockname()[0] == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0", "::"])
def test_it_can_be_connected_to(host: str) -> None:
    with open_listener(Address(host, 0)) as listener, socket.create_connection(listener.getsockname()[:2]):
        pass


def test_a_port_whose_connections_have_just_ended_is_listened_at_again() -> None:
    """A server that is started anew finds those that it had."""
    with open_listener(Address("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        with socket.create_connection((host, port)) as client:
            listener.accept()[0].close()  # ended here first: it lingers at this end
            assert client.recv(1) == b""
    open_listener(Address(host, port)).close()
