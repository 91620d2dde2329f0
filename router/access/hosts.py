"""A server goes by known names: a web page may have a name of its own point at this machine (DNS rebinding), and its
requests then carry that name.

Only a server without keys needs to look: a page knows no key.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from ...common.errors import RequestError
from ..state.errors import clip


class HostNames:
    """An address literal and localhost are always right: nobody else can have them."""

    def __init__(self, names: Iterable[str]) -> None:
        """`names`: others, without a port."""
        self._names = frozenset(name.lower().rstrip(".") for name in names)

    def check(self, host: bytes) -> None:
        """A request's Host. Raises RequestError (403) where it is somebody else's name."""
        name = _without_port(host.decode("latin-1"))
        if not _is_ours(name) and name.lower().rstrip(".") not in self._names:
            raise RequestError(
                f"this server has no API key and does not go by the name {clip(name)}: use its address, or start it "
                "with --allowed-hosts or an API key",
                code="host_not_allowed",
                status=403,
            )


def is_of_this_machine(host: bytes) -> bool:
    """A Host that is an address or localhost."""
    return _is_ours(_without_port(host.decode("latin-1")))


def _is_ours(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.lower() == "localhost"
    return True


def _without_port(host: str) -> str:
    """Return the host of `name:port`, `[::1]:port` and either without a port."""
    if host.startswith("["):
        address, bracket, _ = host[1:].partition("]")
        return address if bracket else host
    return host.partition(":")[0]
