"""Secrets and key files: what is accepted, what is refused, and how each is replaced without a moment of neither."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.config import SECRET_VARIABLE
from kvferry.common.errors import ConfigError, ProtocolError
from kvferry.settings import key_file
from kvferry.settings.key_file import MAX_FILE_BYTES, MAX_KEYS, add_key, digest_of, read_key_file, revoke_keys
from kvferry.wire.address import Address
from kvferry.wire.channel import Channel, connect, serve, server_address
from kvferry.wire.credentials import SharedSecret, read_secrets

OLD, NEW = b"the old one, long enough", b"the new one, long enough"


def write_secret(path: Path, *lines: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(b"\n".join([*lines, b""]))
    path.chmod(mode)
    return path


# --- secrets --------------------------------------------------------------------------------------------------------


def test_a_secret_file_holds_one_secret_or_two(tmp_path: Path) -> None:
    assert read_secrets(write_secret(tmp_path / "s", OLD), {}) == (OLD,)
    assert read_secrets(write_secret(tmp_path / "s", NEW, OLD), {}) == (NEW, OLD)
    assert read_secrets(None, {SECRET_VARIABLE: OLD.decode()}) == (OLD,)
    assert read_secrets(None, {}) == ()
    with pytest.raises(ConfigError, match=r"secret_file: .* holds 3 secrets"):
        read_secrets(write_secret(tmp_path / "s", NEW, OLD, OLD), {})
    with pytest.raises(ConfigError, match="holds 0 secrets"):
        read_secrets(write_secret(tmp_path / "s"), {})


@pytest.mark.parametrize("secret", [b"x", b"fifteen bytes!!"])
def test_a_short_secret_is_refused_wherever_it_comes_from(tmp_path: Path, secret: bytes) -> None:
    with pytest.raises(ConfigError, match=r"secret_file: .* at least 16"):
        read_secrets(write_secret(tmp_path / "s", secret), {})
    with pytest.raises(ConfigError, match=r"KVFERRY_SECRET .* at least 16"):
        read_secrets(None, {SECRET_VARIABLE: secret.decode()})


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o666])
def test_a_file_that_every_user_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod 600"):
        read_secrets(write_secret(tmp_path / "s", OLD, mode=mode), {})
    assert read_secrets(write_secret(tmp_path / "s", OLD, mode=0o640), {}) == (OLD,)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^secret_file: cannot read .*: No such file"):
        read_secrets(tmp_path / "none", {})


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe", "a folder"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path, int], None]) -> None:
    """Nobody writes into the pipe, but after a while: who waited for that would be held up."""
    path = tmp_path / "s"
    make(path, 0o600)
    late = threading.Timer(5.0, lambda: os.close(os.open(path, os.O_RDWR)))
    late.start()
    with pytest.raises(ConfigError, match=rf"secret_file: .*{path}.*(is no regular file|Is a directory)"):
        read_secrets(path, {})
    assert late.is_alive()
    late.cancel()


async def _echo(channel: Channel) -> None:
    await channel.recv()


async def _can_connect(client: SharedSecret, server: SharedSecret) -> bool:
    async with await serve(Address("127.0.0.1", 0), "server", _echo, secret=server) as listening:
        try:
            await (await connect(server_address(listening, "127.0.0.1"), "client", secret=client)).close()
        except ProtocolError:
            return False
        return True


async def test_in_no_step_of_a_rotation_is_anybody_refused() -> None:
    """Add everywhere, swap everywhere, remove everywhere; within a step each process may have done it or not."""
    steps = [(OLD,), (OLD, NEW), (NEW, OLD), (NEW,)]
    for before, after in itertools.pairwise(steps):
        for client in (before, after):
            for server in (before, after):
                assert await _can_connect(SharedSecret(*client), SharedSecret(*server)), (client, server)
    assert not await _can_connect(SharedSecret(OLD), SharedSecret(NEW))
    assert not await _can_connect(SharedSecret(), SharedSecret(NEW, OLD))
    assert not await _can_connect(SharedSecret(NEW), SharedSecret())


async def test_a_session_outlives_the_secret_that_it_began_with() -> None:
    secret = SharedSecret(OLD)
    heard: list[bytes] = []

    async def hear(channel: Channel) -> None:
        for _ in range(2):
            heard.append(await channel.recv())

    from kvferry.wire.workers import Drain

    async with await serve(Address("127.0.0.1", 0), "server", hear, secret=secret) as listening:
        channel = await connect(server_address(listening, "127.0.0.1"), "client", secret=SharedSecret(OLD))
        channel.send(Drain(deadline_s=1))
        channel.flush()
        while not heard:
            await _turn()
        secret.replace((NEW,))
        channel.send(Drain(deadline_s=2))
        channel.flush()
        while len(heard) < 2:
            await _turn()
        await channel.close()


async def _turn() -> None:
    import asyncio

    await asyncio.sleep(0.001)


# --- key files ------------------------------------------------------------------------------------------------------


def test_a_key_file_knows_hashes_only(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    key = add_key(path, "alice", datetime(2027, 1, 31, tzinfo=UTC))
    other = add_key(path, "alice", None)
    [first, second] = read_key_file(path, "api_key_file")
    assert (first.id, first.digest, first.expires_s) == ("alice", digest_of(key.encode()), 1801353600.0)
    assert (second.digest, second.expires_s) == (digest_of(other.encode()), None)
    assert key not in path.read_text() and other not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_revoking_leaves_all_other_lines_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.touch(mode=0o600)
    for name in ("alice", "bob", "alice", "carol"):
        add_key(path, name, None)
    path.write_text("# who may ask\n" + path.read_text().replace("- id: bob", "- id: bob   # of sales"))
    assert revoke_keys(path, "alice") == 2
    assert [entry.id for entry in read_key_file(path, "file")] == ["bob", "carol"]
    assert path.read_text().startswith("# who may ask\n- id: bob   # of sales\n")
    assert revoke_keys(path, "alice") == 0
    assert revoke_keys(path, "bob") == revoke_keys(path, "carol") == 1
    assert read_key_file(path, "file") == ()


def test_a_key_may_be_added_behind_a_line_without_an_end_and_that_line_revoked(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.touch(mode=0o600)
    path.write_text(text := f"- id: alice\n  hash: {HASH}")
    add_key(path, "bob", None)
    assert [entry.id for entry in read_key_file(path, "file")] == ["alice", "bob"]
    path.write_text(text)
    assert revoke_keys(path, "alice") == 1
    assert path.read_text() == ""


def test_who_may_read_a_file_of_keys_may_read_it_after_an_edit(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.touch(mode=0o600)
    path.chmod(0o640)
    add_key(path, "alice", None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("when", ["2027-01-31", "'2027-01-31'", "2027-01-31 00:00:00", "2027-01-31T01:00:00+01:00"])
def test_a_date_without_a_zone_is_meant_in_utc(tmp_path: Path, when: str) -> None:
    path = tmp_path / "keys.yaml"
    path.touch(mode=0o600)
    path.write_text(f"- id: alice\n  hash: {HASH}\n  expires: {when}\n")
    assert [entry.expires for entry in read_key_file(path, "file")] == [datetime(2027, 1, 31, tzinfo=UTC)]


def test_an_edit_that_fails_leaves_nothing_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.yaml"
    add_key(path, "alice", None)
    before = path.read_bytes()

    def refuse(*_paths: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ConfigError, match=r"cannot write .*keys\.yaml: Input/output error"):
        add_key(path, "bob", None)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_revoking_leaves_the_remark_before_the_next_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.touch(mode=0o600)
    alice, bob = (f"- id: {name}\n  hash: {HASH}\n" for name in ("alice", "bob"))
    path.write_text(f"{alice}\n# of sales, until March\n{bob}# the end\n")
    assert revoke_keys(path, "alice") == 1
    assert path.read_text() == f"\n# of sales, until March\n{bob}# the end\n"
    assert revoke_keys(path, "bob") == 1
    assert path.read_text() == "\n# of sales, until March\n# the end\n"


def test_a_key_that_stands_in_one_line_is_revoked_with_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.touch(mode=0o600)
    alice, bob = (f"- {{id: {name}, hash: '{HASH}'}}\n" for name in ("alice", "bob"))
    path.write_text(alice + bob)
    assert revoke_keys(path, "alice") == 1
    assert path.read_text() == bob


def test_keys_that_share_a_line_are_not_revoked_together(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.touch(mode=0o600)
    path.write_text(text := f"[{{id: alice, hash: '{HASH}'}}, {{id: bob, hash: '{HASH}'}}]\n")
    with pytest.raises(ConfigError, match=r"keys\.yaml was not edited: each of its keys must begin a line"):
        revoke_keys(path, "alice")
    assert path.read_text() == text


@pytest.mark.parametrize(
    "text",
    [
        "[{{id: alice, hash: '{0}'}},\n {{id: bob, hash: '{1}'}}]\n",
        "  - id: alice\n    hash: {0}\n  - id: bob\n    hash: {1}\n",
        "- id: alice\n  hash: {0}\n- id: bob\n  hash: {1}\n...\n",
        "- id: alice\n  hash: &one {0}\n- id: bob\n  hash: {1}\n- id: alice\n  hash: *one\n",
    ],
)
def test_a_file_is_as_good_after_an_edit_as_before_it(tmp_path: Path, text: str) -> None:
    """Whoever wrote it by hand may have written it in another way than line by line."""
    path = tmp_path / "keys.yaml"
    path.touch(mode=0o600)
    edits: dict[str, Callable[[], object]] = {
        "alice bob carol": lambda: add_key(path, "carol", None),
        "bob": lambda: revoke_keys(path, "alice"),
    }
    for left, edit in edits.items():
        path.write_text(before := text.format(HASH, HASH.replace("0", "1")))
        try:
            edit()
        except ConfigError as error:
            assert "keys.yaml was not edited" in str(error)
            assert path.read_text() == before
        else:
            assert " ".join(entry.id for entry in read_key_file(path, "file")) == left


@pytest.mark.slow
@given(st.lists(st.sampled_from("abc"), max_size=8), st.sampled_from("abc"))
def test_what_is_left_after_revoking_is_what_was_there(names: list[str], gone: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.yaml"
        keys = [(name, add_key(path, name, None)) for name in names]
        revoked = revoke_keys(path, gone) if names else 0
        assert revoked == names.count(gone)
        kept = [(entry.id, entry.digest) for entry in read_key_file(path, "file")] if names else []
        assert kept == [(name, digest_of(key.encode())) for name, key in keys if name != gone]


HASH = "blake2b:" + "0" * 64
NO_DATES = ("2027", "20271231", "'2027'", "12:30", "1830211200.5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alice: x", r":1: a list of keys is needed"),
        ("- alice", r":1: an entry is a mapping"),
        (f"- id: !!bool maybe\n  hash: {HASH}", r":1: the tag !!bool does not permit this value"),
        (f"- id: a\n  hash: {HASH}\n- id: !!int ''", r":3: the tag !!int does not permit this value"),
        (f"- id: a\n  hash: {HASH}\n- id: 'b c'\n  hash: {HASH}", r":3: id: String should match"),
        ("- id: a\n  hash: sesame", r":1: hash: String should match"),
        (f"- id: a\n  hash: {HASH[:-2]}", r":1: hash: String should match"),
        (f"- id: {65 * 'a'}\n  hash: {HASH}", r":1: id: String should match"),
        (f"- id: a\n  hash: {HASH}\n  expires: soon", r":1: expires"),
        (f"- id: a\n  hash: {HASH}\n  expires: 2027-13-31", r":1: month must be in"),
        *((f"- id: a\n  hash: {HASH}\n  expires: {when}", r":1: expires: must be a date") for when in NO_DATES),
        (f"- id: a\n  hash: {HASH}\n- id: b\n  hash: {HASH}", r":3: this key stands in the file already"),
        (f"- id: a\n  hash: {HASH}\n- id: a\n  hash: {HASH}\n  expires: 2027-01-31", r":3: this key stands"),
        (f"- id: a\n  id: b\n  hash: {HASH}", r":1: an entry has id once"),
        (f"- id: a\n  hash: {HASH}\n  role: king", r":1: role: Extra inputs"),
        ("- [", "not YAML"),
        ("- id: J\xe9r\xf4me", "not YAML"),
        ("- !!python/object/apply:os.system ['true']", r":1: "),
    ],
)
def test_a_mistake_in_a_key_file_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text, encoding="latin-1")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=rf"^api_key_file: {path}.*{message}"):
        read_key_file(path, "api_key_file")


def test_a_key_that_stands_twice_is_one_and_may_be_revoked_where_another_has_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    entry = f"- id: a\n  hash: {HASH}\n"
    path.write_text(2 * entry)
    path.chmod(0o600)
    assert [each.id for each in read_key_file(path, "file")] == ["a"]
    path.write_text(entry + entry.replace("id: a", "id: b"))
    assert revoke_keys(path, "b") == 1
    assert path.read_text() == entry


def test_an_id_that_no_file_could_hold_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="id: 'a b'"):
        add_key(tmp_path / "keys.yaml", "a b", None)
    assert not (tmp_path / "keys.yaml").exists()


def test_as_many_keys_as_a_file_may_hold_can_be_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that may hold fewer, as many bytes for each."""
    num_keys = 100
    monkeypatch.setattr(key_file, "MAX_KEYS", num_keys)
    monkeypatch.setattr(key_file, "MAX_FILE_BYTES", MAX_FILE_BYTES * num_keys // MAX_KEYS)
    path, until = tmp_path / "keys.yaml", datetime(2027, 1, 31, 12, 30, 15, 123456, tzinfo=UTC)
    entry = f"- id: {'a' * 64}\n  hash: blake2b:%064x\n  expires: {until.isoformat()}\n"
    path.write_text("".join(entry % number for number in range(num_keys - 1)))
    path.chmod(0o600)
    add_key(path, "a" * 64, until)
    assert len(read_key_file(path, "file")) == num_keys
    with pytest.raises(ConfigError, match=f"holds {num_keys} keys already"):
        add_key(path, "one-more", None)
    path.write_text(f"{path.read_text()}{entry % num_keys}")
    monkeypatch.setattr(key_file, "MAX_FILE_BYTES", MAX_FILE_BYTES)
    with pytest.raises(ConfigError, match=f"holds {num_keys + 1} keys; at most {num_keys} are read"):
        read_key_file(path, "file")


def test_a_key_that_would_make_its_file_too_large_to_read_is_not_added(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    add_key(path, "alice", None)
    path.write_text(text := path.read_text() + "#" * (MAX_FILE_BYTES - path.stat().st_size - 1) + "\n")
    with pytest.raises(ConfigError, match=f"would be larger than {MAX_FILE_BYTES} bytes with one more key"):
        add_key(path, "bob", None)
    assert path.read_text() == text
    assert [entry.id for entry in read_key_file(path, "file")] == ["alice"]


@pytest.mark.parametrize("text", ["[" * 100_000, "- " * 100_000, "- {a: " * 50_000])
def test_a_file_that_is_deeper_than_any_of_keys_is_not_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"keys\.yaml:1: not YAML"):
        read_key_file(path, "file")
