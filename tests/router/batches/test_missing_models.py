"""Lines that name a model which is not here: an adapter that another router has, or that is loaded again later."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from kvferry.common.errors import RequestError
from kvferry.router.batches import aside as aside_module
from kvferry.router.batches import keeper as keeper_module
from kvferry.router.batches import run
from kvferry.router.batches.aside import GIVE_UP_S, SetAside
from kvferry.router.batches.call import CallAnswer
from kvferry.router.batches.keeper import Keeper
from kvferry.router.batches.record import BatchRecord, BatchStatus
from kvferry.router.batches.run import RunDeps

from .batch_server import line
from .test_batch_keeper import SOON_S, ended
from .test_batch_run import NO_ROOM, Caller, create_of, deps_of, output, run_of

NAMES = ["toy", "mine", "toy", "mine", "mine", "toy"]


class Models:
    """The models of one router; its caller answers as its endpoints do."""

    def __init__(self, path: Path, *served: str, slots: int = 2, now_s: float = 1000.0) -> None:
        self.served = set(served)
        self.now_s = now_s
        self.caller = Caller(self._before)
        self.deps = replace(deps_of(path, self.caller, lambda: self.now_s, slots), check_model=self._check)

    def _check(self, name: str | None) -> None:
        if name is not None and name not in self.served:
            raise RequestError(f"the model {name} does not exist", code="model_not_found", status=404)

    def _before(self, prompt: str) -> CallAnswer | None:
        if NAMES[int(prompt)] in self.served:
            return None
        return CallAnswer(404, "r", b'{"error": {"code": "model_not_found"}}', code="model_not_found")


def create(deps: RunDeps, *, taken_by: str = "", begun: bool = True) -> str:
    lines = [line(str(number), model=name, prompt=str(number)) for number, name in enumerate(NAMES)]
    batch_id = create_of(deps, lines, taken_by=taken_by)
    if begun:
        record = stored(deps, batch_id)
        record.advance(BatchStatus.IN_PROGRESS, 1000.0)
        deps.store.save(record)
    return batch_id


def stored(deps: RunDeps, batch_id: str) -> BatchRecord:
    record = deps.store.read(batch_id)
    assert record is not None
    return record


async def set_aside(keeper: Keeper, deps: RunDeps, batch_id: str) -> BatchRecord:
    """Look until the batch waits."""
    async with asyncio.timeout(SOON_S):
        while keeper._running or not stored(deps, batch_id).errors:
            keeper.look_now()
            await asyncio.sleep(0.001)
    return stored(deps, batch_id)


async def look_often(keeper: Keeper) -> None:
    for _ in range(30):
        keeper.look_now()
        await asyncio.sleep(0.002)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "FLUSH_EVERY_S", 0.001)
    monkeypatch.setattr(keeper_module, "RETRY_S", 0.01)


async def test_lines_of_an_adapter_wait_until_it_is_loaded_again(tmp_path: Path) -> None:
    models = Models(tmp_path, "toy")
    batch_id = create(models.deps)
    keeper = Keeper(models.deps)
    async with keeper.keeping():
        record = await set_aside(keeper, models.deps, batch_id)
        assert (record.status, record.completed, record.failed) == (BatchStatus.IN_PROGRESS, 3, 0)
        assert [(fault.code, fault.param) for fault in record.errors] == [("model_not_found", "body.model")]
        assert "'mine'" in record.errors[0].message
        num_asked = len(models.caller.asked)
        await look_often(keeper)
        assert len(models.caller.asked) == num_asked <= 3 + 2  # no more of them than there are slots
        other = create_of(models.deps, [line("0")])
        assert (await ended(keeper, models.deps, other)).completed == 1
        models.served.add("mine")
        record = await ended(keeper, models.deps, batch_id)
    assert (record.status, record.completed, record.failed, record.errors) == (BatchStatus.COMPLETED, 6, 0, [])
    assert [each["custom_id"] for each in output(models.deps, record.output_file_id)] == list("012345")


async def test_a_router_that_has_the_model_takes_them(tmp_path: Path) -> None:
    without, has = Models(tmp_path, "toy"), Models(tmp_path, "mine", "toy")
    batch_id = create(without.deps)
    one, two = Keeper(without.deps), Keeper(has.deps)
    async with one.keeping():
        await set_aside(one, without.deps, batch_id)
        async with two.keeping():
            record = await ended(two, has.deps, batch_id)
    assert record.completed == 6 and sorted(has.caller.asked) == ["1", "3", "4"]


@pytest.mark.parametrize("end", [BatchStatus.EXPIRED, BatchStatus.CANCELLED])
@pytest.mark.parametrize("begun", [False, True])
async def test_one_that_waits_ends(tmp_path: Path, end: BatchStatus, begun: bool) -> None:
    models = Models(tmp_path, "toy", now_s=1990.0)
    batch_id = create(models.deps, begun=begun)
    keeper = Keeper(models.deps)
    async with keeper.keeping():
        await set_aside(keeper, models.deps, batch_id)
        if end is BatchStatus.CANCELLED:
            models.deps.store.ask_to_cancel(batch_id, "o")
        else:
            models.now_s = 2000.0
        record = await ended(keeper, models.deps, batch_id)
    assert record.status is end and record.errors[0].code == "model_not_found"
    assert (record.total, record.completed, record.failed) == ((6, 3, 3) if begun else (6, 0, 6))


async def test_a_router_that_did_not_take_a_batch_does_not_fail_it_for_a_model(tmp_path: Path) -> None:
    taker, other = Models(tmp_path, "mine", "toy"), Models(tmp_path, "toy")
    batch_id = create(taker.deps, taken_by=taker.deps.life, begun=False)
    one, two = Keeper(taker.deps), Keeper(other.deps)
    async with two.keeping():
        record = await set_aside(two, other.deps, batch_id)
        assert record.status is BatchStatus.VALIDATING and not other.caller.asked
        async with one.keeping():
            record = await ended(one, taker.deps, batch_id)
    assert (record.status, record.completed, record.errors) == (BatchStatus.COMPLETED, 6, [])


async def test_what_a_router_has_set_aside_and_another_has_brought_further_is_looked_at_again(tmp_path: Path) -> None:
    models = Models(tmp_path, "toy")
    batch_id = create(models.deps, begun=False)
    keeper = Keeper(models.deps)
    async with keeper.keeping():
        record = await set_aside(keeper, models.deps, batch_id)
        assert record.status is BatchStatus.VALIDATING
        record.advance(BatchStatus.IN_PROGRESS, 1000.0)  # by a router that has ended since
        models.deps.store.save(record)
        async with asyncio.timeout(SOON_S):
            while stored(models.deps, batch_id).completed != 3:
                keeper.look_now()
                await asyncio.sleep(0.001)


async def test_who_took_a_batch_says_at_once_that_a_model_is_none(tmp_path: Path) -> None:
    models = Models(tmp_path, "toy")
    batch_id = create(models.deps, taken_by=models.deps.life, begun=False)
    keeper = Keeper(models.deps)
    async with keeper.keeping():
        record = await ended(keeper, models.deps, batch_id)
    assert record.status is BatchStatus.FAILED
    assert [(fault.code, fault.line) for fault in record.errors] == [("model_not_found", each) for each in (2, 4, 5)]


@pytest.mark.parametrize("taken_by", ["", "a life before a restart"])
async def test_a_model_that_nobody_has_fails_a_batch_whose_taker_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken_by: str
) -> None:
    models = Models(tmp_path, "toy")
    batch_id = create(models.deps, taken_by=taken_by, begun=False)
    keeper = Keeper(models.deps)
    async with keeper.keeping():
        record = await set_aside(keeper, models.deps, batch_id)
        await look_often(keeper)
        assert record.status is BatchStatus.VALIDATING and "fails" in record.errors[0].message
        monkeypatch.setattr(aside_module, "GIVE_UP_S", 0.0)
        record = await ended(keeper, models.deps, batch_id)
    assert record.status is BatchStatus.FAILED and not models.caller.asked
    assert [(fault.code, fault.line) for fault in record.errors] == [("model_not_found", each) for each in (2, 4, 5)]


async def test_a_batch_that_has_begun_is_not_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside_module, "GIVE_UP_S", 0.0)
    models = Models(tmp_path, "toy")
    batch_id = create(models.deps)
    keeper = Keeper(models.deps)
    async with keeper.keeping():
        await set_aside(keeper, models.deps, batch_id)
        num_asked = len(models.caller.asked)
        await look_often(keeper)
        assert stored(models.deps, batch_id).status is BatchStatus.IN_PROGRESS
        assert len(models.caller.asked) == num_asked
        models.served.add("mine")
        assert (await ended(keeper, models.deps, batch_id)).completed == 6


@pytest.mark.parametrize(("owner", "max_runs", "has_place"), [("o", 2, False), ("o", 3, True), ("p", 2, True)])
async def test_a_batch_waits_for_others_that_have_no_place(
    tmp_path: Path, owner: str, max_runs: int, has_place: bool
) -> None:
    """Somebody runs one batch of `owner`, and may have the model that a batch of "o" lacks here."""
    deps = Models(tmp_path, "toy").deps
    record = stored(deps, create(deps, begun=False))
    theirs = stored(deps, create_of(deps, [line("0")], owner))
    ours = [stored(deps, create_of(deps, [line("0")])) for _ in range(3)]
    locks = [deps.store.lock(each.id) for each in (theirs, *ours)]
    running = {each.id for each in ours}
    aside = SetAside(deps.store)
    aside.add(record, ["mine"], 0.0)
    await aside.probe([record, theirs, *ours], running, max_runs, 100.0)
    assert aside.is_given_up(record, GIVE_UP_S) is has_place
    for lock in locks:
        assert lock is not None
        lock.release()
    await aside.probe([record, theirs, *ours], set(), max_runs, 200.0)
    assert not aside.is_given_up(record, GIVE_UP_S - 1.0) and aside.is_given_up(record, 100.0 + GIVE_UP_S)


async def test_a_batch_whose_model_is_back_tells_of_it_no_more(tmp_path: Path) -> None:
    models = Models(tmp_path, "toy")
    batch_id = create(models.deps)
    keeper = Keeper(models.deps)
    async with keeper.keeping():
        await set_aside(keeper, models.deps, batch_id)
    deps = deps_of(tmp_path, Caller(lambda name: NO_ROOM))
    running = asyncio.create_task(run_of(deps, batch_id).run())
    async with asyncio.timeout(SOON_S):
        while (await asyncio.to_thread(stored, deps, batch_id)).errors:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert stored(deps, batch_id).status is BatchStatus.IN_PROGRESS
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
