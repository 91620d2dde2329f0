"""Masks of grammars are found behind the forward pass, or on a thread of their own while it computes.

    quick: the engine's thread: forward pass ─> logits ─> batch.masks(): each row's matcher takes its new tokens, and
           says what may come next ─> sampling
    other: begin(batch) ─> [thread] the same ───────────────────────────────────────────────────┐
           the engine's thread: forward pass ─> logits ─> batch.masks() waits for what is left ─┴─> sampling

A row's masks are quick as long as its last one was. A third thread beside two cores' worth of forward pass costs three
times what it computes, and to wake it a tenth of a millisecond: on a Zen 3 a step of one row took 1.05 of one without a
grammar, of eight rows 1.15. On a GPU's host quick masks are found while the device computes.

The library that matches releases the GIL, as the forward pass does. A mask takes microseconds as a rule, and a tenth
of a second where a client wants it so: fifteen hundred properties, beside which any other name may stand. Nobody else
waits for that. Where the step may postpone rows (`Batch.may_postpone`), a mask that is late goes on in its thread, from
then on at the lowest priority, a new thread takes the others, and the row yields nothing until the mask is there.

A matcher has one user at a time: its row's mask is not begun again before the late one has ended. What that has found
is taken then, whatever is drafted by now: so each mask is found once, and the row goes on by one token at least.

The masks behind a draft are looked for as long as a step would wait for a mask. So drafts make no row late that would
be in time without them, or hardly: what is drafted beyond these masks comes one by one.

To take a token the library keeps the GIL: microseconds as a rule, 6 ms with fifteen hundred properties. Such a matcher
waits until the tokens of the step before have left (`Batch.wait_left`), then takes its own while the model computes.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile

from ..common.batch import Batch, BatchRow, GrammarMask
from ..common.priority import CoreOffers, give_way
from .masks import QUICK_S, find_mask, mask_of

PATIENCE_S = 0.004  # after the forward pass. Larger: streams notice others' grammars; smaller: rows are computed twice
# Where all rows' masks are late. Larger: requests that have come meanwhile, and aborts, wait; smaller: idle steps.
IDLE_S = 0.1
_LATE = GrammarMask(b"", is_late=True)
_LEAST_S = 1e-6  # of a mask: clocks of threads may stand still for less


@dataclass(slots=True, eq=False)
class _Job:
    """One row's mask, which is found or will be."""

    row: BatchRow
    may_be_late: bool
    future: Future[GrammarMask | None]
    wait_left: Callable[[], object] | None  # before it begins
    num_tokens: int  # that the row's sequence has
    thread_id: int = 0  # of the thread that has begun it
    is_late: bool = False


class MaskThread:
    """Used by the engine's thread."""

    def __init__(self, patience_s: float = PATIENCE_S, idle_s: float = IDLE_S) -> None:
        self._patience_s = patience_s
        self._idle_s = idle_s
        self._thread = _new_thread()  # begins with the first grammar
        self._late: list[_Job] = []  # under way since an earlier step, or ended and still of use

    def begin(self, batch: Batch) -> None:
        """Begin to find the masks of a batch's rows, if any of them follows a grammar."""
        rows = [row for row in batch.rows if row.samples]
        # Steps of prompts take turns with those of answers, and some only copy: no answer's row is in these.
        if self._late and batch.may_postpone and rows:
            here = {row.seq for row in rows}
            self._late = [job for job in self._late if not job.future.done() or job.row.seq in here]
        if all(row.seq.grammar is None for row in batch.rows):
            return
        if not self._late and sum(map(_expected_s, rows)) <= QUICK_S:
            batch.masks = cache(lambda: [_found(row, self._patience_s) for row in rows])
        else:
            jobs = [self._begun(row, batch) for row in rows]
            batch.masks = cache(partial(self._masks, jobs, others=len(batch.rows) - len(jobs)))

    def _begun(self, row: BatchRow, batch: Batch) -> _Job:
        late, known = next((job for job in self._late if job.row.seq is row.seq), None), None
        if late is not None:
            if not late.future.done():
                return late
            known = _known(late, row)
            if known is None:
                self._late.remove(late)
        grammar = row.seq.grammar
        wait_left = batch.wait_left if grammar is not None and grammar.is_costly else None
        may_be_late = batch.may_postpone and row.num_known_tokens == 1
        job = _Job(row, may_be_late, Future(), wait_left, len(row.seq.token_ids))
        if grammar is None or known is not None:
            job.future.set_result(known)
        else:
            self._submit(job)
        return job

    def _submit(self, job: _Job) -> None:
        job.future = self._thread.submit(_run, job, self._patience_s)

    def _masks(self, jobs: Sequence[_Job], others: int) -> list[GrammarMask | None]:
        """Wait for the masks that come soon. `others`: rows of the step that need none."""
        while (job := self._overdue(jobs)) is not None:
            self._give_up(job, jobs)
        late = [job for job in jobs if job.is_late]
        if len(late) == len(jobs) and not others:  # nobody would be served by going on
            wait([job.future for job in late], self._idle_s, return_when=FIRST_COMPLETED)
        return [_LATE if job.is_late else job.future.result() for job in jobs]

    def _overdue(self, jobs: Sequence[_Job]) -> _Job | None:
        """Return the first of those that take too long; None: there is none (any more)."""
        awaited = [job for job in jobs if job.may_be_late and not job.is_late]
        wait([job.future for job in awaited], self._patience_s)
        return next((job for job in awaited if not job.future.done()), None)

    def _give_up(self, late: _Job, jobs: Sequence[_Job]) -> None:
        """Leave the job to its thread, and those of the step that have not begun to a new one."""
        late.is_late = True
        self._late.append(late)
        before, self._thread = self._thread, _new_thread()
        for job in jobs:
            if not job.is_late and job.future.cancel():
                self._submit(job)
        before.shutdown(wait=False)
        if late.thread_id:
            give_way(late.thread_id)
            offers = CoreOffers(late.thread_id)
            late.future.add_done_callback(lambda _: offers.end())


def _new_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="masks")


def _known(late: _Job, row: BatchRow) -> GrammarMask | None:
    """Return what a job that was late, and has ended, has found of a row's masks; None: not the first of them."""
    mask = late.future.result()
    if mask is None:
        return None
    come, words = tuple(row.seq.token_ids[late.num_tokens :]), (mask.words, *mask.behind_draft)
    if len(come) >= len(words) or come != late.row.draft[: len(come)]:
        return None
    if mask.failure:
        return mask
    first, *behind = words[len(come) :]
    drafted = zip(behind, late.row.draft[len(come) :], row.draft, strict=False)
    return mask_of(first, tuple(words for words, _, _ in takewhile(lambda found: found[1] == found[2], drafted)))


def _run(job: _Job, patience_s: float) -> GrammarMask | None:
    job.thread_id = threading.get_native_id()
    if job.wait_left is not None:
        job.wait_left()
    return _found(job.row, patience_s)


def _found(row: BatchRow, patience_s: float) -> GrammarMask | None:
    """Find a row's mask, and note how long that takes: of the thread's own time, whatever runs beside it."""
    if row.seq.grammar is None:
        return None
    began_s = time.thread_time()
    mask = find_mask(row, patience_s)
    mask_s = (time.thread_time() - began_s) / (1 + len(mask.behind_draft))
    row.seq.mask_s, row.seq.draft_limit = mask_s, max(0, int(patience_s / max(mask_s, _LEAST_S)) - 1)
    return mask


def _expected_s(row: BatchRow) -> float:
    """Return how long a row's masks will take, going by its last one."""
    if row.seq.grammar is None:
        return 0.0
    if row.seq.mask_s is None or row.seq.grammar.is_costly:
        return math.inf
    return row.seq.mask_s * (1 + len(row.draft))
