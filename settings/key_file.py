"""A file of API keys: whose they are, a hash of each, until when they are good. The keys themselves are not in it.

    - id: alice                     # the tenant: what it may use, and whose prefixes it finds
      hash: blake2b:5f0c...         # of the key
      expires: 2027-01-31T00:00:00Z # optional; a date alone is midnight, UTC

A tenant may have several keys, so that one can be replaced by another without a moment in which neither is good.
`kvferry keys` writes such files; every process that uses one reads it again on a reload.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from ..common.config import Settings
from ..common.errors import ConfigError
from ..wire.credentials import read_private
from .locks import lock
from .yaml_values import construct

MAX_KEYS = 10_000
MAX_FILE_BYTES = 400 * MAX_KEYS  # twice what `kvferry keys add` writes of the longest id and expiry
_PREFIX = "kvf-"  # so that a key that leaked is recognised as one
_HASH = "blake2b:"
_DIGEST_BYTES = 32
_PERSON = b"kvferry-api-key"
_TURN_S, _LOOK_EVERY_S = 60.0, 0.01  # an edit of the largest file takes a second; longer hides one that stands still
_MAX_DEPTH = 8  # of lists and mappings in one another: a file of keys has two
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where PyYAML was built with it


def _moment(value: datetime | date | None) -> datetime | None:
    if isinstance(value, date) and not isinstance(value, datetime):
        return datetime.combine(value, time.min, UTC)
    return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


def _date(value: object) -> object:
    """Refuse numbers, in quotes too: they would be seconds since 1970, and nobody who writes 2027 means those."""
    if isinstance(value, str) and "-" not in value:
        raise PydanticCustomError("date", "must be a date such as 2027-01-31, or one with a time")
    return value


class KeyEntry(Settings):
    """One key of the file."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@+-]{0,63}$")
    hash: str = Field(pattern=rf"^{_HASH}[0-9a-f]{{{2 * _DIGEST_BYTES}}}$")
    expires: Annotated[datetime | date | None, BeforeValidator(_date), AfterValidator(_moment)] = None

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.hash.removeprefix(_HASH))

    @property
    def expires_s(self) -> float | None:
        """Return when the key expires, in seconds since 1970."""
        return self.expires.timestamp() if isinstance(self.expires, datetime) else None


def digest_of(key: bytes) -> bytes:
    """Hash a key as a file keeps it. Keys are drawn with 256 bits, so a quick hash cannot be searched."""
    return hashlib.blake2b(key, digest_size=_DIGEST_BYTES, person=_PERSON).digest()


def read_key_file(path: Path, setting: str) -> tuple[KeyEntry, ...]:
    """Read the entries of a file, each checked. Raises ConfigError that names the line."""
    return keys_of(key_file_text(path, setting), path, setting)


def key_file_text(path: Path, setting: str) -> bytes:
    """Return what is in the file. Raises ConfigError where it cannot be read, or where every user here can."""
    return read_private(path, setting, MAX_FILE_BYTES)


def keys_of(text: bytes, path: Path, setting: str) -> tuple[KeyEntry, ...]:
    """Return the entries of a file's text. Raises ConfigError that names the line."""
    known: dict[bytes, KeyEntry] = {}
    for entry, (first, _) in _entries(text, path, setting):
        if known.setdefault(entry.digest, entry) != entry:
            raise ConfigError(
                f"{setting}: {path}:{first + 1}: this key stands in the file already, with another id or expiry"
            )
    return tuple(known.values())


def add_key(path: Path, key_id: str, expires: datetime | None) -> str:
    """Draw a key and write its hash at the end of the file, made if need be. Returns the key, which is kept nowhere."""
    with _turn_at(path) as path:
        data = key_file_text(path, "file") if path.exists() else b""
        keys = [entry for entry, _ in _entries(data, path, "file")]
        if len(keys) >= MAX_KEYS:
            raise ConfigError(f"file: {path} holds {MAX_KEYS} keys already")
        key = _PREFIX + secrets.token_urlsafe(32)
        try:
            entry = KeyEntry(id=key_id, hash=_HASH + digest_of(key.encode()).hex(), expires=expires)
        except ValidationError:
            raise ConfigError(f"id: {key_id!r} is not 1 to 64 letters, digits and _ . @ + -") from None
        text = data.decode()
        if text and not text.endswith("\n"):
            text += "\n"
        expiry = f"  expires: {entry.expires.isoformat()}\n" if entry.expires is not None else ""
        text += f"- id: {entry.id}\n  hash: {entry.hash}\n{expiry}"
        if len(text.encode()) > MAX_FILE_BYTES:
            raise ConfigError(
                f"file: {path} would be larger than {MAX_FILE_BYTES} bytes with one more key: take keys or remarks out"
            )
        _write(path, text, [*keys, entry])
        return key


def revoke_keys(path: Path, key_id: str) -> int:
    """Take all keys of this id out of the file; how many there were. Other lines stay as they are."""
    with _turn_at(path) as path:
        data = key_file_text(path, "file")
        entries = _entries(data, path, "file")
        found = [lines for entry, lines in entries if entry.id == key_id]
        if found:
            kept = data.decode().splitlines(keepends=True)
            for first, end in reversed(found):
                while kept[end - 1].strip()[:1] in ("", "#"):  # a remark before the next key is that one's
                    end -= 1
                del kept[first:end]
            _write(path, "".join(kept), [entry for entry, _ in entries if entry.id != key_id])
        return len(found)


def _entries(text: bytes, path: Path, setting: str) -> list[tuple[KeyEntry, tuple[int, int]]]:
    """Return each entry with its lines: the first, and the one after the last."""
    try:
        root = _compose(text.decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"{setting}: {path}:{mark.line + 1 if mark else 1}: not YAML") from None
    if root is None:
        return []
    if not isinstance(root, yaml.SequenceNode):
        raise ConfigError(f"{setting}: {path}:1: a list of keys is needed, each with `id` and `hash`")
    if len(root.value) > MAX_KEYS:
        raise ConfigError(f"{setting}: {path} holds {len(root.value)} keys; at most {MAX_KEYS} are read")
    return [(_entry(node, f"{setting}: {path}:{node.start_mark.line + 1}"), _lines(node)) for node in root.value]


def _compose(text: str) -> yaml.Node | None:
    """Raises YAMLError. libyaml tells of deep texts step by step, and crashes where it is to compose them."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise yaml.YAMLError("too deep")
    root: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    return root


def _lines(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line, node.end_mark.line + (1 if node.end_mark.column else 0)


def _entry(node: yaml.Node, origin: str) -> KeyEntry:
    names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    if repeated := next((str(name) for name in names if names.count(name) > 1), ""):
        raise ConfigError(f"{origin}: an entry has {repeated} once")
    value = construct(node, origin)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{origin}: an entry is a mapping with `id` and `hash`")
    try:
        return KeyEntry.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        rule = first["msg"].replace("Input should be", "must be")
        raise ConfigError(f"{origin}: {'.'.join(map(str, first['loc']))}: {rule}") from None


@contextlib.contextmanager
def _turn_at(path: Path) -> Iterator[Path]:
    """Wait until nobody else edits it: who had read the same would undo the edit. Yields the file that a link names.

    Raises ConfigError where somebody keeps the lock, as any user may who can list the folder.
    """
    path = Path(os.path.realpath(path))
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # of a folder that is not there, as is told by who reads or writes the file
            folder = os.open(path.parent, os.O_RDONLY)
            stack.callback(os.close, folder)
            if not lock(folder, within_s=_TURN_S, look_every_s=_LOOK_EVERY_S):
                raise ConfigError(
                    f"file: {path} was not edited: another process has had {path.parent} locked for {_TURN_S:g} s "
                    f"(fuser -v {path.parent} names it)"
                )
        yield path


def _write(path: Path, text: str, keys: list[KeyEntry]) -> None:
    """Replace the file in one rename, for nobody else to read: readers see the old one or the new one.

    `keys`: what the text must say. It may not where lines were taken out of a file, or put to it, that was written by
    hand: with two keys in one line, or all of them indented.
    """
    try:
        found = [entry for entry, _ in _entries(text.encode(), path, "file")]
    except ConfigError:
        found = None
    if found != keys:
        raise ConfigError(f"file: {path} was not edited: each of its keys must begin a line of its own, with `- id:`")
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(new, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # it is not there, and on a disk that only can be read not even that is told
            new.unlink()
        raise ConfigError(f"file: cannot write {path}: {error.strerror}") from error
