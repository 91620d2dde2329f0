"""The shared secret of a deployment, and how it is changed while everything runs.

    secret file: one line, or two while it is being changed: the first is said, both are believed
    add the new one as the second line everywhere ─> swap the lines everywhere ─> take the old one out everywhere

Each step is a reload (`kvferry reload`, SIGHUP) of every process; no session ends, because a session's own keys are
made from the secret that it began with.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from ..common.config import SECRET_VARIABLE
from ..common.errors import ConfigError

MIN_SECRET_BYTES = 16
_MAX_SECRETS = 2
_MAX_FILE_BYTES = 1 << 20


class SharedSecret:
    """A secret that router and workers prove to each other to know. Its value may be replaced at any time.

    Read on the network thread alone.
    """

    __slots__ = ("_values",)

    def __init__(self, *values: bytes) -> None:
        """`values`: the one that is said, then the others that are believed. None: there is no secret."""
        self._values = values

    def __bool__(self) -> bool:
        return bool(self._values)

    def __repr__(self) -> str:
        return f"SharedSecret({len(self._values)} values)"

    @property
    def said(self) -> bytes:
        """Return the value that this process proves to know; empty where there is none."""
        return self._values[0] if self._values else b""

    @property
    def accepted(self) -> tuple[bytes, ...]:
        """Return the values of which a peer may prove that it knows one."""
        return self._values or (b"",)

    def replace(self, values: tuple[bytes, ...]) -> None:
        """Take other values from now on; sessions that have begun go on with what they began with."""
        assert values, "a secret is changed, never dropped"
        self._values = values


NO_SECRET = SharedSecret()


def read_secrets(secret_file: Path | None, env: Mapping[str, str]) -> tuple[bytes, ...]:
    """Read the file's secrets, else the environment variable's; empty where neither is set. Raises ConfigError."""
    if secret_file is not None:
        return _parse_secrets(read_private(secret_file, "secret_file"), f"secret_file: {secret_file}")
    text = env.get(SECRET_VARIABLE, "")
    return _parse_secrets(text.encode(), SECRET_VARIABLE) if text else ()


def _parse_secrets(text: bytes, origin: str) -> tuple[bytes, ...]:
    values = tuple(line.strip() for line in text.split(b"\n") if line.strip())
    if not 1 <= len(values) <= _MAX_SECRETS:
        raise ConfigError(f"{origin} holds {len(values)} secrets; it has one on its first line, or a second below it")
    for value in values:
        if len(value) < MIN_SECRET_BYTES:
            raise ConfigError(f"{origin} holds a secret of {len(value)} bytes; one has at least {MIN_SECRET_BYTES}")
    return values


def read_private(path: Path, setting: str, max_bytes: int = _MAX_FILE_BYTES) -> bytes:
    """Read a file of credentials. Raises ConfigError where it cannot be read, or where every user here can."""
    try:
        with open_regular(path, setting) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & (stat.S_IROTH | stat.S_IWOTH):
                raise ConfigError(f"{setting}: every user may read or write {path} (mode {mode:04o}): chmod 600 {path}")
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{setting}: cannot read {path}: {error.strerror}") from error
    if len(data) > max_bytes:
        raise ConfigError(f"{setting}: {path} is larger than {max_bytes} bytes")
    return data


def open_regular(path: Path, setting: str) -> BinaryIO:
    """Open a file whose end comes by itself. Raises ConfigError at once where it is a pipe or a device; OSError."""
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 - the caller closes it
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise ConfigError(f"{setting}: {path} is no regular file")


def _open_at_once(path: str, flags: int) -> int:
    """Open a pipe, too, without waiting until somebody writes into it."""
    return os.open(path, flags | os.O_NONBLOCK)
