"""Replaces a decode worker's transfer agents on all of its ranks at once, each on its own transfer thread.

    start(generation) ─each─> RankAgent.rotate of every rank ─(Rotated)─> on_rank ─> done(regions), or done(None)

Only when every rank has answered is it over: until then bytes may still come in to one that has not begun.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from ..common.errors import TransferError
from ..transfer.protocol.rank_calls import Each, Gather
from ..transfer.protocol.rank_messages import Rotated
from ..transfer.thread import TransferThread
from ..wire.grants import RegionInfo

log = structlog.get_logger(__name__)


class RankAgent:
    """One rank's agent, through which others write to its pages."""

    def __init__(self, rank: int, thread: TransferThread, answer: Callable[[Rotated], None]) -> None:
        """`answer` is called on the transfer thread."""
        self._rank = rank
        self._thread = thread
        self._answer = answer

    def rotate(self, generation: int) -> None:
        """Replace it, and answer."""
        self._thread.rotate(generation, lambda result: self._answer(rotated(self._rank, generation, result)))


class Agents:
    """`start` from any thread; answers come on the transfer thread and the rank group's."""

    def __init__(
        self,
        each: Each,
        thread: TransferThread,
        tp_size: int,
        *,
        done: Callable[[tuple[RegionInfo, ...] | None], None],
    ) -> None:
        """`done` gets the regions of all ranks, on the thread of the last answer; None: some rank has no agent."""
        self._each = each
        self._own = RankAgent(0, thread, self.on_rank)
        self._tp_size = tp_size
        self._done = done
        self._lock = threading.Lock()
        self._generation = 0
        self._are_missing = False  # some rank could make none at the last try
        self._answers: Gather[Rotated] = Gather(tp_size)

    def start(self, generation: int) -> None:
        with self._lock:
            self._generation = generation
            self._answers = Gather(self._tp_size)
        self._each(self._own.rotate, generation)

    def on_rank(self, answer: Rotated) -> None:
        with self._lock:
            if answer.generation != self._generation:
                return  # of a try that has failed elsewhere
            answers = self._answers.add(answer.generation, answer)
        if answers is None:
            return
        answers.sort(key=lambda found: found.rank)
        regions = tuple(found.region for found in answers if found.region is not None)
        failures = [found.reason for found in answers if found.region is None]
        if failures:
            tell = log.debug if self._are_missing else log.warning  # one line for an outage, however long it lasts
            tell("transfer_agents_not_replaced", generation=answer.generation, reason=failures[0])
        elif self._are_missing:
            log.info("transfer_agents_are_back", generation=answer.generation)
        self._are_missing = bool(failures)
        self._done(None if failures else regions)


def rotated(rank: int, generation: int, result: RegionInfo | TransferError) -> Rotated:
    """One rank's answer."""
    if isinstance(result, TransferError):
        return Rotated(rank=rank, generation=generation, reason=str(result))
    return Rotated(rank=rank, generation=generation, region=result)
