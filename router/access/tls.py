"""A router's listeners speak TLS where it has a certificate, which is read again on a reload.

Connections that are open keep what they were made with; those that begin after a reload get what was read then.
"""

from __future__ import annotations

import ssl

from ...common.router_config import RouterConfig
from ...settings.tls import read_tls


class ServerTls:
    """Holds what the next connection is made with."""

    def __init__(self, config: RouterConfig) -> None:
        """Read the files, if there are some. Raises ConfigError."""
        self._config = config
        self.context = self.read()

    def read(self) -> ssl.SSLContext | None:
        """Return what the files say now. Raises ConfigError."""
        return read_tls(self._config)

    def take(self, context: ssl.SSLContext | None) -> None:
        self.context = context
