"""Clients, operators, workers and the router prove who they are: by what is read at start, and again at each reload."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ...common.router_config import RouterConfig
from ...wire.credentials import SharedSecret, read_secrets
from .keys import ApiKeys, KeyTable
from .tls import ServerTls


@dataclass(frozen=True, slots=True)
class _Read:
    """`_Read` is what all files said at one moment."""

    clients: KeyTable
    operators: KeyTable
    secrets: tuple[bytes, ...]  # empty: there is no file of them
    tls: ssl.SSLContext | None


@dataclass(frozen=True, slots=True)
class RouterCredentials:
    """The keys of the API, those of the admin listener, the secret that workers share, and the router's certificate."""

    clients: ApiKeys
    operators: ApiKeys
    secret: SharedSecret
    tls: ServerTls
    secret_file: Path | None = None

    @classmethod
    def from_config(cls, config: RouterConfig, env: Mapping[str, str]) -> Self:
        """Read all files. Raises ConfigError."""
        secret = SharedSecret(*read_secrets(config.secret_file, env))
        return cls(
            ApiKeys(config.api_key, file=config.api_key_file, secret=secret.said),
            ApiKeys(config.admin_key, file=config.admin_key_file, setting="admin_key_file"),
            secret,
            ServerTls(config),
            config.secret_file,
        )

    def reload(self) -> None:
        """Read all files again. Raises ConfigError, and then nothing has changed."""
        self.take(self.read())

    def read(self) -> _Read:
        """Return what all files say now; on any thread, one at a time. Raises ConfigError."""
        secrets = read_secrets(self.secret_file, {}) if self.secret_file is not None else ()
        return _Read(self.clients.read(), self.operators.read(), secrets, self.tls.read())

    def take(self, found: _Read) -> None:
        """Let it hold from now on; on the event loop, where it is used."""
        if found.secrets:
            self.secret.replace(found.secrets)
        self.clients.take(found.clients)
        self.operators.take(found.operators)
        self.tls.take(found.tls)
