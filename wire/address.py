"""An address of a TCP socket, as it is written in settings and told in messages."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from ..common.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class Address:
    """host:port of a TCP socket."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        host, _, port = text.rpartition(":")
        if not host or not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
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
