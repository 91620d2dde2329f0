"""The bound of a data folder holds for batches' answers too: lines wait where there is no room for them."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from kvferry.router.batches import keeper as keeper_module
from kvferry.router.batches import run
from kvferry.router.batches.call import CallAnswer
from kvferry.router.batches.files import FileStore
from kvferry.router.batches.folder import Room
from kvferry.router.batches.keeper import Keeper
from kvferry.router.batches.record import BatchStatus
from kvferry.router.batches.run import BatchRun, RunDeps
from kvferry.router.batches.store import BatchStore

from .batch_server import batch_server, data_folder, http_client, jsonl, line
from .test_batch_keeper import SOON_S, ended
from .test_batch_run import Caller, create, deps_of, output, run_of

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
