"""The keeper of a router's batches: an end that is due waits for nobody else's lines and for no model."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from kvferry.common.errors import RequestError
from kvferry.router.batches import keeper as keeper_module
from kvferry.router.batches.call import CallAnswer
from kvferry.router.batches.keeper import Keeper
from kvferry.router.batches.record import BatchRecord, BatchStatus
from kvferry.router.batches.run import RunDeps

from .test_batch_run import Caller, create, deps_of, output

SOON_S = 10.0


async def ended(keeper: Keeper, deps: RunDeps, batch_id: str) -> BatchRecord:
    """Look until the batch has ended."""
    async with asyncio.timeout(SOON_S):
        while (record := await asyncio.to_thread(deps.store.read, batch_id)) is None or not record.has_ended:
            keeper.look_now()
            await asyncio.sleep(0.001)
    return record


async def test_the_end_of_a_batch_does_not_wait_for_those_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "MAX_RUNS", 1)
    deps = deps_of(tmp_path, Caller(lambda name: CallAnswer(503, "r", b"{}")))
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
