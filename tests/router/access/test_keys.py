"""Keys of a file: good until they expire or are taken out, and each its tenant's."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import secrets
import signal
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kvferry.common.errors import ConfigError, RequestError
from kvferry.common.router_config import RouterConfig
from kvferry.router.access import keys as keys_module
from kvferry.router.access.credentials import RouterCredentials
from kvferry.router.access.keys import ApiKeys
from kvferry.router.access.reload import Event, reloading
from kvferry.settings.key_file import KeyEntry, add_key, keys_of, revoke_keys

NOW = datetime(2026, 11, 21, tzinfo=UTC)


class Wall:
    """A wall clock that is set by hand."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now.timestamp()


def code_of(keys: ApiKeys, key: str) -> str | None:
    """Why a key is refused; None: it is not."""
    try:
        keys.check(f"Bearer {key}".encode())
    except RequestError as error:
        assert error.status == 401
        return error.code
    return None


def test_a_key_is_good_until_it_expires(tmp_path: Path) -> None:
    path, wall = tmp_path / "keys", Wall()
    key = add_key(path, "alice", NOW + timedelta(days=1))
    keys = ApiKeys(file=path, now_s=wall)
    assert (code_of(keys, key), keys.num_good) == (None, 1)
    wall.now += timedelta(days=1)
    assert (code_of(keys, key), keys.num_good) == ("expired_api_key", 0)


def test_a_key_that_was_taken_out_is_refused_after_a_reload_and_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    alice, bob = add_key(path, "alice", None), add_key(path, "bob", None)
    keys = ApiKeys(["fixed"], file=path)
    tenant = keys.check(f"Bearer {bob}".encode())
    revoke_keys(path, "alice")
    assert code_of(keys, alice) is None  # not before it is told
    keys.take(keys.read())
    assert [code_of(keys, key) for key in (alice, bob, "fixed")] == ["invalid_api_key", None, None]
    assert keys.check(f"Bearer {bob}".encode()) == tenant


def test_of_two_who_edit_a_file_at_once_none_undoes_the_others_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link, draw = tmp_path / "keys", tmp_path / "link", secrets.token_urlsafe
    add_key(path, "alice", None)
    link.symlink_to(path)
    second = threading.Thread(target=revoke_keys, args=(path, "alice"))

    def draw_meanwhile(num_bytes: int) -> str:
        second.start()
        second.join(0.1)
        return draw(num_bytes)

    monkeypatch.setattr(secrets, "token_urlsafe", draw_meanwhile)
    bob = add_key(link, "bob", None)
    second.join()
    assert link.is_symlink() and [entry.id for entry in keys_of(path.read_bytes(), path, "file")] == ["bob"]
    assert code_of(ApiKeys(file=path), bob) is None


def test_who_keeps_others_from_editing_a_file_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    add_key(path, "alice", None)
    monkeypatch.setattr("kvferry.settings.key_file._TURN_S", 0.0)
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_SH)
    with pytest.raises(ConfigError, match=f"keys was not edited: another process has had {tmp_path} locked"):
        revoke_keys(path, "alice")
    os.close(folder)
    assert revoke_keys(path, "alice") == 1


def test_without_any_key_in_its_file_nobody_is_served(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    keys = ApiKeys(file=path)
    assert keys.are_needed
    with pytest.raises(RequestError):
        keys.check(b"")


def test_two_keys_of_one_id_are_one_tenant_in_every_router(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    old, new, other = add_key(path, "alice", None), add_key(path, "alice", None), add_key(path, "bob", None)

    def tenants(secret: bytes) -> list[bytes]:
        keys = ApiKeys(["alice"], file=path, secret=secret)
        return [keys.check(f"Bearer {key}".encode()) for key in (old, new, other, "alice")]

    first, second, bob, plain = tenants(b"secret")
    assert first == second
    assert len({first, bob, plain}) == 3  # a key that is spelled like an id is another tenant
    assert tenants(b"secret") == [first, second, bob, plain] != tenants(b"another")


def test_a_reload_that_fails_changes_nothing(tmp_path: Path) -> None:
    api, admin, secret = tmp_path / "api", tmp_path / "admin", tmp_path / "secret"
    key, operator = add_key(api, "alice", None), add_key(admin, "ops", None)
    secret.write_text("a secret of more than 16 bytes")
    secret.chmod(0o600)
    config = RouterConfig(
        model_dir=tmp_path, served_model_name="m", api_key_file=api, admin_key_file=admin, secret_file=secret
    )
    credentials = RouterCredentials.from_config(config, {})
    api.write_text("")
    admin.write_text("- broken")
    secret.write_text("another secret, more than 16 bytes")
    with pytest.raises(ConfigError, match="admin_key_file"):
        credentials.reload()
    assert code_of(credentials.clients, key) is code_of(credentials.operators, operator) is None
    assert credentials.secret.said.startswith(b"a secret")
    admin.write_text("")
    credentials.reload()
    assert code_of(credentials.clients, key) == code_of(credentials.operators, operator) == "invalid_api_key"
    assert credentials.secret.said.startswith(b"another")


async def test_what_changed_while_a_router_started_holds_when_it_is_up(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key = add_key(path, "alice", None)
    config = RouterConfig(model_dir=tmp_path, served_model_name="m", api_key_file=path)
    credentials = RouterCredentials.from_config(config, {})
    revoke_keys(path, "alice")  # and SIGHUP, of which nobody took notice yet
    with reloading(credentials, None, lambda event: None):
        assert code_of(credentials.clients, key) == "invalid_api_key"


class Launcher:
    """The launcher's end of a lifeline, in this process. Implements `ReloadLauncher`."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[tuple[object, object]] = asyncio.Queue()  # number and error
        self.ask: Callable[[int], None] = lambda number: None

    def send(self, event: Mapping[str, object]) -> None:
        assert event["event"] == "reloaded"
        self.answers.put_nowait((event.get("number"), event["error"]))

    def listen(self, on_event: Callable[[Event], None]) -> None:
        self.ask = lambda number: on_event({"event": "reload", "number": number})


class Gate:
    """Stands before the reading of key files: each waits, on its own thread, until it is let through."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun, self.let_through = threading.Semaphore(0), threading.Semaphore(0)
        self.num_read = 0
        patch.setattr(keys_module, "keys_of", self._keys_of)

    def _keys_of(self, text: bytes, path: Path, setting: str) -> tuple[KeyEntry, ...]:
        self.num_read += 1
        self.begun.release()
        assert self.let_through.acquire(timeout=60)
        return keys_of(text, path, setting)


def _credentials(path: Path) -> RouterCredentials:
    return RouterCredentials.from_config(
        RouterConfig(model_dir=path.parent, served_model_name="m", api_key_file=path), {}
    )


async def test_requests_are_checked_while_a_large_file_is_read_and_reloads_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    alice = add_key(path, "alice", None)
    credentials, launcher = _credentials(path), Launcher()
    with reloading(credentials, launcher, lambda event: None):
        gate = Gate(monkeypatch)
        bob = add_key(path, "bob", None)
        launcher.ask(1)
        assert await asyncio.to_thread(gate.begun.acquire, timeout=60)  # the loop goes on: this line is run
        assert [code_of(credentials.clients, key) for key in (alice, bob)] == [None, "invalid_api_key"]
        revoke_keys(path, "bob")  # while the file with bob is being read
        launcher.ask(2)
        carol = add_key(path, "carol", None)
        assert gate.num_read == 1 and launcher.answers.empty()
        gate.let_through.release()
        assert await launcher.answers.get() == (1, "")
        assert code_of(credentials.clients, bob) is None
        gate.let_through.release()
        assert await launcher.answers.get() == (2, "")
        assert [code_of(credentials.clients, key) for key in (alice, bob, carol)] == [None, "invalid_api_key", None]


async def test_a_reload_that_the_launcher_did_not_ask_for_answers_none_of_its_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key is revoked while SIGHUP's reload reads the file that still has it."""
    path = tmp_path / "keys"
    add_key(path, "alice", None)
    credentials, launcher = _credentials(path), Launcher()
    with reloading(credentials, launcher, lambda event: None):
        gate = Gate(monkeypatch)
        bob = add_key(path, "bob", None)
        os.kill(os.getpid(), signal.SIGHUP)
        assert await asyncio.to_thread(gate.begun.acquire, timeout=60)
        revoke_keys(path, "bob")
        launcher.ask(7)
        gate.let_through.release(2)
        assert await launcher.answers.get() == (7, "")
        assert gate.num_read == 2 and code_of(credentials.clients, bob) == "invalid_api_key"


async def test_what_is_read_when_a_router_ends_changes_nothing_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    add_key(path, "alice", None)
    credentials, launcher = _credentials(path), Launcher()
    with reloading(credentials, launcher, lambda event: None):
        gate = Gate(monkeypatch)
        bob = add_key(path, "bob", None)
        launcher.ask(1)
        assert await asyncio.to_thread(gate.begun.acquire, timeout=60)
    launcher.ask(1)  # the lifeline's thread may still hear one
    gate.let_through.release(2)
    for _ in range(10):
        await asyncio.sleep(0.005)
    assert gate.num_read == 1 and launcher.answers.empty()
    assert code_of(credentials.clients, bob) == "invalid_api_key"


def test_a_file_that_says_the_same_is_not_gone_through_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    alice = add_key(path, "alice", None)
    credentials = _credentials(path)
    gate = Gate(monkeypatch)
    gate.let_through.release(2)
    credentials.reload()
    os.utime(path)
    credentials.reload()
    assert gate.num_read == 0 and code_of(credentials.clients, alice) is None
    text = path.read_text()
    path.write_text(text.replace("id: alice", "id: alicf"))  # in place, of the same length
    credentials.reload()
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="every user may read"):
        credentials.reload()
    assert gate.num_read == 1


def test_a_key_file_on_a_disk_that_can_only_be_read_is_a_mistake_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "unlink", refuse)  # for a file that is not there, too
    with pytest.raises(ConfigError, match=r"cannot write .*keys: Read-only file system"):
        add_key(tmp_path / "keys", "alice", None)
