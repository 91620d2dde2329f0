"""A task of a worker's network thread runs to the worker's end; where it fails, the worker ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine


def begin(work: Coroutine[object, object, None], on_failure: Callable[[BaseException], None]) -> asyncio.Task[None]:
    """Begin work of which `on_failure` hears if it raises: whoever keeps a task and waits for none hears nothing."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            on_failure(error)

    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(ended)
    return task
