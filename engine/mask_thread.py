"""Masks of grammars are found on a thread of their own while the model computes the step that they belong to.

    begin(batch) ─> [thread] each row's matcher takes its new tokens, and says what may come next ─┐
    the engine's thread: forward pass ─> logits ─> batch.masks() waits for what is left ───────────┴─> sampling

The library that matches releases the GIL, as the forward pass does. A mask takes microseconds as a rule, and a tenth
of a second where a client wants it so: fifteen hundred properties, beside which any other name may stand. Nobody else
waits for that. Where the step may postpone rows (`Batch.may_postpone`), a mask that is late goes on in its thread, from
then on at the lowest priority, a new thread takes the others, and the row yields nothing until the mask is there.

A matcher has one user at a time: its row's mask is not begun again before the late one has ended.

To take a token the library keeps the GIL: microseconds as a rule, 6 ms with fifteen hundred properties. Such a matcher
waits until the tokens of the step before have left (`Batch.wait_left`), then takes its own while the model computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, partial

from ..common.batch import Batch, BatchRow, GrammarMask
from ..common.priority import CoreOffers, give_way
from .masks import find_mask

PATIENCE_S = 0.004  # after the forward pass. Larger: streams notice others' grammars; smaller: rows are computed twice
_LATE = GrammarMask(b"", is_late=True)


@dataclass(slots=True, eq=False)
class _Job:
    """One row's mask, which is found or will be."""

    row: BatchRow
    may_be_late: bool
    future: Future[GrammarMask | None]
    wait_left: Callable[[], object] | None  # before it begins
    thread_id: int = 0  # of the thread that has begun it
    is_late: bool = False


class MaskThread:
    """Used by the engine's thread."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._thread = _new_thread()  # begins with the first grammar
        self._late: list[_Job] = []  # under way since an earlier step

    def begin(self, batch: Batch) -> None:
        """Begin to find the masks of a batch's rows, if any of them follows a grammar."""
        if any(row.seq.grammar is not None for row in batch.rows):
            self._late = [job for job in self._late if not job.future.done()]
            jobs = [self._begun(row, batch) for row in batch.rows if row.samples]
            batch.masks = cache(partial(self._masks, jobs, others=len(batch.rows) - len(jobs)))

    def _begun(self, row: BatchRow, batch: Batch) -> _Job:
        late = next((job for job in self._late if job.row.seq is row.seq), None)
        if late is not None:
            return late
        grammar = row.seq.grammar
        wait_left = batch.wait_left if grammar is not None and grammar.is_costly else None
        job = _Job(row, batch.may_postpone and row.num_known_tokens == 1, Future(), wait_left)
        if grammar is None:
            job.future.set_result(None)
        else:
            self._submit(job)
        return job

    def _submit(self, job: _Job) -> None:
        job.future = self._thread.submit(_run, job)

    def _masks(self, jobs: Sequence[_Job], others: int) -> list[GrammarMask | None]:
        """Wait for the masks that come soon. `others`: rows of the step that need none."""
        while (job := self._overdue(jobs)) is not None:
            self._give_up(job, [one for one in jobs if not one.future.done() and one is not job])
        late = [job for job in jobs if job.is_late]
        if len(late) == len(jobs) and not others:  # nobody would be served by going on
            wait([job.future for job in late], return_when=FIRST_COMPLETED)
        return [_LATE if job.is_late else job.future.result() for job in jobs]

    def _overdue(self, jobs: Sequence[_Job]) -> _Job | None:
        """Return the first of those that take too long; None: there is none (any more)."""
        awaited = [job for job in jobs if job.may_be_late and not job.is_late]
        wait([job.future for job in awaited], self._patience_s)
        return next((job for job in awaited if not job.future.done()), None)

    def _give_up(self, late: _Job, behind: Sequence[_Job]) -> None:
        """Leave the job to its thread, and those behind it to a new one."""
        late.is_late = True
        self._late.append(late)
        before, self._thread = self._thread, _new_thread()
        for job in behind:
            if not job.is_late and job.future.cancel():
                self._submit(job)
        before.shutdown(wait=False)
        if late.thread_id:
            give_way(late.thread_id)
            offers = CoreOffers(late.thread_id)
            late.future.add_done_callback(lambda _: offers.end())


def _new_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="masks")


def _run(job: _Job) -> GrammarMask | None:
    job.thread_id = threading.get_native_id()
    if job.wait_left is not None:
        job.wait_left()
    return find_mask(job.row)
