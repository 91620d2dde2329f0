"""A model's digest: over every byte that is served, computed once, and a side file that is believed only while it is
right."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvferry.common.errors import ConfigError
from kvferry.models import digest as digest_module
from kvferry.models.digest import ModelDigest, file_digest, model_digest

from ..checkpoints import write_checkpoint

LONG_AGO_NS = 10**18


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVFERRY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * 4)
    return path


def _digest(path: Path, tmp_path: Path) -> bytes:
    return file_digest(path, cache=tmp_path / "cache")


def _side_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.kvferry-digest")


def _kept(path: Path, tmp_path: Path, cache: str = "cache") -> bytes:
    """As if time had passed since the file was written."""
    return file_digest(path, cache=tmp_path / cache, settled_ns=-LONG_AGO_NS)


def _is_believed(side_file: Path, path: Path, tmp_path: Path) -> bool:
    """Whether what stands there is what is found: another digest is put in its place."""
    kept = json.loads(side_file.read_bytes())
    side_file.write_text(json.dumps({**kept, "blake3": "ab" * 32}))
    found = _kept(path, tmp_path)
    side_file.write_text(json.dumps(kept))
    return found == b"\xab" * 32


# --- what it covers --------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 5000), place=st.integers(0), change=st.integers(1, 255))
def test_one_byte_anywhere_gives_another_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, place: int, change: int
) -> None:
    """Of files that are read in up to ten parts. The next test has one of two parts that are as long as served ones."""
    monkeypatch.setattr(digest_module, "_READ_BYTES", 512)
    path, data = tmp_path / "model.safetensors", bytearray(os.urandom(size))
    path.write_bytes(data)
    before = _digest(path, tmp_path)
    data[place % size] ^= change
    path.write_bytes(data)
    assert _digest(path, tmp_path) != before
    data[place % size] ^= change
    path.write_bytes(data)
    assert _digest(path, tmp_path) == before


@pytest.mark.parametrize("size", [0, 1, 8 << 20, 9 << 20])
def test_length_and_order_count(tmp_path: Path, size: int) -> None:
    path, seen = tmp_path / "model.safetensors", set()
    for data in (b"\0" * size, b"\0" * (size + 1), b"\1" + b"\0" * size, b"\0" * size + b"\1"):
        path.write_bytes(data)
        seen.add(_digest(path, tmp_path))
    assert len(seen) == (4 if size else 3)


def test_whatever_decides_tokens_gives_another_digest(tmp_path: Path) -> None:
    write: list[Callable[[Path], object]] = [
        lambda path: write_checkpoint(path, tokenizer=False),
        lambda path: write_checkpoint(path, tokenizer=False, seed=1),
        lambda path: write_checkpoint(path, tokenizer=False, config={"rope_theta": 10001.0}),
        lambda path: write_checkpoint(path, tokenizer=False, eos_token_ids=[1, 2]),
        lambda path: write_checkpoint(path, tokenizer=False, num_files=2),
    ]
    digests = []
    for number, one in enumerate(write):
        one(tmp_path / str(number))
        digests.append(model_digest(tmp_path / str(number), "auto", 0))
    assert len(set(digests)) == len(write) and all(len(digest) == 32 for digest in digests)
    write[0](tmp_path / "again")
    assert model_digest(tmp_path / "again", "auto", 7) == digests[0], "a seed is of no effect where weights are read"
    dummies = {model_digest(tmp_path / "0", "dummy", seed) for seed in (0, 1)}
    assert len(dummies) == 2 and not dummies & set(digests)


def test_the_order_in_which_a_config_is_written_does_not_matter(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tokenizer=False)
    before = model_digest(path, "auto", 0)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert model_digest(path, "auto", 0) == before


def test_what_cannot_be_read_is_named_to_whoever_waits(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tokenizer=False)
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has neither"):
        ModelDigest(path, "auto", 0).result()
    with pytest.raises(ConfigError, match="cannot be read"):
        file_digest(path / "model.safetensors")


# --- the side file ---------------------------------------------------------------------------------------------------


def test_a_file_is_read_once(tmp_path: Path, weights: Path) -> None:
    assert _kept(weights, tmp_path) == _digest(weights, tmp_path)
    assert _is_believed(_side_file(weights), weights, tmp_path)


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))


def _touch(path: Path) -> None:
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS + 1))


def _rewrite(path: Path) -> None:
    """In place, with its old times: only the inode's own time shows it."""
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(data[::-1])
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(LONG_AGO_NS, LONG_AGO_NS))
    other.replace(path)


@pytest.mark.parametrize("change", [_grow, _touch, _rewrite, _replace])
def test_a_side_file_of_another_state_is_not_believed(
    tmp_path: Path, weights: Path, change: Callable[[Path], None]
) -> None:
    os.utime(weights, ns=(LONG_AGO_NS, LONG_AGO_NS))
    before = _kept(weights, tmp_path)
    change(weights)
    assert not _is_believed(_side_file(weights), weights, tmp_path)
    after = _kept(weights, tmp_path)
    assert (after == before) == (change is _touch)
    _side_file(weights).unlink()
    assert after == _digest(weights, tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "null", "\0" * 40, '{"marks": 1, "blake3": "00"}'])
def test_a_damaged_side_file_is_written_anew(tmp_path: Path, weights: Path, text: str) -> None:
    expected = _kept(weights, tmp_path)
    for damaged in (text, _side_file(weights).read_text().replace('"blake3":"', '"blake3":"zz')):
        _side_file(weights).write_text(damaged)
        assert _kept(weights, tmp_path) == expected
        assert _is_believed(_side_file(weights), weights, tmp_path)


def test_where_nothing_can_be_written_beside_the_file_it_is_kept_in_the_cache(tmp_path: Path, weights: Path) -> None:
    _side_file(weights).mkdir()  # so that not even root can
    _kept(weights, tmp_path)
    [kept] = (tmp_path / "cache" / "digests").glob("*.json")
    assert _is_believed(kept, weights, tmp_path)
    assert not list(tmp_path.glob(".*.kvferry-digest.*")), "nothing half written is left"


def test_where_nothing_can_be_written_at_all_it_is_computed_each_time(tmp_path: Path, weights: Path) -> None:
    expected = _digest(weights, tmp_path)
    _side_file(weights).mkdir()
    (tmp_path / "no-folder").touch()
    assert [_kept(weights, tmp_path, "no-folder") for _ in range(2)] == [expected] * 2


def test_a_file_that_was_changed_a_moment_ago_is_not_kept(tmp_path: Path, weights: Path) -> None:
    _digest(weights, tmp_path)
    assert not _side_file(weights).exists()


def test_a_file_that_changes_under_the_hash_is_refused(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hash_and_write(path: Path) -> bytes:
        found = hash_file(path)
        path.write_bytes(b"other weights")
        return found

    hash_file = digest_module._hash_file
    monkeypatch.setattr(digest_module, "_hash_file", hash_and_write)
    with pytest.raises(ConfigError, match="is being changed while it is read"):
        _kept(weights, tmp_path)
    assert not _side_file(weights).exists()


def test_workers_that_start_together_find_the_same(tmp_path: Path, weights: Path) -> None:
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(_kept(weights, tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [_digest(weights, tmp_path)] * 6


def test_weights_that_are_rounded_are_another_model_unless_they_may_be_mixed(tmp_path: Path) -> None:
    model_dir = write_checkpoint(tmp_path, tokenizer=False)

    def digest(quantization: str | None, *mixed: str) -> str:
        return model_digest(model_dir, "auto", 0, quantization, mixed)

    forms = (digest(None), digest("int8"), digest("int4"), digest("fp8"), digest(None, "plain", "int4"))
    assert len(set(forms)) == 5
    assert digest("int4", "plain", "int4") == digest(None, "int4", "plain") != digest(None, "int8", "plain")
