"""The keeper of a router's batches: an end that is due waits for nobody else's lines, for no model and for no input."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from kvferry.common.errors import RequestError
from kvferry.router.batches import keeper as keeper_module
from kvferry.router.batches.call import CallAnswer
from kvferry.router.batches.keeper import Keeper
from kvferry.router.batches.record import BatchRecord, BatchStatus
from kvferry.router.batches.run import BatchRun, RunDeps
from kvferry.router.batches.store import BatchLock

from .test_batch_run import NO_ROOM, Caller, create, deps_of, output, run_of

SOON_S = 10.0


async def ended(keeper: Keeper, deps: RunDeps, batch_id: str) -> BatchRecord:
    """Look until the batch has ended, and its place is free."""

    async def look() -> BatchRecord | None:
        keeper.look_now()
        await asyncio.sleep(0.001)
        return None if batch_id in keeper._running else await asyncio.to_thread(deps.store.read, batch_id)

    async with asyncio.timeout(SOON_S):
        while (record := await look()) is None or not record.has_ended:
            pass
    return record


async def test_the_end_of_a_batch_does_not_wait_for_those_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "MAX_RUNS", 1)
    deps = deps_of(tmp_path, Caller(lambda name: NO_ROOM))
    one, two = create(deps, 2), create(deps, 2)
    keeper = Keeper(deps)
    async with keeper.keeping():
        while not keeper._running:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        [first] = keeper._running
        other = two if first == one else one
        deps.store.ask_to_cancel(other, "o")
        assert (await ended(keeper, deps, other)).status is BatchStatus.CANCELLED
        assert first in keeper._running


async def test_what_a_thread_takes_as_the_keeper_ends_is_the_next_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deps = deps_of(tmp_path, Caller())
    batch_id, lock = create(deps, 1), deps.store.lock
    is_taking, may_take, has_taken = threading.Event(), threading.Event(), threading.Event()

    def slow(batch_id: str) -> BatchLock | None:
        is_taking.set()
        may_take.wait(SOON_S)
        taken = lock(batch_id)
        has_taken.set()
        return taken

    monkeypatch.setattr(deps.store, "lock", slow)
    async with Keeper(deps).keeping():
        await asyncio.to_thread(is_taking.wait, SOON_S)
        asyncio.get_running_loop().call_later(0.01, may_take.set)
    await asyncio.to_thread(has_taken.wait, SOON_S)
    free = lock(batch_id)
    assert free is not None
    free.release()


async def test_a_wall_clock_that_is_set_right_again_ends_and_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine's clock goes to the next month and back; what it says for longer is believed."""
    monkeypatch.setattr(keeper_module, "SWEEP_S", 0.0)
    wall, has_room, num_looks = [1500.0], False, 0
    caller = Caller(lambda name: None if has_room else NO_ROOM)
    deps = deps_of(tmp_path, caller, lambda: wall[0])
    batch_id, old_id = create(deps, 2), create(deps, 1)
    deps.store.ask_to_cancel(old_id, "o")
    unended = deps.store.unended

    def counted() -> list[BatchRecord]:
        nonlocal num_looks
        num_looks += 1
        return unended()

    monkeypatch.setattr(deps.store, "unended", counted)
    keeper = Keeper(deps)

    async def look(times: int) -> None:
        end = num_looks + times
        async with asyncio.timeout(SOON_S):
            while num_looks < end:
                keeper.look_now()
                await asyncio.sleep(0.001)

    async with keeper.keeping():
        await ended(keeper, deps, old_id)
        wall[0] += 30 * 86400.0
        await look(4)
        record = deps.store.read(batch_id)
        assert record is not None and record.status is BatchStatus.IN_PROGRESS
        assert deps.store.read(old_id) is not None and len(list(deps.store.folder.files.glob("*.data"))) == 3
        assert len(shown := deps.files.owned("o")) == 3  # they are found, too
        assert [deps.files.get(each.id, "o") for each in shown] == shown
        wall[0] -= 30 * 86400.0
        has_room = True
        assert (await ended(keeper, deps, batch_id)).status is BatchStatus.COMPLETED
        monkeypatch.setattr(keeper_module, "SETTLE_S", 0.0)
        wall[0] += 30 * 86400.0
        await look(4)
        assert deps.store.read(old_id) is None and not list(deps.store.folder.files.glob("*.data"))
        assert deps.files.owned("o") == []


async def test_a_batch_is_cancelled_without_its_model(tmp_path: Path) -> None:
    def refuse(name: str | None) -> None:
        raise RequestError(f"{name} is not served")

    caller = Caller()
    deps = replace(deps_of(tmp_path, caller), check_model=refuse)
    batch_id = create(deps, 2)
    keeper = Keeper(deps)
    async with keeper.keeping():
        deps.store.ask_to_cancel(batch_id, "o")
        record = await ended(keeper, deps, batch_id)
    assert record.status is BatchStatus.CANCELLED and (record.total, record.failed) == (2, 2)
    assert not caller.asked and len(output(deps, record.error_file_id)) == 2


@pytest.mark.parametrize("end", [BatchStatus.FAILED, BatchStatus.CANCELLED, BatchStatus.EXPIRED])
async def test_a_batch_whose_input_is_gone_ends(tmp_path: Path, end: BatchStatus) -> None:
    caller = Caller()
    deps = deps_of(tmp_path, caller, lambda: 2000.0 if end is BatchStatus.EXPIRED else 1000.0)
    deps.store.input(batch_id := create(deps, 2)).unlink()
    if end is BatchStatus.CANCELLED:
        deps.store.ask_to_cancel(batch_id, "o")
    keeper = Keeper(deps)
    async with keeper.keeping():
        record = await ended(keeper, deps, batch_id)
    assert record.status is end and not caller.asked and not deps.store.num_unended("o")
    assert [(fault.code, "is gone" in fault.message) for fault in record.errors] == [("input_gone", True)]


@pytest.mark.parametrize(
    ("stopped_by", "end"),
    [
        (None, BatchStatus.FAILED),
        (BatchStatus.CANCELLING, BatchStatus.CANCELLED),
        (BatchStatus.EXPIRED, BatchStatus.EXPIRED),
    ],
)
async def test_what_was_answered_before_the_input_was_gone_is_kept(
    tmp_path: Path, stopped_by: BatchStatus | None, end: BatchStatus
) -> None:
    deps = deps_of(tmp_path, Caller())
    batch_id = create(deps, 3)

    def lose_input(name: str) -> CallAnswer | None:
        deps.store.input(batch_id).unlink(missing_ok=True)
        return None

    first = run_of(replace(deps, caller=Caller(lose_input), slots=asyncio.Semaphore(1)), batch_id)
    with pytest.raises(ExceptionGroup):  # the next line cannot be read
        await first.run()
    again = run_of(deps, batch_id)
    if stopped_by is not None:
        again.stop(stopped_by)
    await again.run()
    record = again.record
    assert record.status is end and record.errors[0].code == "input_gone"
    assert (record.total, record.completed, record.failed) == (3, 1, 2)
    assert [answer["custom_id"] for answer in output(deps, record.output_file_id)] == ["0"]
    assert record.error_file_id is None


async def test_a_batch_whose_lines_all_have_answers_needs_its_input_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deps = deps_of(tmp_path, Caller())
    first = run_of(deps, batch_id := create(deps, 2))

    async def full(self: BatchRun, journal: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(BatchRun, "_finalize", full)
        with pytest.raises(OSError, match="no space"):
            await first.run()
    deps.store.input(batch_id).unlink()
    again = run_of(deps, batch_id)
    await again.run()
    assert again.record.status is BatchStatus.COMPLETED and not again.record.errors
    assert len(output(deps, again.record.output_file_id)) == 2


def _hold(name: str) -> CallAnswer | None:
    return NO_ROOM


async def _run_by_owner(keeper: Keeper, expected: dict[str, int]) -> None:
    """Look until so many of each owner run, and on: no more are begun."""

    async def look() -> Counter[str]:
        keeper.look_now()
        await asyncio.sleep(0.002)
        return Counter(running.run.record.owner for running in keeper._running.values())

    async with asyncio.timeout(SOON_S):
        while await look() != expected:
            pass
        for _ in range(50):
            assert await look() == expected


async def test_somebody_who_comes_later_finds_a_place_beside_whoever_has_many(tmp_path: Path) -> None:
    deps = deps_of(tmp_path, Caller(_hold))
    for number in range(20):
        create(deps, 1, "many", 1000 + number)
    keeper = Keeper(deps)
    async with keeper.keeping():
        await _run_by_owner(keeper, {"many": 8})
        for number in range(5):
            create(deps, 1, "some", 2000 + number)
        create(deps, 1, "one", 3000)
        await _run_by_owner(keeper, {"many": 8, "some": 4, "one": 1})
        create(deps, 1, "late", 4000)
        await _run_by_owner(keeper, {"many": 8, "some": 4, "one": 1, "late": 1})


async def test_those_who_come_together_have_as_many_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "MAX_RUNS", 8)
    deps = deps_of(tmp_path, Caller(_hold))
    for number in range(5):
        create(deps, 1, "older", 1000 + number)
        create(deps, 1, "younger", 2000 + number)
    keeper = Keeper(deps)
    async with keeper.keeping():
        await _run_by_owner(keeper, {"older": 3, "younger": 3})


async def test_a_place_that_is_free_goes_to_whoever_has_the_fewest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "MAX_RUNS", 2)
    deps = deps_of(tmp_path, Caller(_hold))
    first = [create(deps, 1, "a", 1000 + number) for number in range(5)]
    later = [create(deps, 1, "b", 2000 + number) for number in range(2)]
    keeper = Keeper(deps)
    async with keeper.keeping():
        await _run_by_owner(keeper, {"a": 1, "b": 1})
        assert keeper._running.keys() == {first[0], later[0]}
        deps.store.ask_to_cancel(later[0], "b")
        await ended(keeper, deps, later[0])
        await _run_by_owner(keeper, {"a": 1, "b": 1})
        assert keeper._running.keys() == {first[0], later[1]}
        deps.store.ask_to_cancel(first[0], "a")
        await ended(keeper, deps, first[0])
        await _run_by_owner(keeper, {"a": 1, "b": 1})
        assert keeper._running.keys() == {first[1], later[1]}


def test_a_batch_that_cannot_be_locked_now_holds_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deps = deps_of(tmp_path, Caller())
    batch_id, before = create(deps, 1), len(os.listdir("/proc/self/fd"))

    def fails(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", fails)
        with pytest.raises(OSError, match="No locks"):
            deps.store.lock(batch_id)
    assert len(os.listdir("/proc/self/fd")) == before
    lock = deps.store.lock(batch_id)
    assert lock is not None and deps.store.lock(batch_id) is None
    lock.release()
