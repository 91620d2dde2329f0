"""The bound of a data folder holds for batches' answers too: lines wait where there is no room for them."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from kvferry.router.batches import keeper as keeper_module
from kvferry.router.batches import routes, run
from kvferry.router.batches.call import CallAnswer
from kvferry.router.batches.files import FileStore
from kvferry.router.batches.folder import DataFolder, Room
from kvferry.router.batches.keeper import Keeper
from kvferry.router.batches.record import BatchRecord, BatchStatus
from kvferry.router.batches.run import BatchRun, RunDeps
from kvferry.router.batches.store import BatchStore

from .batch_server import batch_server, data_folder, http_client, jsonl, line
from .test_batch_keeper import SOON_S, ended
from .test_batch_run import NO_ROOM, Caller, create, deps_of, output, run_of

ANSWER_BYTES = 2000
MAX_BYTES = 600_000


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "FLUSH_EVERY_S", 0.001)
    monkeypatch.setattr(keeper_module, "MEASURE_S", 0.01)


def deps_with_bound(path: Path) -> tuple[Caller, RunDeps]:
    caller = Caller(lambda name: CallAnswer(200, "r", b'"%b"' % (b"x" * ANSWER_BYTES)))
    folder = data_folder(path, MAX_BYTES)
    deps = deps_of(path, caller, slots=2)
    return caller, replace(deps, store=BatchStore(folder), files=FileStore(folder, deps.now_s))


async def until_full(keeper: Keeper, deps: RunDeps, batch_id: str) -> int:
    """Look until the batch waits, and goes on waiting. Returns how many lines have been asked."""
    caller = deps.caller
    assert isinstance(caller, Caller)
    async with asyncio.timeout(SOON_S):
        while True:
            num_asked, folder = len(caller.asked), deps.store.folder
            for _ in range(30):
                keeper.look_now()
                await asyncio.sleep(0.002)
            record = deps.store.read(batch_id)
            if record is not None and record.errors and folder.is_full and num_asked == len(caller.asked):
                assert [fault.code for fault in record.errors] == ["insufficient_storage"]
                return num_asked


async def test_lines_wait_until_there_is_room_for_their_answers(tmp_path: Path) -> None:
    caller, deps = deps_with_bound(tmp_path)
    folder = deps.store.folder
    other = folder.files / "other.data"
    other.write_bytes(b"x" * (MAX_BYTES // 3))
    batch_id = create(deps, 500)
    keeper = Keeper(deps)
    async with keeper.keeping():
        num_asked = await until_full(keeper, deps, batch_id)
        assert 0 < num_asked < 500
        await asyncio.to_thread(other.unlink)
        async with asyncio.timeout(SOON_S):
            while len(caller.asked) == num_asked:
                keeper.look_now()
                await asyncio.sleep(0.001)
        assert await until_full(keeper, deps, batch_id) < 500
        used = folder.num_bytes()
        deps.store.ask_to_cancel(batch_id, "o")
        record = await ended(keeper, deps, batch_id)
        async with asyncio.timeout(SOON_S):
            while keeper._running:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    assert record.status is BatchStatus.CANCELLED
    assert len(output(deps, record.output_file_id)) == record.completed == len(caller.asked) > num_asked
    assert used < MAX_BYTES + 4 * 2 * ANSWER_BYTES  # what was under way when the room was used up
    errors = deps.files.path(deps.files.get(record.error_file_id or "", "o"))
    assert folder.num_bytes() - errors.stat().st_size < used and not folder.num_incoming


async def test_answers_of_another_batch_count_before_they_are_in_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal counts twice: nothing else may take the room in which its answers become files."""
    caller, deps = deps_with_bound(tmp_path)
    each = run_of(deps, create(deps, 10))
    folder, before = deps.store.folder, deps.store.folder.num_bytes()
    seen: list[int] = []

    async def note(self: BatchRun, journal: object) -> None:
        seen.append(folder.num_bytes() - before)

    monkeypatch.setattr(BatchRun, "_finalize", note)
    await each.run()
    assert len(caller.asked) == 10 and seen[0] > 2 * 10 * ANSWER_BYTES
    assert 0 < seen[0] - folder.num_arrived < 2 * 10 * 100  # what stands around the answers


async def test_lines_wait_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caller, usage = Caller(), shutil.disk_usage(tmp_path)
    deps = deps_of(tmp_path, caller)
    batch_id = create(deps, 100)
    keeper = Keeper(deps)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
        deps.store.folder.room = await asyncio.to_thread(_measured, deps)
        async with keeper.keeping():
            await until_full(keeper, deps, batch_id)
            assert not caller.asked
            patch.undo()
            assert (await ended(keeper, deps, batch_id)).completed == 100


def _measured(deps: RunDeps) -> Room:
    room = Room(deps.store.folder)
    room.measure()
    return room


async def test_a_batch_is_refused_where_the_folder_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    async with batch_server(tmp_path, max_bytes=MAX_BYTES) as (_, address), http_client(address) as client:
        lines = {"file": ("in", jsonl(line("a")))}
        kept = (await client.post("/v1/files", files=lines, data={"purpose": "batch"})).json()

        async def post() -> httpx.Response:
            call = {"input_file_id": kept["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
            return await client.post("/v1/batches", json=call, headers={"Idempotency-Key": "a"})

        other = tmp_path / "files" / "other.data"
        await asyncio.to_thread(other.write_bytes, b"x" * MAX_BYTES)
        refused = (await post()).json()["error"]
        assert refused["code"] == "insufficient_storage" and str(MAX_BYTES) in refused["message"]
        await asyncio.to_thread(other.unlink)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
            refused = (await post()).json()["error"]
            assert refused["code"] == "insufficient_storage" and "the disk" in refused["message"]
        assert (await post()).status_code == 200
        await asyncio.to_thread(other.write_bytes, b"x" * MAX_BYTES)
        again = await post()  # it is there already
        assert again.status_code == 200 and again.headers["idempotent-replayed"] == "true"


def _full(deps: RunDeps, monkeypatch: pytest.MonkeyPatch) -> Room:
    usage = shutil.disk_usage(deps.store.folder.path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
        return _measured(deps)


async def _told(deps: RunDeps, batch_id: str, *codes: str) -> None:
    """Wait until the record says this and nothing else."""

    def told() -> bool:
        record = deps.store.read(batch_id)
        return record is not None and tuple(fault.code for fault in record.errors) == codes

    async with asyncio.timeout(SOON_S):
        while not await asyncio.to_thread(told):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_batch_that_has_room_again_says_so_before_a_line_has_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deps = deps_of(tmp_path, Caller(lambda name: NO_ROOM))
    batch_id = create(deps, 2)
    deps.store.folder.room = await asyncio.to_thread(_full, deps, monkeypatch)
    running = asyncio.create_task(run_of(deps, batch_id).run())
    await _told(deps, batch_id, "insufficient_storage")
    deps.store.folder.room = None
    deps.has_room.set()
    await _told(deps, batch_id)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_batch_that_is_stopped_while_it_has_no_room_says_so_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deps = deps_of(tmp_path, Caller())
    batch_id = create(deps, 2)
    deps.store.folder.room = await asyncio.to_thread(_full, deps, monkeypatch)
    stopped = run_of(deps, batch_id)
    running = asyncio.create_task(stopped.run())
    await _told(deps, batch_id, "insufficient_storage")
    stopped.stop(BatchStatus.EXPIRED)
    await running
    assert (stopped.record.status, stopped.record.errors) == (BatchStatus.EXPIRED, [])


async def test_a_record_is_written_by_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that were asked before the folder was full are answered while it is told."""
    monkeypatch.setattr(run, "_TELL_EVERY_S", 0.0)
    caller = Caller(num_together=2)
    deps = deps_of(tmp_path, caller, slots=2)
    batch_id, folder = create(deps, 4), deps.store.folder
    full = await asyncio.to_thread(_full, deps, monkeypatch)

    def fill(name: str) -> None:
        if len(caller.asked) == 2:
            folder.room = full

    caller.before = fill
    save, num_now, num_most = deps.store.save, 0, 0

    def slow(record: BatchRecord, *, lasts: bool = True) -> None:
        nonlocal num_now, num_most
        num_now += 1
        num_most = max(num_most, num_now)
        time.sleep(0.1)
        save(record, lasts=lasts)
        num_now -= 1

    monkeypatch.setattr(deps.store, "save", slow)
    running = asyncio.create_task(run_of(deps, batch_id).run())
    await _told(deps, batch_id, "insufficient_storage")
    await asyncio.sleep(0.2)
    folder.room = None
    deps.has_room.set()
    await running
    record = deps.store.read(batch_id)
    assert record is not None and (record.completed, record.errors) == (4, []) and num_most == 1


async def test_what_was_measured_is_forgotten_where_no_batch_runs(tmp_path: Path) -> None:
    """It grows old: a batch that comes later would tell of a folder that is full no more."""
    caller = Caller(lambda name: NO_ROOM if folder.room is None else None)
    deps = deps_of(tmp_path, caller)
    folder, keeper = deps.store.folder, Keeper(deps)
    async with keeper.keeping():
        for _ in range(2):
            assert (await ended(keeper, deps, create(deps, 2))).completed == 2
            async with asyncio.timeout(SOON_S):
                while keeper._running:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            assert folder.room is None


async def test_batches_begin_and_end_while_the_folder_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def measure(room: Room) -> None:
        begun.set()
        assert go_on.wait(SOON_S)

    monkeypatch.setattr(Room, "measure", measure)
    deps = deps_of(tmp_path, Caller(lambda name: None if begun.is_set() else NO_ROOM))
    keeper = Keeper(deps)
    async with keeper.keeping():
        try:
            for _ in range(2):
                assert (await ended(keeper, deps, create(deps, 1))).completed == 1
            assert begun.is_set()
        finally:
            go_on.set()


async def test_a_folder_that_takes_long_to_measure_is_measured_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_measured, took_s = 0, 0.05

    def measure(room: Room) -> None:
        nonlocal num_measured
        num_measured += 1
        time.sleep(took_s)

    monkeypatch.setattr(Room, "measure", measure)
    deps = deps_of(tmp_path, Caller(lambda name: NO_ROOM))
    create(deps, 1)
    keeper = Keeper(deps)
    async with keeper.keeping():
        end_s = asyncio.get_running_loop().time() + 0.5 * took_s / keeper_module.MEASURE_SHARE
        while asyncio.get_running_loop().time() < end_s:
            keeper.look_now()
            await asyncio.sleep(0.005)
    assert num_measured == 1


async def test_the_folder_is_not_measured_for_a_batch_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MAX_UNENDED", 0)
    async with batch_server(tmp_path) as (_, address), http_client(address) as client:
        lines = {"file": ("in", jsonl(line("a")))}
        kept = (await client.post("/v1/files", files=lines, data={"purpose": "batch"})).json()
        measured: list[DataFolder] = []
        monkeypatch.setattr(DataFolder, "num_bytes", measured.append)
        call = {"input_file_id": kept["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        refused = await client.post("/v1/batches", json=call)
    assert refused.status_code == 429 and not measured


@pytest.mark.parametrize(
    ("total", "free", "is_full"),
    [(64, 50, False), (64, 5, False), (64, 4, True), (2**20, 65, False), (2**20, 64, True)],
)
def test_a_small_disk_has_less_to_spare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, free: int, is_full: bool
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(total=total * 2**20, free=free * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    room = Room(data_folder(tmp_path))
    room.measure()
    assert room.is_used_up is is_full
