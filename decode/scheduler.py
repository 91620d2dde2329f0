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

from collections.abc import Container

from ..common.batch import Batch, BatchRow, RowKind, StepOutput
from ..common.errors import CapacityError
from ..common.kv_spec import KVCacheSpec
from ..common.request import BACKGROUND_PRIORITY, BlockId, Sequence
from ..kvcache.blocks import BlockPool
from ..kvcache.prefix_cache import PrefixCache
from .pace import Pace, chunk_rows
from .queues import Queues, oldest
from .sequence_blocks import SequenceBlocks
from .speculation import DraftCounters, Speculation
from .thinning import Thinning

_KINDS = tuple(RowKind)  # in the order in which rows stand in a batch


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
        self._pool, self._max_num_batched_tokens = pool, max_num_batched_tokens
        self.blocks = SequenceBlocks(pool, spec, num_swap_blocks, cache)
        self.thinning = Thinning(pool, spec, self.blocks)
        self.pace = Pace(tpot_objective_s)
        self.speculation = speculation
        self.queues = Queues(min(max_num_seqs, max_num_batched_tokens), pool.block_size)  # each row has a token
        self._in_step: tuple[Sequence, ...] | None = None  # those of the step that computes now
        self._ended: list[Sequence] = []  # during it: their blocks may be in use
        self.num_preemptions = 0

    @property
    def draft_counters(self) -> DraftCounters:
        return self.speculation.counters if self.speculation is not None else DraftCounters()

    @property
    def num_running(self) -> int:
        return len(self.queues.running)

    @property
    def num_waiting(self) -> int:
        return len(self.queues.waiting) + len(self.queues.parked)

    @property
    def waiting_tokens(self) -> int:
        """Known tokens without KV, apart from the one that each sequence feeds next."""
        queues, saved = self.queues, self.blocks.swap.num_saved_tokens
        holders = (*queues.running, *queues.parked)
        held = sum([max(0, len(seq.token_ids) - seq.num_computed_tokens - 1) for seq in holders])
        return held + sum(max(0, seq.num_uncomputed_tokens - saved(seq)) for seq in queues.waiting)

    @property
    def growth_reserve(self) -> int:
        """Blocks that a new grant must leave: those to grow into, and all that the waiting sequences need."""
        return self.queues.growth() + sum(self.blocks.num_for(seq.num_tokens) for seq in self.queues.waiting)

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
        self.queues.hold(seq)

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
            self.queues.misfits.append(seq)
        else:
            self.queues.wait(seq)

    def remove(self, seq: Sequence) -> None:
        """The sequence ended. Blocks that a running step may use are given back by `complete`."""
        if self.speculation is not None:
            self.speculation.forget(seq)
        if self.queues.take_blockless(seq):
            self.blocks.swap.drop(seq)
            self.blocks.cache.forget(seq)
            return
        self.queues.take_holder(seq)
        if self._in_step is not None:
            self._ended.append(seq)
        else:
            self.blocks.give_back(seq)

    # --- steps ---------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next step, rows that decode first."""
        assert self._in_step is None, "the last step was not completed"
        self.thinning.make_room(self.queues.running, self.queues.parked)
        self._fill_rows()
        rows = self._decode_rows()
        while not self.queues.running and self.queues.parked:
            self._fill_rows()  # those that ran are preempted: their rows are for who holds blocks
            rows = self._decode_rows()
        budget = self._max_num_batched_tokens - sum([row.num_scheduled_tokens for row in rows])
        pending = [seq for seq in self.queues.running if seq.num_uncomputed_tokens > 1 + seq.num_fed_again]
        is_paced = bool(rows) or self._is_background
        prompts = [seq.num_uncached_tokens for seq in pending]
        chunks = chunk_rows(pending, min(budget, self.pace.chunk_tokens(len(rows), prompts)) if is_paced else budget)
        if self.speculation is not None and rows:
            budget -= sum(row.num_scheduled_tokens for row in chunks)
            self.speculation.draft(rows, budget, self.room_for)
        rows += chunks
        if chunks or self.speculation is not None:
            rows.sort(key=lambda row: _KINDS.index(row.kind))
        if self.speculation is not None:
            self.speculation.assign(rows)
        batch = self.blocks.begin(rows)
        self._in_step = tuple(row.seq for row in rows) if batch is not None else None
        return batch

    @property
    def _is_background(self) -> bool:
        """True where nobody waits for any of those that run: the first one is of the highest class."""
        running = self.queues.running
        return bool(running) and running[0].priority == BACKGROUND_PRIORITY

    def _fill_rows(self) -> None:
        """Rows go to the oldest without one. Who waits for blocks is passed by those with some, for the disk by all."""
        waits_for_blocks, queues = False, self.queues
        waiting = [seq for seq in queues.waiting if not self.blocks.known.awaits(seq)]
        while (seq := oldest(queues.parked, [] if waits_for_blocks else waiting)) is not None:
            if not queues.has_row and queues.running[-1].priority <= seq.priority:
                return
            if seq in queues.parked:
                queues.parked.remove(seq)
            elif self._admit(seq):
                queues.waiting.remove(seq)
                waiting.remove(seq)
            else:
                waits_for_blocks = True
                continue
            if not queues.has_row:
                self._park(queues.running[-1])
            queues.run(seq)

    def _admit(self, seq: Sequence) -> bool:
        """Give a waiting sequence blocks, if need be those of lower classes; what others need to grow is left."""
        queues, victims = self.queues, list[Sequence]()
        missing, found = self.blocks.shortage(seq)
        for victim in queues.youngest_first():
            if missing + queues.growth(len(victims)) <= 0 or victim.priority <= seq.priority:
                break
            victims.append(victim)
            missing -= self.blocks.num_freed_by(victim, found)
        if missing + queues.growth(len(victims)) > 0:
            return False
        for victim in victims:
            self._preempt(victim)
        return self.blocks.restore(seq, queues.growth())

    def _decode_rows(self) -> list[BatchRow]:
        rows, budget = [], self._max_num_batched_tokens
        for seq in self.queues.running:  # who is preempted for one of them stands behind it, and leaves the list
            count, is_ready = 1 + seq.num_fed_again, seq.can_sample and not seq.awaits_adapter
            if seq.num_uncomputed_tokens == count <= budget and is_ready and self._grow(seq):
                rows.append(BatchRow(seq, count))
                budget -= count
        return rows

    def _grow(self, seq: Sequence) -> bool:
        """Room for the sequence's next token; preempts younger ones, or itself, where there is none."""
        if self.blocks.has_slot(seq):
            return True
        while self.blocks.num_available == 0:
            youngest = next(self.queues.youngest_first())
            self._preempt(youngest)
            if youngest is seq:
                return False
        self.blocks.grow(seq)
        return True

    def room_for(self, seq: Sequence, num_tokens: int) -> int:
        """Return how many tokens after the last known one have slots; one spare block at most is taken for them."""
        size = self._pool.block_size
        room = len(seq.block_table) * size - seq.num_tokens
        if room < num_tokens and self.blocks.num_available > self.queues.growth():
            self.blocks.grow(seq)
            room += size
        return max(0, min(room, num_tokens))

    def _park(self, seq: Sequence) -> None:
        """Take the row of a running sequence; its blocks stay as long as nobody older needs them."""
        self.queues.running.remove(seq)
        self.queues.park(seq)
        self.num_preemptions += 1

    def _preempt(self, seq: Sequence) -> None:
        self.queues.take_holder(seq)
        self.blocks.evict(seq)
        self.requeue(seq)
        self.num_preemptions += 1

    def complete(self, batch: Batch, postponed: Container[int] = ()) -> list[bool]:
        """Count the step's known tokens as computed; `accept` counts those of a draft that was right.

        `postponed`: places of rows that count for nothing. For each row: is its sequence still there?"""
        self._in_step = None
        ended, self._ended = self._ended, []
        alive = []
        for place, row in enumerate(batch.rows):
            alive.append(row.seq not in ended)
            if alive[-1] and place not in postponed:
                self.blocks.count(row.seq, row.num_known_tokens)
        self.blocks.end()
        for seq in ended:
            self.blocks.give_back(seq)
        return alive

    @property
    def is_step_vain(self) -> bool:
        """Tell whether a step computes of which nothing is wanted any more: all of its sequences have ended."""
        return bool(self._in_step) and set(self._ended).issuperset(self._in_step or ())

    def accept(self, seq: Sequence, num_tokens: int) -> None:
        """Count tokens of a right draft, which the sequence has by now; with states, they are fed again."""
        if self.speculation is not None and self.speculation.keeps_states:
            seq.num_fed_again = num_tokens
        else:
            self.blocks.count(seq, num_tokens)

    def observe(self, batch: Batch, output: StepOutput) -> None:
        """Learn from a step what swapping and computing cost. Before `complete`."""
        self.blocks.swap.costs.observe(batch, output)
        self.pace.observe(batch, output)
        if self.speculation is not None:
            self.speculation.observe(batch, output)

    @property
    def is_quiet(self) -> bool:
        """No sequence, no block and no slot is held."""
        return not self.queues.all() and not any(self.references()) and not self.blocks.swap.num_used

    def references(self) -> list[list[BlockId]]:
        """All references to blocks of the pool that sequences and copies hold."""
        tables = [seq.block_table for seq in (*self.queues.running, *self.queues.parked, *self._ended)]
        return tables + self.blocks.references()

    def check(self) -> None:
        """Assert that the books agree: each sequence is in one list, and blocks are held where they should be."""
        self.blocks.check()
        self.queues.check()
        for seq in (*self.queues.parked, *self.queues.running, *self._ended):
            assert seq.block_table and all(self._pool.ref_count(block) > 0 for block in seq.block_table)
