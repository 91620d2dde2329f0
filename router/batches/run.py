"""One batch, from its input to its files, by the router that holds its lock.

    validate ─> ask every line that the journal lacks ─> write the files ─> ended
        │            ^ slots, shared by all batches of this router
        │            │ and as long as the folder has room
        └────────────┴─> set aside, where lines name models that only another router has, or a later load

It may be killed anywhere: the record says which stage to begin with, the journal which lines are done, and the files
that it writes have names that do not depend on the try.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import structlog

from ...common.errors import RequestError
from ..helpers.json_parser import JsonParser
from . import faults
from .call import LineCaller
from .files import FileStore
from .input import CheckModel, InputLine, read_body, read_input
from .journal import FinishedLine, Journal
from .outputs import line_of, write_files
from .record import BatchRecord, BatchStatus, InputFault
from .store import BatchStore
from .threads import unhurried
from .verdict import MODEL_NOT_FOUND, Verdict, verdict_on

FLUSH_EVERY_S = 0.2  # answers are synced together: what is not synced is asked again after a power failure
_TELL_EVERY_S = 1.0  # counts in the record
MAX_TRIES = 3  # of a line that the server could not answer; one that found no room is tried until the window is over
_PAUSE_S, _MAX_PAUSE_S = 0.5, 30.0  # before another try; it doubles
_END_OF = {BatchStatus.FINALIZING: BatchStatus.COMPLETED, BatchStatus.CANCELLING: BatchStatus.CANCELLED}

log = structlog.get_logger(__name__)


@dataclass(slots=True, frozen=True)
class RunDeps:
    """The parts that all batches of a router share."""

    store: BatchStore
    files: FileStore
    caller: LineCaller
    json: JsonParser
    check_model: CheckModel
    tenant_of: Callable[[str], bytes]  # by the owner's name on disk
    slots: asyncio.Semaphore
    has_room: asyncio.Event = field(default_factory=asyncio.Event)  # set when the folder was found to have room
    now_s: Callable[[], float] = time.time
    pause_s: float = _PAUSE_S
    on_line: Callable[[bool], None] = lambda is_ok: None  # for metrics
    life: str = field(default_factory=lambda: secrets.token_hex(8))  # of this router: it knows what it took itself


@dataclass(slots=True)
class BatchRun:
    """`BatchRun` owns the record, the journal and the lines under way."""

    record: BatchRecord
    deps: RunDeps
    is_final: bool = False  # models that are missing when it begins are wrong: no other router has them
    missing: set[str | None] = field(default_factory=set)  # models of lines, without which it cannot go on here
    _lines: list[InputLine] = field(default_factory=list)
    _finished: list[FinishedLine] = field(default_factory=list)  # not in the journal yet
    _has_news: asyncio.Event = field(default_factory=asyncio.Event)  # for the journal, or for the record
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _stopped_by: BatchStatus | None = None  # CANCELLING or EXPIRED
    _is_input_gone: bool = False  # somebody's hand: there are no `_lines`, and no more can be asked
    _told_s: float = -math.inf  # when the record was last written, on the loop's clock

    def stop(self, by: BatchStatus) -> None:
        """Ask no more lines. Idempotent."""
        self._stopped_by = self._stopped_by or by
        self._stop.set()

    async def run(self) -> None:
        """Bring the batch to its end, or as far as it comes without the `missing` models.

        Raises OSError where the disk fails, CapacityError where no helper answers.
        """
        record = self.record
        if record.status is BatchStatus.VALIDATING and not await self._validate():
            return
        if not self._lines:
            self._lines, _ = await self._read(_any_model)  # it was served when the batch began
        journal = await asyncio.to_thread(Journal, self.deps.store.journal(record.id))
        self._count(journal)
        if record.status in (BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING):  # of the latter all should be there
            await self._ask_all(journal)
        if self.missing and self._stopped_by is None:
            await self._set_aside()
        else:
            await self._finalize(journal)

    # --- validating -----------------------------------------------------------------------------------------

    async def _validate(self) -> bool:
        """Return whether there is something to do."""
        record = self.record
        is_asked = self._stopped_by is None  # else its lines need no model
        self._lines, found = await self._read(self._check_model if is_asked else _any_model)
        if self.missing and not self.is_final and {each.code for each in found} == {MODEL_NOT_FOUND}:
            await self._set_aside()
            return False
        if found and not (self._is_input_gone and self._stopped_by):  # a stopped one has its own end
            record.errors = found
            await self._end(BatchStatus.FAILED)
            return False
        if self._stopped_by is None:
            record.total, record.errors = len(self._lines), []
            await self._advance(BatchStatus.IN_PROGRESS)
        return True

    def _check_model(self, name: str | None) -> None:
        try:
            self.deps.check_model(name)
        except RequestError as error:
            if error.code == MODEL_NOT_FOUND:
                self.missing.add(name)
            raise

    async def _set_aside(self) -> None:
        """Tell what the batch waits for: its lines are left to who has it."""
        record = self.record
        record.errors = faults.missing(self.missing, has_begun=record.status is not BatchStatus.VALIDATING)
        log.warning("batch_waits_for_models", batch_id=record.id, why=record.errors[0].message)
        await unhurried(self.deps.store.save, record)

    async def _read(self, check_model: CheckModel) -> tuple[list[InputLine], list[InputFault]]:
        store, record = self.deps.store, self.record
        try:
            return await read_input(store.input(record.id), record.endpoint, self.deps.json, check_model)
        except FileNotFoundError:  # it does not come back: another try would end here too
            self._is_input_gone = True
            return [], [faults.GONE]

    # --- asking ---------------------------------------------------------------------------------------------

    async def _ask_all(self, journal: Journal) -> None:
        """Ask what has no answer, until all have one whose models are here, or the batch is stopped."""
        if self._stopped_by is None:
            self._tell([])
        asking = asyncio.create_task(self._ask_rest(journal))
        writing = asyncio.create_task(self._write_on(journal))
        stopping = asyncio.create_task(self._stop.wait())
        tasks = (asking, writing, stopping)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            try:
                if self._finished:
                    journal.append(self._finished)  # at once: this task may be at its end
            finally:
                self._drop_finished(len(self._finished))
        for task in (asking, writing):
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        self._count(journal)

    async def _ask_rest(self, journal: Journal) -> None:
        async with asyncio.TaskGroup() as under_way:
            for number, line in enumerate(self._lines):
                if number in journal.places or line.model in self.missing:
                    continue
                await self._take_slot()
                if line.model in self.missing:  # an earlier line has found out meanwhile
                    self.deps.slots.release()
                else:
                    under_way.create_task(self._ask(number)).add_done_callback(lambda _: self.deps.slots.release())

    async def _take_slot(self) -> None:
        """Wait for a slot while the folder has room for answers. Those of lines under way are written all the same."""
        slots, folder = self.deps.slots, self.deps.store.folder
        await slots.acquire()
        while folder.is_full:
            slots.release()
            await self._wait_for_room()
            await slots.acquire()

    async def _wait_for_room(self) -> None:
        folder, record = self.deps.store.folder, self.record
        self._tell([faults.FULL])
        log.warning("batch_waits_for_room", batch_id=record.id, max_bytes=folder.max_bytes)
        while folder.is_full:
            self.deps.has_room.clear()
            await self.deps.has_room.wait()
        self._tell([])

    def _tell(self, errors: list[InputFault]) -> None:
        """Have it written what the lines wait for, with no answer to come first. `_write_on` alone saves meanwhile."""
        if errors != self.record.errors:
            self.record.errors, self._told_s = errors, -math.inf
            self._has_news.set()

    async def _ask(self, number: int) -> None:
        """Ask one line until there is an answer that stays."""
        deps, line, record = self.deps, self._lines[number], self.record
        body = await asyncio.to_thread(read_body, deps.store.input(record.id), line)
        tries, pause_s = 0, deps.pause_s
        while True:
            answer = await deps.caller.ask(record.endpoint, body, deps.tenant_of(record.owner))
            verdict = verdict_on(answer)
            if verdict is Verdict.NO_MODEL:
                self.missing.add(line.model)
                return
            tries += verdict is Verdict.FAILED
            if verdict is Verdict.FINAL or tries >= MAX_TRIES:
                break
            await asyncio.sleep(max(pause_s, answer.retry_after_s or 0.0))
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
        is_ok = answer.status < 400
        finished = FinishedLine(number, is_ok, line_of(line, answer))
        self._finished.append(finished)
        deps.store.folder.add_answer(finished.answer)
        self._has_news.set()
        deps.on_line(is_ok)

    async def _write_on(self, journal: Journal) -> None:
        """Write answers into the journal as they come, and into the record how far it is."""
        while True:
            await self._has_news.wait()
            await asyncio.sleep(FLUSH_EVERY_S)
            self._has_news.clear()
            if group := list(self._finished):
                await unhurried(journal.append, group)
                self._drop_finished(len(group))
            now_s = asyncio.get_running_loop().time()  # no wall clock's, which may be set back
            if now_s - self._told_s >= _TELL_EVERY_S:
                self._told_s = now_s
                self._count(journal)
                await unhurried(partial(self.deps.store.save, lasts=False), self.record)

    def _drop_finished(self, number: int) -> None:
        """Forget the first ones: the journal has them, or nobody will."""
        self.deps.store.folder.drop_answers(each.answer for each in self._finished[:number])
        del self._finished[:number]

    def _count(self, journal: Journal) -> None:
        if not self._is_input_gone:  # else the record knows it, from when the input was checked
            self.record.total = len(self._lines)
        self.record.completed = journal.num_ok
        self.record.failed = len(journal.places) - journal.num_ok
        self.record.usage = journal.usage

    # --- its end --------------------------------------------------------------------------------------------

    async def _finalize(self, journal: Journal) -> None:
        """Write the files, then say that they are there."""
        record, is_whole = self.record, 0 < self.record.total == len(journal.places)
        if record.errors == [faults.FULL]:
            record.errors = []  # nothing waits for room any more
        is_cut = self._is_input_gone and not is_whole
        if is_cut:
            record.errors = [faults.GONE]
        if record.status in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS):  # else an earlier router came so far
            if self._stopped_by is BatchStatus.CANCELLING:
                await self._advance(BatchStatus.CANCELLING)
            elif is_whole:
                await self._advance(BatchStatus.FINALIZING)
        is_due = not is_cut or self._stopped_by is BatchStatus.EXPIRED
        end = _END_OF.get(record.status, BatchStatus.EXPIRED if is_due else BatchStatus.FAILED)
        written = await unhurried(write_files, self.deps.files, record, journal, self._lines, end)
        record.output_file_id, record.error_file_id = written
        await self._end(end)

    async def _advance(self, to: BatchStatus) -> None:
        self.record.advance(to, self.deps.now_s())
        await unhurried(self.deps.store.save, self.record)

    async def _end(self, status: BatchStatus) -> None:
        await self._advance(status)
        record = self.record
        log.info("batch_ended", batch_id=record.id, status=status, total=record.total, failed=record.failed)
        with contextlib.suppress(OSError):
            await unhurried(self.deps.store.clear, record.id)


def _any_model(_name: str | None) -> None:
    """Check nothing, of lines that were checked before or are not asked."""
