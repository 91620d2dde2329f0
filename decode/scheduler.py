"""Continuous batching on a decode worker. Pure Python over the sequences' blocks.

    waiting ──(blocks for every known token)──> running ──(finish)──> gone
       ^                                        │  ^ │
       └────────(preempted: blocks taken)───────┤  │ └──(row taken)──> parked: it keeps its blocks
                                                │  └───────────────────┘│
                                                └───────────────────────┘

A step feeds one token of every running sequence whose KV is complete, then fills the token budget with chunks of
those that still compute known tokens: local prompts, preempted ones, resumed ones. All three are the same case:
tokens are known, their KV is not. Beside running answers these chunks are cut by time (`pace.py`), so that no answer
stands still while a prompt is computed. A preempted sequence finds its KV in host memory or in the prefix cache, or
computes it again.

Order everywhere is `Sequence.age_key`: the first is served first and preempted last, so the oldest of the highest
class always ends. For its next block a running sequence takes those of younger ones; for a row, or to be admitted,
it takes from lower classes alone. So nobody takes from whom it was taken by.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from heapq import merge

from ..common.batch import Batch, BatchRow, RowKind, StepOutput
from ..common.errors import CapacityError
from ..common.kv_spec import KVCacheSpec
from ..common.request import BACKGROUND_PRIORITY, BlockId, Sequence
from ..kvcache.blocks import BlockPool
from ..kvcache.prefix_cache import PrefixCache
from .pace import Pace
from .sequence_blocks import SequenceBlocks
from .speculation import DraftCounters, Speculation

_KINDS = tuple(RowKind)  # in the order in which rows stand in a batch


def _age(seq: Sequence) -> tuple[int, int, str, int]:
    return seq.age_key


def _chunk_rows(pending: list[Sequence], budget: int) -> list[BatchRow]:
    """Chunks of the sequences that still compute known tokens.

    The oldest has half of the budget for itself, so that it moves on whatever comes; the rest goes to those with the
    least left, so that short prompts do not wait for long ones.
    """
    shares = dict.fromkeys(pending, 0)
    if len(pending) > 1:
        shares[pending[0]] = min(budget // 2, pending[0].num_computable_tokens)
        budget -= shares[pending[0]]
    for seq in sorted(pending, key=lambda seq: seq.num_uncomputed_tokens):
        num_tokens = min(budget, seq.num_computable_tokens - shares[seq])
        shares[seq] += num_tokens
        budget -= num_tokens
    return [BatchRow(seq, num_tokens) for seq, num_tokens in shares.items() if num_tokens]


class DecodeScheduler:
    """Owns the sequences' blocks from `add` or `adopt` to `remove`."""

    def __init__(
        self,
        pool: BlockPool,
        spec: KVCacheSpec,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        num_swap_blocks: int = 0,
        tpot_objective_s: float | None = None,
        cache: PrefixCache | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        """`cache`: around the pool; None: one without further tiers. `speculation` None: no row has a draft."""
        self._pool = pool
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self.blocks = SequenceBlocks(pool, spec, num_swap_blocks, cache)
        self.pace = Pace(tpot_objective_s)
        self.speculation = speculation
        self.waiting: list[Sequence] = []  # oldest first; they hold no blocks
        self.parked: list[Sequence] = []  # oldest first; they hold blocks and have no row
        self.running: list[Sequence] = []  # oldest first
        self._in_step = False
        self._ended: list[Sequence] = []  # during the step that computes now: their blocks may be in use
        self.misfits: list[Sequence] = []  # have outgrown the pool: they wait for their end
        self.num_preemptions = 0

    @property
    def draft_counters(self) -> DraftCounters:
        return self.speculation.counters if self.speculation is not None else DraftCounters()

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.parked)

    @property
    def waiting_tokens(self) -> int:
        """Known tokens without KV, apart from the one that each sequence feeds next."""
        held = sum([max(0, len(seq.token_ids) - seq.num_computed_tokens - 1) for seq in (*self.running, *self.parked)])
        saved = self.blocks.swap.num_saved_tokens
        return held + sum(max(0, seq.num_uncomputed_tokens - saved(seq)) for seq in self.waiting)

    @property
    def num_context_tokens(self) -> int:
        """Return the tokens of all running sequences, prompts included."""
        return sum([len(seq.token_ids) for seq in self.running])

    @property
    def growth_reserve(self) -> int:
        """Blocks that a new grant must leave: one for each sequence that has some, all that the waiting ones need."""
        return self._num_growing + sum(self.blocks.num_for(seq.num_tokens) for seq in self.waiting)

    @property
    def _num_growing(self) -> int:
        return len(self.running) + len(self.parked)

    @property
    def has_row(self) -> bool:
        """Room for one more running sequence."""
        return len(self.running) < self._max_num_seqs

    # --- sequences come and go -----------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queue a sequence that has no blocks yet. Raises CapacityError if its known tokens can never fit."""
        needed = self.blocks.num_for(seq.num_tokens + 1)
        if needed > self._pool.num_blocks:
            raise CapacityError(f"the sequence needs {needed} blocks, the pool has {self._pool.num_blocks}")
        self.requeue(seq)

    def adopt(self, seq: Sequence) -> None:
        """Take over a sequence whose prompt has its KV in `block_table`; a resumed one feeds its answer again."""
        if seq.num_uncomputed_tokens > 1 and not self.blocks.cover(seq):
            self.blocks.give_back(seq)
            seq.num_computed_tokens = seq.num_published_blocks = 0
            self.requeue(seq)
            return
        insort(self.running if self.has_row else self.parked, seq, key=_age)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """`child` continues from the parent's KV.

        Without room for a copy of a partial last block it waits and computes what it lacks, like a preempted one.
        """
        if self.blocks.share(parent, child):
            self.adopt(child)
        else:
            self.requeue(child)

    def requeue(self, seq: Sequence) -> None:
        """Queue a sequence that was begun here or elsewhere and has no blocks."""
        if self.blocks.num_for(seq.num_tokens) > self._pool.num_blocks:
            self.misfits.append(seq)
        else:
            insort(self.waiting, seq, key=_age)

    def remove(self, seq: Sequence) -> None:
        """The sequence ended. Blocks that a running step may use are given back by `complete`."""
        if self.speculation is not None:
            self.speculation.forget(seq)
        for queue in (self.waiting, self.misfits):
            if seq in queue:
                queue.remove(seq)
                self.blocks.swap.drop(seq)
                self.blocks.cache.forget(seq)
                return
        (self.running if seq in self.running else self.parked).remove(seq)
        if self._in_step:
            self._ended.append(seq)
        else:
            self.blocks.give_back(seq)

    # --- steps ---------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next step, rows of one token first."""
        assert not self._in_step, "the last step was not completed"
        self._fill_rows()
        rows = self._decode_rows()
        while not self.running and self.parked:  # those that ran are preempted: their rows are for who holds blocks
            self._fill_rows()
            rows = self._decode_rows()
        budget = self._max_num_batched_tokens - len(rows)
        pending = [seq for seq in self.running if seq.num_uncomputed_tokens > 1]
        is_paced = bool(rows) or self._is_background
        tokens = sum(seq.num_uncached_tokens for seq in pending)
        chunks = _chunk_rows(pending, min(budget, self.pace.chunk_tokens(len(rows), tokens)) if is_paced else budget)
        if self.speculation is not None and rows:
            budget -= sum(row.num_scheduled_tokens for row in chunks)
            self.speculation.draft(rows, budget, self.room_for)
        rows += chunks
        if chunks or self.speculation is not None:
            rows.sort(key=lambda row: _KINDS.index(row.kind))
        if self.speculation is not None:
            self.speculation.assign(rows)
        batch = self.blocks.begin(rows)
        self._in_step = batch is not None
        return batch

    @property
    def _is_background(self) -> bool:
        """True where nobody waits for any of those that run: the first one is of the highest class."""
        return bool(self.running) and self.running[0].priority == BACKGROUND_PRIORITY

    def _fill_rows(self) -> None:
        """Rows go to the oldest without one. Who waits for blocks is passed by those alone that hold theirs; who waits
        for the disk is passed by all.
        """
        waits_for_blocks = False
        waiting = [seq for seq in self.waiting if not self.blocks.awaits(seq)]
        while (seq := self._next(self.parked, [] if waits_for_blocks else waiting)) is not None:
            if not self.has_row and self.running[-1].priority <= seq.priority:
                return
            if seq in self.parked:
                self.parked.remove(seq)
            elif self._admit(seq):
                self.waiting.remove(seq)
                waiting.remove(seq)
            else:
                waits_for_blocks = True
                continue
            if not self.has_row:
                self._park(self.running[-1])
            insort(self.running, seq, key=_age)

    def _next(self, *queues: list[Sequence]) -> Sequence | None:
        return min((queue[0] for queue in queues if queue), key=_age, default=None)

    def _admit(self, seq: Sequence) -> bool:
        """Give a waiting sequence blocks, if need be those of lower classes; one for each that grows is left."""
        missing = self.blocks.shortage(seq, self._num_growing)
        victims: list[Sequence] = []
        for victim in self._youngest_first():
            if missing <= 0 or victim.priority <= seq.priority:
                break
            victims.append(victim)
            missing -= self.blocks.num_freed_by(victim) + 1
        if missing > 0:
            return False
        for victim in victims:
            self._preempt(victim)
        return self.blocks.restore(seq, self._num_growing)

    def _youngest_first(self) -> Iterator[Sequence]:
        """Yield the sequences that hold blocks, the youngest first."""
        return merge(self.running[::-1], self.parked[::-1], key=_age, reverse=True)

    def _decode_rows(self) -> list[BatchRow]:
        rows = []
        for seq in list(self.running):
            # A sequence without blocks was preempted for an older one a moment ago.
            is_ready = seq.can_sample and not seq.awaits_adapter
            if seq.num_uncomputed_tokens == 1 and is_ready and seq.block_table and self._grow(seq):
                rows.append(BatchRow(seq, 1))
        return [row for row in rows if row.seq.block_table]

    def _grow(self, seq: Sequence) -> bool:
        """Room for the sequence's next token; preempts younger ones, or itself, where there is none."""
        if self.blocks.has_slot(seq):
            return True
        while self.blocks.num_available == 0:
            youngest = next(self._youngest_first())
            self._preempt(youngest)
            if youngest is seq:
                return False
        self.blocks.grow(seq)
        return True

    def room_for(self, seq: Sequence, num_tokens: int) -> int:
        """Return how many tokens after the last known one have slots; one block at most is taken for them, and only a
        spare one."""
        size = self._pool.block_size
        room = len(seq.block_table) * size - seq.num_tokens
        if room < num_tokens and self.blocks.num_available > self._num_growing:
            self.blocks.grow(seq)
            room += size
        return max(0, min(room, num_tokens))

    def _park(self, seq: Sequence) -> None:
        """Take the row of a running sequence; its blocks stay as long as nobody older needs them."""
        self.running.remove(seq)
        insort(self.parked, seq, key=_age)
        self.num_preemptions += 1

    def _preempt(self, seq: Sequence) -> None:
        (self.running if seq in self.running else self.parked).remove(seq)
        self.blocks.evict(seq)
        self.requeue(seq)
        self.num_preemptions += 1

    def complete(self, batch: Batch) -> list[bool]:
        """Count the step's known tokens as computed; `accept` counts those of a draft that was right.

        For each row: is its sequence still there?
        """
        self._in_step = False
        ended, self._ended = self._ended, []
        alive = []
        for row in batch.rows:
            alive.append(row.seq not in ended)
            if alive[-1]:
                row.seq.num_computed_tokens += row.num_known_tokens
                self.blocks.publish(row.seq)
        self.blocks.end()
        for seq in ended:
            self.blocks.give_back(seq)
        return alive

    def accept(self, seq: Sequence, num_tokens: int) -> None:
        """Count further tokens, which the sequence has by now, as computed by the step that is complete."""
        seq.num_computed_tokens += num_tokens
        assert seq.num_computed_tokens <= len(seq.block_table) * self._pool.block_size, "a run beyond its blocks"
        self.blocks.publish(seq)

    def observe(self, batch: Batch, output: StepOutput) -> None:
        """Learn from a step what swapping and computing cost. Before `complete`."""
        self.blocks.swap.costs.observe(batch, output)
        self.pace.observe(batch, output)
        if self.speculation is not None:
            self.speculation.observe(batch, output)

    def sequences(self) -> list[Sequence]:
        """All that have not ended."""
        return [*self.running, *self.parked, *self.waiting, *self.misfits]

    @property
    def is_quiet(self) -> bool:
        """No sequence, no block and no slot is held."""
        return not self.sequences() and not any(self.references()) and not self.blocks.swap.num_used

    def references(self) -> list[list[BlockId]]:
        """All references to blocks of the pool that sequences and copies hold."""
        tables = [seq.block_table for seq in (*self.running, *self.parked, *self._ended)]
        return tables + self.blocks.references()

    def check(self) -> None:
        """Assert that the books agree: each sequence is in one list, and blocks are held where they should be."""
        self.blocks.check()
        lists = (self.waiting, self.parked, self.running)
        assert all(list(queue) == sorted(queue, key=_age) for queue in lists)
        assert not any(seq.block_table for seq in self.waiting)
        for seq in (*self.parked, *self.running, *self._ended):
            assert seq.block_table and all(self._pool.ref_count(block) > 0 for block in seq.block_table)
