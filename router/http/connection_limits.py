"""Connections are limited, in all and from one address, and an idle one goes for a newcomer.

    open ─> waits for a request ─> works on one ─> waits ... ─> close
               └─ may be closed for a newcomer      └─ may not: then the newcomer is refused

A connection that waits, or whose request's head is not whole, holds nothing but a socket, unless its client has not got
all of its last answer yet, or has sent what waits to be parsed. Where there is no room, the one that has waited longest
is closed: idle connections and those that trickle their heads keep nobody out.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from itertools import islice
from typing import Protocol

from ...settings.open_files import MAX_CONNECTIONS

MAX_CONNECTIONS_PER_ADDRESS = 1024
_MAX_ASKED = 16  # those that have waited longest, for a newcomer's place
_IPV6_SITE_BITS = 64  # one customer's network: its addresses cost nothing


class LimitedConnection(Protocol):
    """The books need this of a connection."""

    def evict(self) -> bool:
        """End at once, for another one. False: a request has come, or an answer is still on its way."""
        ...


class ConnectionObserver(Protocol):
    def on_slow_client(self, kind: str) -> None:
        """A client was cut for being slow. `kind`: head, body, idle, read; framing: for bytes that carry nothing;
        handshake: slow or none that we agree to.
        """
        ...

    def on_refused_connection(self, reason: str) -> None:
        """There was no room. `reason`: total, address; evicted: for a newcomer, after it had been let in."""
        ...


class NullConnectionObserver:
    """Counts nothing."""

    def on_slow_client(self, kind: str) -> None: ...

    def on_refused_connection(self, reason: str) -> None: ...


class Connections:
    """The books of one server. Belongs to its loop."""

    def __init__(
        self,
        max_total: int = MAX_CONNECTIONS,
        max_per_address: int = MAX_CONNECTIONS_PER_ADDRESS,
        observer: ConnectionObserver | None = None,
    ) -> None:
        self.max_total = max_total
        self.max_per_address = max_per_address
        self.observer: ConnectionObserver = observer or NullConnectionObserver()
        self._site_of: dict[LimitedConnection, str] = {}
        self._num_from: Counter[str] = Counter()
        self._waiting: OrderedDict[LimitedConnection, None] = OrderedDict()
        self._waiting_from: dict[str, OrderedDict[LimitedConnection, None]] = {}

    def __len__(self) -> int:
        return len(self._site_of)

    def open(
        self,
        connection: LimitedConnection,
        host: str,
        *,
        instead_of: LimitedConnection | None = None,
        is_final: bool = True,
    ) -> str:
        """Let it in, to wait, in place of another one. Else why not: "total" or "address"; counted if `is_final`."""
        if instead_of is not None:
            self.close(instead_of)
        site = _site(host)
        full = ""
        if self._num_from[site] >= self.max_per_address:
            full = "" if self._evict(self._waiting_from.get(site)) else "address"
        elif len(self._site_of) >= self.max_total:
            full = "" if self._evict(self._waiting) else "total"
        if full:
            if is_final:
                self.observer.on_refused_connection(full)
            return full
        self._site_of[connection] = site
        self._num_from[site] += 1
        self.wait(connection)
        return ""

    def wait(self, connection: LimitedConnection) -> None:
        """Note that it has no request from now on: a second time moves it to the end."""
        site = self._site_of.get(connection)
        if site is not None:
            for waiting in (self._waiting, self._waiting_from.setdefault(site, OrderedDict())):
                waiting[connection] = None
                waiting.move_to_end(connection)

    def work(self, connection: LimitedConnection) -> None:
        """Note that a request's head has come."""
        site = self._site_of.get(connection)
        if site is not None:
            self._waiting.pop(connection, None)
            if site in self._waiting_from:
                self._waiting_from[site].pop(connection, None)

    def close(self, connection: LimitedConnection) -> None:
        """Note that it has ended. Idempotent."""
        self.work(connection)
        site = self._site_of.pop(connection, None)
        if site is None:
            return
        self._num_from[site] -= 1
        if not self._num_from[site]:
            del self._num_from[site]
            self._waiting_from.pop(site, None)

    def _evict(self, waiting: OrderedDict[LimitedConnection, None] | None) -> bool:
        for oldest in list(islice(waiting or (), _MAX_ASKED)):
            if oldest.evict():
                self.close(oldest)
                self.observer.on_refused_connection("evicted")
                return True
            self.wait(oldest)
        return False


def _site(host: str) -> str:
    """Return whose address it is: the address, of IPv6 its network."""
    if ":" not in host:
        return host
    try:
        address = ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return host
    mapped = address.ipv4_mapped
    return str(mapped) if mapped is not None else str(ipaddress.IPv6Network((address, _IPV6_SITE_BITS), strict=False))
