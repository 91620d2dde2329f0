"""API keys: who a request comes from, and whether its key is good at this moment.

Keys come from the command line's environment (never told apart by name) and from a key file (settings/key_file.py),
which is read again on a reload: a key that is no longer in it is refused from then on, requests that it began may end.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...common.clock import wall_time_s
from ...common.errors import RequestError
from ...settings.key_file import KeyEntry, digest_of, key_file_text, keys_of


class _KnownKey(NamedTuple):
    tenant: bytes
    owner: str
    expires_s: float | None  # seconds since 1970


@dataclass(frozen=True, slots=True)
class KeyTable:
    """The keys that are good by one text of the file, by their salted hashes, and whose they are."""

    text: bytes  # a hash of it: a file that says the same is not gone through again
    known: Mapping[bytes, _KnownKey]
    owners: Mapping[bytes, str]
    tenants: Mapping[str, bytes]


class ApiKeys:
    """Finds the tenant of a key. Only hashes with a salt of this process are kept, so that the time of a look-up tells
    nothing about a key that is nearly right."""

    def __init__(
        self,
        keys: Iterable[str] = (),
        *,
        file: Path | None = None,
        setting: str = "api_key_file",
        secret: bytes = b"",
        now_s: Callable[[], float] = wall_time_s,
    ) -> None:
        """Read `file`, if there is one. With `secret`, tenants have the same names in every router that has it.

        Raises ConfigError for a file that cannot be used.
        """
        self._file = file
        self._setting = setting
        self._now_s = now_s
        self._salt = secrets.token_bytes(32)
        self._tenants_key = hashlib.blake2b(secret, digest_size=32, person=b"kvferry-tenants").digest()
        self._fixed = {
            self._salted(digest_of(key)): _KnownKey(self._tenant(key), _owner(digest_of(key)), None)
            for key in map(str.encode, keys)
        }
        self.are_needed = file is not None or bool(self._fixed)
        self._table = self._table_of(b"", ())
        self.take(self.read())

    def read(self) -> KeyTable:
        """Return what the file says now, which takes a while of many keys; on any thread. Raises ConfigError."""
        if self._file is None:
            return self._table
        text = key_file_text(self._file, self._setting)
        if (digest := hashlib.blake2b(text).digest()) == self._table.text:
            return self._table
        return self._table_of(digest, keys_of(text, self._file, self._setting))

    def take(self, table: KeyTable) -> None:
        """Let these keys of the file be good from now on, and no others of it."""
        self._table = table

    def _table_of(self, text: bytes, entries: Iterable[KeyEntry]) -> KeyTable:
        known = self._fixed | {self._salted(entry.digest): self._of_entry(entry) for entry in entries}
        owners = {each.tenant: each.owner for each in known.values()}
        return KeyTable(text, known, owners, {owner: tenant for tenant, owner in owners.items()})

    @property
    def num_good(self) -> int:
        """Keys that are accepted at this moment."""
        now = self._now_s()
        return sum(known.expires_s is None or now < known.expires_s for known in self._table.known.values())

    def check(self, authorization: bytes) -> bytes:
        """The tenant; empty where no keys are needed. Raises RequestError (401)."""
        if not self.are_needed:
            return b""
        scheme, _, key = authorization.partition(b" ")
        known = self._table.known.get(self._salted(digest_of(key.strip())))
        if known is None or scheme.lower() != b"bearer":
            raise RequestError("the API key is missing or wrong", code="invalid_api_key", status=401)
        if known.expires_s is not None and self._now_s() >= known.expires_s:
            raise RequestError("the API key has expired", code="expired_api_key", status=401)
        return known.tenant

    def owner_of(self, tenant: bytes) -> str:
        """Return the tenant's name on disk, which no restart changes; empty where no keys are needed."""
        return self._table.owners.get(tenant, tenant.hex())

    def tenant_of(self, owner: str) -> bytes:
        """Return the tenant with this name on disk. One whose keys are gone stays a tenant of its own."""
        return self._table.tenants.get(owner, owner.encode())

    def _of_entry(self, entry: KeyEntry) -> _KnownKey:
        name = entry.id.encode()
        return _KnownKey(self._tenant(name, b"kvferry-key-id"), _owner(name, b"kvferry-key-id"), entry.expires_s)

    def _salted(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, digest_size=32, key=self._salt).digest()

    def _tenant(self, name: bytes, kind: bytes = b"") -> bytes:
        return hashlib.blake2b(name, digest_size=16, key=self._tenants_key, person=kind).digest()


def sent_key(headers: Mapping[bytes, bytes]) -> bytes:
    """Return what authorizes a request: Anthropic's clients send a key in a header of its own."""
    authorization, key = headers.get(b"authorization", b""), headers.get(b"x-api-key", b"")
    return b"Bearer " + key if key and not authorization else authorization


def _owner(name: bytes, kind: bytes = b"") -> str:
    return hashlib.blake2b(name, digest_size=16, person=kind or b"kvferry-owner").hexdigest()
