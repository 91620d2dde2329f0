"""Replaces a decode worker's transfer agents on all of its ranks at once, each on its own transfer thread.

    start(generation) ─┬─> our TransferThread.rotate ────────────> on_rank ─┐
                       └─(Rotate)─> followers ─(Rotated)─> on_rank ─────────┴─> done(regions), or done(None)

Only when every rank has answered is it over: until then bytes may still come in to one that has not begun.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from ..common.errors import TransferError
from ..common.messages import RegionInfo, encode
from ..transfer.protocol.rank_messages import Rotate, Rotated
from ..transfer.thread import TransferThread

log = structlog.get_logger(__name__)


class Agents:
    """`start` from any thread; answers come on the transfer thread and the rank group's."""

    def __init__(
        self,
        thread: TransferThread,
        tp_size: int,
        *,
        broadcast: Callable[[bytes], None] | None,
        done: Callable[[tuple[RegionInfo, ...] | None], None],
    ) -> None:
        """`done` gets the regions of all ranks, on the thread of the last answer; None: some rank has no agent."""
        self._thread = thread
        self._tp_size = tp_size
        self._broadcast = broadcast
        self._done = done
        self._lock = threading.Lock()
        self._generation = 0
        self._answers: dict[int, Rotated] = {}  # by rank

    def start(self, generation: int) -> None:
        with self._lock:
            self._generation = generation
            self._answers = {}
        if self._broadcast is not None:
            self._broadcast(encode(Rotate(generation=generation)))
        self._thread.rotate(generation, lambda result: self.on_rank(rotated(0, generation, result)))

    def on_rank(self, answer: Rotated) -> None:
        with self._lock:
            if answer.generation != self._generation:
                return  # of a try that has failed elsewhere
            self._answers[answer.rank] = answer
            if len(self._answers) < self._tp_size:
                return
            answers = [self._answers[rank] for rank in range(self._tp_size)]
        regions = tuple(found.region for found in answers if found.region is not None)
        failures = [found.reason for found in answers if found.region is None]
        if failures:
            log.warning("transfer_agents_not_replaced", generation=answer.generation, reason=failures[0])
        self._done(None if failures else regions)


def rotated(rank: int, generation: int, result: RegionInfo | TransferError) -> Rotated:
    """One rank's answer."""
    if isinstance(result, TransferError):
        return Rotated(rank=rank, generation=generation, reason=str(result))
    return Rotated(rank=rank, generation=generation, region=result)
