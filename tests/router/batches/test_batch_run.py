"""One batch with a scripted caller and an injected clock: tries, a router that is killed, expiry, a full disk."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvferry.common.errors import InvalidTransition, RequestError
from kvferry.router.batches import run
from kvferry.router.batches.call import CallAnswer
from kvferry.router.batches.files import INPUT, FileStore
from kvferry.router.batches.journal import Journal
from kvferry.router.batches.keeper import Keeper
from kvferry.router.batches.record import ENDED, BatchRecord, BatchStatus
from kvferry.router.batches.run import BatchRun, RunDeps
from kvferry.router.batches.store import BatchStore
from kvferry.router.batches.usage import BatchUsage
from kvferry.router.helpers.json_parser import JsonParser

from .batch_server import data_folder, jsonl, line

NO_ROOM = CallAnswer(503, "r", b"{}", code="no_decode_capacity")
_NEVER_S = 60.0  # fewer than the slots' number are asked at once


class Killed(BaseException):
    """The end of the process, as far as a test goes."""


class Caller:
    """Answers a line with its own name, once `num_together` were asked at once; `before` may raise, or answer else."""

    def __init__(
        self, before: Callable[[str], CallAnswer | None] = lambda name: None, *, num_together: int = 1
    ) -> None:
        self.asked: list[str] = []
        self.num_now = self.num_most = 0
        self.before = before
        self._num_together, self._are_together = num_together, asyncio.Event()

    async def ask(self, endpoint: str, body: bytes, tenant: bytes) -> CallAnswer:
        assert (endpoint, tenant) == ("/v1/completions", b"me")
        name = json.loads(body)["prompt"]
        self.asked.append(name)
        self.num_now += 1
        self.num_most = max(self.num_most, self.num_now)
        try:
            if self.num_now == self._num_together:
                self._are_together.set()
            await self._are_together.wait()
            await asyncio.sleep(0)
            told = {"text": name, "usage": {"prompt_tokens": 1 + int(name), "completion_tokens": 2}}
            return self.before(name) or CallAnswer(200, secrets.token_hex(4), json.dumps(told).encode())
        finally:
            self.num_now -= 1


def deps_of(path: Path, caller: Caller, now_s: Callable[[], float] = lambda: 1000.0, slots: int = 8) -> RunDeps:
    folder = data_folder(path)
    return RunDeps(
        store=BatchStore(folder),
        files=FileStore(folder, now_s),
        caller=caller,
        json=JsonParser(),
        check_model=lambda name: None,
        tenant_of=lambda owner: b"me",
        slots=asyncio.Semaphore(slots),
        now_s=now_s,
        pause_s=0.001,
    )


def create(deps: RunDeps, num_lines: int, owner: str = "o", created_ns: int = 1000) -> str:
    return create_of(deps, [line(str(number)) for number in range(num_lines)], owner, created_ns)


def create_of(
    deps: RunDeps, lines: list[dict[str, Any]], owner: str = "o", created_ns: int = 1000, taken_by: str = ""
) -> str:
    part = deps.store.folder.new_part()
    part.write_bytes(jsonl(*lines))
    stored = deps.files.add(part, owner=owner, filename="in", purpose=INPUT)
    record = BatchRecord(
        id=f"batch_{secrets.token_hex(16)}",
        owner=owner,
        endpoint="/v1/completions",
        input_file_id=stored.id,
        completion_window="24h",
        metadata=None,
        created_at=1000,
        created_ns=created_ns,
        taken_by=taken_by,
        expires_at=2000,
    )
    deps.store.create(record, deps.files.path(stored))
    return record.id


def run_of(deps: RunDeps, batch_id: str) -> BatchRun:
    record = deps.store.read(batch_id)
    assert record is not None
    return BatchRun(record, deps)


def output(deps: RunDeps, file_id: str | None) -> list[dict[str, object]]:
    if file_id is None:
        return []
    return [json.loads(each) for each in deps.files.path(deps.files.get(file_id, "o")).read_bytes().splitlines()]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "FLUSH_EVERY_S", 0.001)


async def test_no_more_lines_are_asked_at_once_than_there_are_slots(tmp_path: Path) -> None:
    caller = Caller(num_together=3)
    deps = deps_of(tmp_path, caller, slots=3)
    one, two = create(deps, 20), create(deps, 20)
    runs = [run_of(deps, one), run_of(deps, two)]
    async with asyncio.timeout(_NEVER_S):
        await asyncio.gather(*(each.run() for each in runs))
    assert caller.num_most == 3
    assert [each.record.status for each in runs] == [BatchStatus.COMPLETED] * 2
    assert [answer["custom_id"] for answer in output(deps, runs[0].record.output_file_id)] == list(map(str, range(20)))


async def test_what_found_no_room_is_asked_until_it_does_and_what_fails_three_times(tmp_path: Path) -> None:
    answers = {"0": [429, 503, 503, 429, 503, 200], "1": [500, 503, 500, 500], "2": [404], "3": [500, 200]}

    def before(name: str) -> CallAnswer:
        status = answers[name].pop(0)
        code = "no_decode_capacity" if status == 503 else None
        return CallAnswer(status, "r", b'{"status": %d}' % status, code=code)

    caller = Caller(before)
    deps = deps_of(tmp_path, caller)
    each = run_of(deps, create(deps, 4))
    await each.run()
    assert not any(answers.values())
    assert [answer["custom_id"] for answer in output(deps, each.record.output_file_id)] == ["0", "3"]
    assert [answer["custom_id"] for answer in output(deps, each.record.error_file_id)] == ["1", "2"]
    assert (each.record.total, each.record.completed, each.record.failed) == (4, 2, 2)


@pytest.mark.parametrize("seed", range(6))
async def test_a_batch_that_is_killed_again_and_again_answers_each_line_once(tmp_path: Path, seed: int) -> None:
    rng, lives = random.Random(seed), 0
    caller = Caller()
    batch_id = create(deps_of(tmp_path, caller), 60)
    while True:
        deps = deps_of(tmp_path, caller)
        each = run_of(deps, batch_id)
        if each.record.has_ended:
            break
        task = asyncio.create_task(each.run())
        done, _ = await asyncio.wait([task], timeout=rng.uniform(0.0, 0.02))
        if done:
            await task
            break
        lives += 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        journal = deps.store.journal(batch_id)
        if journal.exists() and (size := journal.stat().st_size):  # and its last bytes were not synced
            with journal.open("r+b") as file:
                file.truncate(rng.randint(max(0, size - 300), size))
    assert each.record.status is BatchStatus.COMPLETED
    found = output(deps, each.record.output_file_id)
    assert [answer["custom_id"] for answer in found] == [str(number) for number in range(60)]
    assert each.record.usage == BatchUsage(input_tokens=sum(range(1, 61)), output_tokens=120)
    assert len(await asyncio.to_thread(deps.files.owned, "o", "batch_output")) == 1


async def test_a_batch_killed_while_its_files_are_written_writes_them_again(tmp_path: Path) -> None:
    caller = Caller()
    deps = deps_of(tmp_path, caller)
    first = run_of(deps, batch_id := create(deps, 5))
    save, saved = deps.store.save, []

    def save_until_end(record: BatchRecord, *, lasts: bool = True) -> None:
        saved.append(record.status)
        if record.status is BatchStatus.COMPLETED:
            raise OSError("killed")
        save(record, lasts=lasts)

    deps.store.save = save_until_end  # type: ignore[method-assign]
    with pytest.raises(OSError, match="killed"):
        await first.run()
    deps.store.save = save  # type: ignore[method-assign]
    second = run_of(deps, batch_id)
    statuses = [second.record.status]
    await second.run()
    assert [*statuses, second.record.status] == [BatchStatus.FINALIZING, BatchStatus.COMPLETED]
    assert second.record.output_file_id == first.record.output_file_id
    assert len(caller.asked) == 5 and len(output(deps, second.record.output_file_id)) == 5


async def test_a_model_that_is_served_no_more_does_not_move_lines(tmp_path: Path) -> None:
    caller = Caller(lambda name: None)
    deps = deps_of(tmp_path, caller)
    record = deps.store.read(batch_id := create(deps, 3))
    assert record is not None
    record.advance(BatchStatus.IN_PROGRESS, 1000.0)
    deps.store.save(record)

    def refuse(name: str | None) -> None:
        raise AssertionError("the model was checked when the batch began")

    again = run_of(replace(deps, check_model=refuse), batch_id)
    await again.run()
    assert again.record.completed == 3


async def test_a_full_disk_stops_a_batch_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Caller()
    deps = deps_of(tmp_path, caller)
    batch_id = create(deps, 10)

    def full(self: Journal, finished: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        with pytest.raises(OSError, match="no space"):
            await run_of(deps, batch_id).run()
    again = run_of(deps, batch_id)
    await again.run()
    assert again.record.completed == 10


async def test_one_router_runs_a_batch_and_another_takes_it_over(tmp_path: Path) -> None:
    held, caller_1, caller_2 = asyncio.Event(), Caller(), Caller()

    async def hold(endpoint: str, body: bytes, tenant: bytes) -> CallAnswer:
        held.set()
        await asyncio.Event().wait()
        raise AssertionError

    caller_1.ask = hold  # type: ignore[method-assign]
    first, second = deps_of(tmp_path, caller_1), deps_of(tmp_path, caller_2)
    batch_id = create(first, 3)
    one, two = Keeper(first), Keeper(second)
    async with AsyncExitStack() as life_of_one:
        await life_of_one.enter_async_context(one.keeping())
        await held.wait()
        await life_of_one.enter_async_context(two.keeping())
        two.look_now()
        await asyncio.sleep(0.05)
        assert not caller_2.asked
    async with Keeper(second).keeping():
        while not (record := second.store.read(batch_id)) or not record.has_ended:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert record.completed == 3


async def test_a_batch_that_could_not_be_read_is_free_for_a_later_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deps = deps_of(tmp_path, Caller())
    batch_id = create(deps, 1)
    tried = asyncio.Event()

    def unreadable(batch_id: str) -> None:
        tried.set()
        raise OSError("too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(deps.store, "read", unreadable)
        async with Keeper(deps).keeping():
            await tried.wait()
    lock = deps.store.lock(batch_id)
    assert lock is not None
    lock.release()


async def test_a_batch_for_another_model_is_left_alone_until_its_time_is_over(tmp_path: Path) -> None:
    now = [1990.0]  # a longer way to its end would be a jump of the clock
    caller = Caller()

    def refuse(name: str | None) -> None:
        raise RequestError(f"{name} is not served")

    deps = replace(deps_of(tmp_path, caller, lambda: now[0]), check_model=refuse)
    batch_id = create(deps, 2)
    keeper = Keeper(deps)
    async with keeper.keeping():
        await asyncio.sleep(0.05)
        assert not caller.asked and not keeper._running
        now[0] = 2000.0
        while (record := deps.store.read(batch_id)) is None or not record.has_ended:
            keeper.look_now()
            await asyncio.sleep(0.001)
    assert record.status is BatchStatus.EXPIRED and not caller.asked


async def test_time_ends_a_batch_by_the_clock(tmp_path: Path) -> None:
    now = [1999.0]
    caller = Caller(lambda name: NO_ROOM)
    deps = deps_of(tmp_path, caller, lambda: now[0])
    batch_id = create(deps, 2)
    keeper = Keeper(deps)
    async with keeper.keeping():
        while not caller.asked:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        record = deps.store.read(batch_id)
        assert record is not None and record.status is BatchStatus.IN_PROGRESS
        now[0] = 2000.0
        while (record := deps.store.read(batch_id)) is None or not record.has_ended:
            keeper.look_now()
            await asyncio.sleep(0.001)
    assert record.status is BatchStatus.EXPIRED and record.stamps[BatchStatus.EXPIRED] == 2000
    assert len(output(deps, record.error_file_id)) == 2


async def test_progress_is_told_though_the_wall_clock_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_TELL_EVERY_S", 0.0)
    now, room = [1500.0], 1
    caller = Caller(lambda name: None if int(name) < room else NO_ROOM)
    deps = deps_of(tmp_path, caller, lambda: now[0])
    batch_id = create(deps, 4)

    async def told(completed: int) -> None:
        async with asyncio.timeout(60.0):
            while (record := deps.store.read(batch_id)) is None or record.completed != completed:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    running = asyncio.create_task(run_of(deps, batch_id).run())
    await told(1)
    now[0], room = 1500.0 - 86400.0, 3
    await told(3)
    room = 4
    await running
    record = deps.store.read(batch_id)
    assert record is not None and record.status is BatchStatus.COMPLETED


def test_what_is_old_is_deleted(tmp_path: Path) -> None:
    now = [1000.0]
    folder = data_folder(tmp_path)
    deps = RunDeps(
        store=BatchStore(folder),
        files=FileStore(folder, lambda: now[0]),
        caller=Caller(),
        json=JsonParser(),
        check_model=lambda name: None,
        tenant_of=lambda owner: b"me",
        slots=asyncio.Semaphore(1),
    )
    record = deps.store.read(create(deps, 1))
    assert record is not None
    record.advance(BatchStatus.CANCELLING, now[0])
    record.advance(BatchStatus.CANCELLED, now[0])
    deps.store.save(record)
    deps.store.sweep(now[0])
    deps.files.sweep(now[0])
    assert deps.store.owned("o") and deps.files.owned("o") and folder.num_bytes()
    assert not deps.store.input(record.id).exists()  # which a router has left that was killed at its end
    now[0] += folder.retention_s + 1
    deps.files.hidden_by_s = now[0]
    assert not deps.files.owned("o")  # from the moment on in which the clock is believed
    deps.store.sweep(now[0])
    deps.files.sweep(now[0])
    assert not deps.store.owned("o") and not folder.num_bytes()
    # Somebody's hand was in this one: it is as old as its beginning.
    record.stamps, record.created_at = {}, int(now[0])
    deps.store.path(record.id).mkdir()
    deps.store.save(record)
    deps.store.sweep(now[0])
    assert deps.store.owned("o")
    now[0] += folder.retention_s + 1
    deps.store.sweep(now[0])
    assert not deps.store.owned("o")


def test_states_follow_their_table() -> None:
    fields = {"id": "b", "owner": "", "endpoint": "e", "input_file_id": "f", "completion_window": "24h"}
    for status in BatchStatus:
        for to in BatchStatus:
            record = BatchRecord(**fields, metadata=None, created_at=1, created_ns=1, expires_at=9, status=status)  # type: ignore[arg-type]
            try:
                record.advance(to, 5.0)
            except InvalidTransition:
                assert record.status is status
            else:
                assert status not in ENDED and record.shown()[f"{to}_at"] == 5
