"""Blocks on disk: what was written comes back, across processes too; what is not that is a miss, and no error."""

from __future__ import annotations

import errno
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError
from kvferry.kvcache.disk_files import DiskFile, DiskThread, open_file
from kvferry.kvcache.disk_layout import DiskSet
from kvferry.kvcache.disk_tier import DiskResult, DiskTask

SLOT = 512
A, B, C = (bytes([n]) * 16 for n in (1, 2, 3))


def _config(directory: Path, num_bytes: int = 4 * SLOT) -> EngineConfig:
    return EngineConfig(
        model_dir=directory, served_model_name="m", disk_cache_dir=directory / "cache", disk_cache_bytes=num_bytes
    )


def _open(directory: Path, fingerprint: str = "f0", *, slot_bytes: int = SLOT, num_bytes: int = 4 * SLOT) -> DiskFile:
    config = _config(directory, num_bytes)
    return open_file(config, fingerprint, slot_bytes=slot_bytes, rank=0, tp_size=1)


def _data(number: int) -> memoryview:
    return memoryview(bytearray((number + i) % 251 for i in range(SLOT)))


def _read(file: DiskFile, slot: int, block_hash: bytes) -> memoryview | None:
    into = memoryview(bytearray(SLOT))
    return into if file.read(slot, block_hash, into) else None


def test_what_was_written_is_read_again_by_the_process_and_by_the_next_one(tmp_path: Path) -> None:
    file = _open(tmp_path)
    file.write(1, A, _data(1))
    file.write(3, B, _data(2))
    assert _read(file, 1, A) == _data(1) and _read(file, 3, B) == _data(2)
    assert _read(file, 1, B) is None, "another block's"
    assert _read(file, 0, A) is None, "never written"
    file.close()
    file = _open(tmp_path)
    assert sorted(file.stored()) == [(A, 1), (B, 3)]
    assert _read(file, 1, A) == _data(1)
    file.write(1, C, _data(3))
    assert sorted(file.stored()) == [(B, 3), (C, 1)] and _read(file, 1, A) is None
    file.close()


def _num_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_file_is_private_and_belongs_to_one_model_size_and_process(tmp_path: Path) -> None:
    tmp_path /= "new"
    first = _open(tmp_path)
    (path,) = (tmp_path / "cache").iterdir()
    assert path.stat().st_blocks * 512 >= path.stat().st_size, "it has its room"
    first.write(0, A, _data(1))
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    num_open = _num_open()
    second = _open(tmp_path)
    assert not list(second.stored()), "the first one is in use"
    second.close()
    assert _num_open() == num_open
    first.close()
    other = _open(tmp_path, "f1")
    assert not list(other.stored())
    other.close()
    smaller = _open(tmp_path, num_bytes=SLOT)
    assert not list(smaller.stored()) and smaller.num_slots == 1
    smaller.close()


@pytest.mark.parametrize("offset", [-1, -3 * SLOT - 7])
def test_a_spoilt_byte_is_a_miss(tmp_path: Path, offset: int) -> None:
    file = _open(tmp_path)
    file.write(0, A, _data(1))
    file.write(3, B, _data(2))
    (path,) = (tmp_path / "cache").iterdir()
    with path.open("r+b") as raw:
        raw.seek(offset, os.SEEK_END)
        byte = raw.read(1)
        raw.seek(offset, os.SEEK_END)
        raw.write(bytes([byte[0] ^ 4]))
    assert [_read(file, 0, A) is None, _read(file, 3, B) is None] == [offset < -SLOT, offset >= -SLOT]
    file.close()


def test_many_slots_and_their_rows_lie_apart_though_a_disk_takes_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda fd, data, offset: pwrite(fd, data[:200], offset))
    file, names = _open(tmp_path, num_bytes=200 * SLOT), [bytes([number]) * 16 for number in range(200)]
    for slot, name in enumerate(names):
        file.write(slot, name, _data(slot))
    file.close()
    file = _open(tmp_path, num_bytes=200 * SLOT)
    assert list(file.stored()) == [(name, slot) for slot, name in enumerate(names)]
    assert all(_read(file, slot, name) == _data(slot) for slot, name in enumerate(names))
    file.close()


@pytest.mark.parametrize("what", ["hash", "sum", "place"])
def test_a_spoilt_row_is_nobodys(tmp_path: Path, what: str) -> None:
    file = _open(tmp_path)
    file.write(0, A, _data(1))
    file.write(1, B, _data(2))
    file.write(2, C, _data(3))
    file.close()
    (path,) = (tmp_path / "cache").iterdir()
    with path.open("r+b") as raw:
        raw.seek(4096 + 64)
        row = raw.read(32)
        raw.seek(4096 + (16 if what == "sum" else 0))
        raw.write(row if what == "place" else row[:8])
    file = _open(tmp_path)
    assert list(file.stored()) == [(B, 1), (C, 2)]
    file.close()


def test_a_truncated_file_starts_empty(tmp_path: Path) -> None:
    file = _open(tmp_path)
    file.write(0, A, _data(1))
    file.close()
    (path,) = (tmp_path / "cache").iterdir()
    os.truncate(path, path.stat().st_size - 1)
    file = _open(tmp_path)
    assert not list(file.stored())
    file.close()


def test_a_directory_that_cannot_be_used_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"disk_cache_dir: cannot use .*cache"):
        _open(tmp_path)
    (tmp_path / "cache").unlink()
    (tmp_path / "cache").mkdir()
    for mode in (0o710, 0o701):
        (tmp_path / "cache").chmod(mode)
        with pytest.raises(ConfigError, match=r"others may look into .*chmod 700"):
            _open(tmp_path)
    (tmp_path / "cache").chmod(0o700)
    (tmp_path / "cache" / "f0-0of1.0.kv").symlink_to(tmp_path / "another")
    with pytest.raises(ConfigError, match=r"cannot open .*f0-0of1\.0\.kv"):
        _open(tmp_path)
    owner = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match=rf"belongs to user {owner}, not to us \({owner + 1}\)"):
        _open(tmp_path)


def test_a_worker_finds_its_own_file_again_whichever_starts_first(tmp_path: Path) -> None:
    """Workers that are started by hand may have tiers of different sizes in one directory."""
    large, small = _open(tmp_path), _open(tmp_path, num_bytes=2 * SLOT)
    large.write(3, A, _data(1))
    small.write(1, B, _data(2))
    for file in (large, small):
        file.close()
    small, large = _open(tmp_path, num_bytes=2 * SLOT), _open(tmp_path)
    assert list(small.stored()) == [(B, 1)] and list(large.stored()) == [(A, 3)]
    for file in (large, small):
        file.close()
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_of_two_slots_with_one_block_the_first_is_found(tmp_path: Path) -> None:
    """A read failed, and the block was written once more."""
    file = _open(tmp_path)
    for slot in (2, 1):
        file.write(slot, A, _data(1))
    assert list(file.stored()) == [(A, 1)]
    file.close()


def _open_rank(directory: Path, rank: int, wanted: DiskSet | None = None) -> DiskFile:
    return open_file(_config(directory), "f0", slot_bytes=SLOT, rank=rank, tp_size=2, wanted=wanted)


def test_the_files_of_a_worker_s_ranks_stay_together_whoever_starts_first(tmp_path: Path) -> None:
    """Two workers of two ranks; after a crash the second one's may look for their files before the first's."""
    first, second = _open_rank(tmp_path, 0), _open_rank(tmp_path, 0)
    others = [_open_rank(tmp_path, 1, wanted=file.belongs_to) for file in (second, first)]
    assert [file.belongs_to.number for file in (first, second, *others)] == [0, 1, 1, 0], "the same of both ranks"
    assert all(file.is_new for file in (first, second, *others))
    for file, value in zip((first, second, *others), (A, B, B, A), strict=True):
        file.write(0, value, _data(1))
        file.close()
    first = _open_rank(tmp_path, 0)
    second = _open_rank(tmp_path, 0)
    others = [_open_rank(tmp_path, 1, wanted=file.belongs_to) for file in (second, first)]
    assert not any(file.is_new for file in (first, second, *others))
    assert [list(file.stored()) for file in (first, second, *others)] == [[(value, 0)] for value in (A, B, B, A)]
    for file in (first, second, *others):
        file.close()


def test_a_rank_without_a_file_of_the_set_begins_one_and_spoils_no_other_worker_s(tmp_path: Path) -> None:
    first, second = _open_rank(tmp_path, 0), _open_rank(tmp_path, 0)
    other = _open_rank(tmp_path, 1, wanted=first.belongs_to)
    other.write(0, A, _data(1))
    other.close()
    other = _open_rank(tmp_path, 1, wanted=second.belongs_to)
    assert other.is_new and other.belongs_to == second.belongs_to and not list(other.stored())
    kept = _open_rank(tmp_path, 1, wanted=first.belongs_to)
    assert not kept.is_new and list(kept.stored()) == [(A, 0)]
    for file in (first, second, other, kept):
        file.close()


def test_a_file_that_begins_anew_is_of_another_set_and_empty(tmp_path: Path) -> None:
    first, file = _open_rank(tmp_path, 0), _open_rank(tmp_path, 0)
    other = _open_rank(tmp_path, 1, wanted=file.belongs_to)
    for each in (file, other):
        each.write(0, A, _data(1))
        each.close()
    file = _open_rank(tmp_path, 0)
    assert list(file.stored()) == [(A, 0)] and file.belongs_to.number == 1
    file.begin_anew()
    assert file.is_new and file.belongs_to.number == 1 and not list(file.stored())
    file.write(1, B, _data(2))
    wanted = file.belongs_to
    file.close()
    file = _open_rank(tmp_path, 0)
    assert file.belongs_to == wanted and list(file.stored()) == [(B, 1)], "so it is found again"
    other = _open_rank(tmp_path, 1, wanted=wanted)
    assert other.is_new and not list(other.stored())
    for each in (first, file, other):
        each.close()


def test_of_files_from_before_there_were_sets_a_lone_rank_s_is_read_and_others_begin_anew(tmp_path: Path) -> None:
    """Nothing ties these to each other."""
    alone, ranked = _open(tmp_path), _open_rank(tmp_path, 0)
    for file in (alone, ranked):
        file.write(0, A, _data(1))
        file.close()
    for path in (tmp_path / "cache").iterdir():
        ranks = path.name.split(".")[0].removeprefix("f0-").replace("of", "/")
        with path.open("r+b") as raw:
            raw.write(f"kvferry blocks 2\nf0\n{ranks} 4 {SLOT}".encode().ljust(4096, b"\0"))
    alone, ranked = _open(tmp_path), _open_rank(tmp_path, 0)
    assert not alone.is_new and list(alone.stored()) == [(A, 0)]
    assert ranked.is_new and not list(ranked.stored())
    for file in (alone, ranked):
        file.close()


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    num_open = _num_open()
    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(ConfigError, match=r"cannot lock .*f0-0of1\.0\.kv: Function not implemented; take a local disk"):
        _open(tmp_path)
    assert _num_open() == num_open


def test_no_more_processes_share_a_directory_than_there_are_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvferry.kvcache.disk_files._MAX_FILES", 1)
    file = _open(tmp_path)
    with pytest.raises(ConfigError, match=r"1 processes use .*cache already"):
        _open(tmp_path)
    file.close()


def test_too_little_room_is_told_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_open, room = _num_open(), SimpleNamespace(f_bavail=2, f_bfree=3, f_blocks=1 << 60, f_frsize=4096)
    with monkeypatch.context() as patched:
        patched.setattr("os.fstatvfs", lambda fd: room)
        with pytest.raises(ConfigError, match=r"disk_cache_bytes: 10,240 bytes are needed .* 8,192 are free"):
            _open(tmp_path)
    assert _num_open() == num_open
    with pytest.raises(ConfigError, match="less than a block's 512 bytes"):
        _open(tmp_path, num_bytes=511)


@pytest.mark.slow
def test_a_full_disk_fails_a_write_and_what_lies_there_is_still_read(tmp_path: Path) -> None:
    """A limit of the process's file size stands for the disk's end."""
    program = f"""
import queue, resource, signal
from pathlib import Path
from kvferry.kvcache.disk_files import DiskThread
from kvferry.kvcache.disk_tier import DiskTask
from kvferry.tests.kvcache.test_disk_files import A, B, _data, _open
file = _open(Path({str(tmp_path)!r}))
file.write(0, A, _data(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
memory, results = [_data(1), _data(2)], queue.SimpleQueue()
thread = DiskThread(file, lambda slot: memory[slot], results.put)
thread.submit(DiskTask(True, B, 1, 1))
assert "write" in results.get().error
thread.submit(DiskTask(False, A, 1, 0))
assert not results.get().error and memory[1] == _data(1)
thread.close()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_the_thread_reads_before_it_writes_and_tells_what_failed(tmp_path: Path) -> None:
    file = _open(tmp_path)
    memory = [_data(number) for number in range(4)]
    results: queue.SimpleQueue[DiskResult] = queue.SimpleQueue()
    thread = DiskThread(file, lambda slot: memory[slot], results.put)
    thread.submit(DiskTask(True, A, 0, 2))
    assert results.get().error == ""
    thread.submit(DiskTask(False, A, 3, 2))
    assert results.get().error == "" and memory[3] == _data(0)
    thread.submit(DiskTask(False, B, 3, 2))
    assert results.get().error == "not what was written"
    thread.close()
    assert list(_open(tmp_path).stored()) == [(A, 2)], "it is nobody's any more"


@pytest.mark.parametrize("is_closed", [False, True])
def test_the_thread_reads_before_it_writes_and_ends_after_the_task_that_runs(tmp_path: Path, is_closed: bool) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def slot_bytes(slot: int) -> memoryview:
        begun.set()
        assert may_go_on.wait(10)
        return _data(slot)

    results: queue.SimpleQueue[DiskResult] = queue.SimpleQueue()
    thread = DiskThread(_open(tmp_path), slot_bytes, results.put)
    tasks = [DiskTask(number < 3, A, number, number % 4) for number in range(5)]
    for task in tasks:
        thread.submit(task)
        assert begun.wait(10)
    if is_closed:
        threading.Timer(0.05, may_go_on.set).start()
    else:
        may_go_on.set()
        assert [results.get().task for _ in tasks] == [tasks[0], *tasks[3:], *tasks[1:3]]
    thread.close()
    assert results.qsize() == is_closed
