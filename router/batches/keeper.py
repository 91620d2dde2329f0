"""The keeper runs the batches of a folder that no other router runs.

    each TICK_S: batches that have not ended ─> whose turn? ─> lock free? ─> run
                                             └> its window over, or asked to cancel? ─> end it
    each MEASURE_S, or less often where that takes long, while some run: is there room for answers?
    each SWEEP_S: what has expired is deleted

The next to run is the oldest of the owner of whom the fewest run. Who has some of them running begins another one only
while there are more places free: one owner alone gets half of them, the next one half of the others, and somebody who
comes then still finds one.

Neither window nor retention ends by a wall clock that was just set: it may be set right again, and nothing comes back.

Several routers may share a folder, also on several machines where its file system has locks: each batch is run by one,
and by another one a moment after that one has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import structlog

from ...common.errors import RequestError
from ..state.errors import log_failure
from .aside import SetAside
from .folder import Room
from .record import BatchRecord, BatchStatus
from .run import BatchRun, RunDeps
from .store import BatchLock
from .threads import unhurried

TICK_S = 1.0  # until a batch of a router that has ended is taken over, or a cancellation is seen by another one
SWEEP_S = 300.0
MEASURE_S = 5.0
MEASURE_SHARE = 0.02  # of the time, at most: it looks at every file, while others want the interpreter or the disk
MAX_RUNS = 16  # batches at once, and one that ends: each holds where its lines are in memory
SETTLE_S = 300.0  # after a jump of the wall clock, until it is believed
_JUMP_S = 60.0  # between two looks; smaller corrections move an end by as much
RETRY_S = 10.0  # before a batch goes on that ended in an error, as of a full disk

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Running:
    run: BatchRun
    task: asyncio.Task[None]


class _WallClock:
    """`_WallClock` compares the machine's time with a clock that nobody sets."""

    def __init__(self) -> None:
        self.now_s = 0.0  # at the last look, since 1970
        self._ahead_s: float | None = None  # of the other clock
        self._jumped_s = -math.inf  # on the other clock

    def look(self, wall_s: float, steady_s: float) -> None:
        ahead_s = wall_s - steady_s
        if self._ahead_s is not None and abs(ahead_s - self._ahead_s) > _JUMP_S:
            self._jumped_s = steady_s
            log.warning("wall_clock_jumped", by_s=round(ahead_s - self._ahead_s), believed_in_s=SETTLE_S)
        self.now_s, self._ahead_s = wall_s, ahead_s

    def is_believed(self, steady_s: float) -> bool:
        return steady_s >= self._jumped_s + SETTLE_S


class Keeper:
    """`Keeper` owns the runs of this router."""

    def __init__(self, deps: RunDeps) -> None:
        self._deps = deps
        self._running: dict[str, _Running] = {}
        self._not_before_s: dict[str, float] = {}  # of runs that failed, on the loop's clock
        self._set_aside = SetAside(deps.store)
        self._measuring: asyncio.Task[None] | None = None  # while some run
        self._news = asyncio.Event()
        self._clock = _WallClock()

    def look_now(self) -> None:
        """A batch was created, or somebody asked to cancel one."""
        self._news.set()

    @contextlib.asynccontextmanager
    async def keeping(self) -> AsyncIterator[None]:
        """Run batches while the block runs. What is under way at its end goes on with the next router."""
        task = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            tasks = [task, *(running.task for running in self._running.values())]
            if self._measuring is not None:
                tasks.append(self._measuring)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._deps.json.close()

    async def _keep(self) -> None:
        sweep_s, failed_by = 0.0, ""  # why the last look failed: told once
        while True:
            try:
                await self._look()
                if self._now_s() >= sweep_s and self._clock.is_believed(self._now_s()):
                    sweep_s = self._now_s() + SWEEP_S
                    await asyncio.to_thread(self._sweep, self._clock.now_s)
                failed_by = ""
            except Exception as error:  # whatever it is, batches are looked at again: nobody else would
                if repr(error) != failed_by:
                    log_failure("batches_folder_failed", error)
                failed_by = repr(error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._news.wait()
            self._news.clear()

    async def _look(self) -> None:
        self._clock.look(self._deps.now_s(), self._now_s())
        if self._clock.is_believed(self._now_s()):
            self._deps.files.hidden_by_s = self._clock.now_s
        records = await asyncio.to_thread(self._deps.store.unended)
        self._forget_all_but({record.id for record in records})
        await self._set_aside.probe(records, self._running.keys(), MAX_RUNS, self._now_s())
        waiting: dict[str, deque[BatchRecord]] = {}  # by owner, the oldest first
        for record in records:
            with self._only_this(record):
                end = await self._due_end(record)
                running = self._running.get(record.id)
                if running is None and end is None and self._may_run(record):
                    waiting.setdefault(record.owner, deque()).append(record)
                elif running is None and end is not None:
                    await self._begin(record, end)
                elif running is not None and end is not None:
                    running.run.stop(end)
        while (owner := self._next_owner(waiting)) is not None:
            record = waiting[owner].popleft()
            with self._only_this(record):
                await self._begin(record, None)

    def _forget_all_but(self, batch_ids: set[str]) -> None:
        self._set_aside.forget_all_but(batch_ids)
        for batch_id in self._not_before_s.keys() - batch_ids:
            del self._not_before_s[batch_id]

    @contextlib.contextmanager
    def _only_this(self, record: BatchRecord) -> Iterator[None]:
        """Leave a batch alone for a while whose own folder cannot be used: others go on."""
        try:
            yield
        except OSError as error:
            log_failure("batch_unreachable", error, batch_id=record.id)
            self._not_before_s[record.id] = self._now_s() + RETRY_S

    def _next_owner(self, waiting: dict[str, deque[BatchRecord]]) -> str | None:
        """Return whose batch is the next to run; None: nobody's."""
        num_running = Counter(running.run.record.owner for running in self._running.values())
        num_free = MAX_RUNS - len(self._running)
        owners = [owner for owner, records in waiting.items() if records and num_running[owner] < num_free]
        return min(owners, key=lambda owner: (num_running[owner], waiting[owner][0].created_ns), default=None)

    async def _due_end(self, record: BatchRecord) -> BatchStatus | None:
        """Return how the batch shall end now; None: it may go on."""
        if await asyncio.to_thread(self._deps.store.cancel_asked_s, record.id) is not None:
            return BatchStatus.CANCELLING
        is_over = self._clock.now_s >= record.expires_at and self._clock.is_believed(self._now_s())
        return BatchStatus.EXPIRED if is_over else None

    async def _begin(self, record: BatchRecord, end: BatchStatus | None) -> None:
        """Run a batch that nobody runs, or end it: that takes no model, and waits for nobody else's lines."""
        room = MAX_RUNS + (end is not None)
        if len(self._running) >= room or self._is_paused(record):
            return
        taken = await unhurried(self._take, record.id, undo=_give_back)
        if taken is None:
            return
        lock, current = taken
        run = BatchRun(current, self._deps, is_final=self._has_last_word(current))
        if end is not None:
            run.stop(end)
        task = asyncio.create_task(self._run(run))
        task.add_done_callback(lambda _: self._over(record.id, lock))  # also of a task that never came to run
        self._running[record.id] = _Running(run, task)
        self._measuring = self._measuring or asyncio.create_task(self._measure_on())

    def _take(self, batch_id: str) -> tuple[BatchLock, BatchRecord] | None:
        """Take a batch as its last holder left it; None: somebody runs it, or it has ended."""
        store, current = self._deps.store, None
        if (lock := store.lock(batch_id)) is None:
            return None
        try:
            current = store.read(batch_id)
        finally:
            if current is None or current.has_ended:
                lock.release()
        return None if current is None or current.has_ended else (lock, current)

    def _is_paused(self, record: BatchRecord) -> bool:
        return self._now_s() < self._not_before_s.get(record.id, 0.0)

    def _may_run(self, record: BatchRecord) -> bool:
        """Return whether its model is served here, and there is something to do for it."""
        if self._is_paused(record) or not self._is_served(record.model):
            return False
        return self._set_aside.may_go_on(record, self._is_served, self._now_s())

    def _has_last_word(self, record: BatchRecord) -> bool:
        """Tell whether a model that is not here is none: who took the batch knows, or all others have left it."""
        return record.taken_by == self._deps.life or self._set_aside.is_given_up(record, self._now_s())

    def _is_served(self, model: str | None) -> bool:
        try:
            self._deps.check_model(model)
        except RequestError:
            return False
        return True

    async def _run(self, run: BatchRun) -> None:
        batch_id = run.record.id
        try:
            await run.run()
        except Exception as error:  # a full disk, a lost helper: all that matters is on disk, and it begins anew
            log_failure("batch_failed", error, batch_id=batch_id)
            self._not_before_s[batch_id] = self._now_s() + RETRY_S
        else:
            self._not_before_s.pop(batch_id, None)
            if run.missing:
                self._set_aside.add(run.record, run.missing, self._now_s())
            if any(map(self._is_served, run.missing)):  # it has just come: each beginning reads the whole input
                self._not_before_s[batch_id] = self._now_s() + RETRY_S

    def _over(self, batch_id: str, lock: BatchLock) -> None:
        """Measure no more where none run, and forget what was measured: what is deleted meanwhile is not seen."""
        del self._running[batch_id]
        lock.release()
        if not self._running and self._measuring is not None:
            self._measuring.cancel()
            self._measuring = self._deps.store.folder.room = None

    async def _measure_on(self) -> None:
        while True:
            begin_s = self._now_s()
            try:
                await self._measure()
            except Exception as error:  # such as a folder that is out of reach for a while
                log_failure("batches_room_unknown", error)
            await asyncio.sleep(max(MEASURE_S, (self._now_s() - begin_s) / MEASURE_SHARE))

    async def _measure(self) -> None:
        folder = self._deps.store.folder
        room = Room(folder)
        await asyncio.to_thread(room.measure)
        folder.room = room
        if not folder.is_full:
            self._deps.has_room.set()

    def _sweep(self, now_s: float) -> None:
        self._deps.files.sweep(now_s)
        self._deps.store.sweep(now_s)
        self._deps.store.folder.sweep_parts()

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()


def _give_back(taken: tuple[BatchLock, BatchRecord] | None) -> None:
    if taken is not None:
        taken[0].release()
