"""A task that fails is told of; one that is ended is not."""

from __future__ import annotations

import asyncio

from kvferry.worker.tasks import begin


async def _fail() -> None:
    raise ValueError("no")


async def test_a_failure_is_told_and_an_end_that_was_asked_for_is_not() -> None:
    told: list[BaseException] = []
    unhandled: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unhandled.append(context))
    tasks = [begin(work, told.append) for work in (_fail(), asyncio.sleep(600))]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(error) for error in told] == ["no"] and not unhandled
