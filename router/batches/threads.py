"""`unhurried` calls what writes a batch's files on a thread, and leaves none behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


async def unhurried(
    function: Callable[[*Arguments], Result], *arguments: *Arguments, undo: Callable[[Result], object] | None = None
) -> Result:
    """Call what writes on a thread, and wait for its end even when cancelled: the next holder may begin after that.

    `undo` takes back then what it has made.
    """
    writing = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing])
        if undo is not None and writing.exception() is None:
            undo(writing.result())
        raise
