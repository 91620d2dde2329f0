"""Continuous batching on a decode worker. Pure Python over a block pool.

    waiting ──(blocks for every known token)──> running ──(finish)──> gone
       ^                                           │
       └────────(preempted: blocks given back)─────┘

A step feeds one token of every running sequence whose KV is complete, then fills the token budget with chunks of
those that still compute known tokens: local prompts, preempted ones, resumed ones. All three are the same case:
tokens are known, their KV is not. A preempted sequence finds what it had published in the prefix cache.

Order everywhere is `Sequence.age_key`: the first is served first and preempted last, so the oldest always ends.
"""

from __future__ import annotations

from bisect import insort

from ..common.batch import Batch, BatchRow
from ..common.blocks import BlockPool, KVCacheSpec, hash_blocks, prefix_salt
from ..common.errors import CapacityError
from ..common.request import Sequence


def _age(seq: Sequence) -> tuple[int, int, str, int]:
    return seq.age_key


class DecodeScheduler:
    """Owns the sequences' blocks from `add` or `adopt` to `remove`."""

    def __init__(self, pool: BlockPool, spec: KVCacheSpec, *, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        self._pool = pool
        self._spec = spec
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self.waiting: list[Sequence] = []  # oldest first; they hold no blocks
        self.running: list[Sequence] = []  # oldest first
        self._stepping: set[Sequence] = set()  # in the step that computes now: their blocks are in use
        # Block copies (from, to) that the next step begins with; each holds a reference to its source.
        self._copies: list[tuple[int, int]] = []
        self.num_preemptions = 0
        self.prefix_queries = 0  # tokens
        self.prefix_hits = 0

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def waiting_tokens(self) -> int:
        """Known tokens without KV, apart from the one that each running sequence feeds next."""
        running = sum(max(0, seq.num_uncomputed_tokens - 1) for seq in self.running)
        return running + sum(seq.num_uncomputed_tokens for seq in self.waiting)

    @property
    def growth_reserve(self) -> int:
        """Blocks that a new grant must leave: one for each running sequence, all that the waiting ones need."""
        return len(self.running) + sum(self._num_blocks(seq.num_tokens) for seq in self.waiting)

    @property
    def has_row(self) -> bool:
        """Room for one more running sequence."""
        return len(self.running) < self._max_num_seqs

    # --- sequences come and go -----------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queue a sequence that has no blocks yet. Raises CapacityError if its known tokens can never fit."""
        needed = self._num_blocks(seq.num_tokens + 1)
        if needed > self._pool.num_blocks:
            raise CapacityError(f"the sequence needs {needed} blocks, the pool has {self._pool.num_blocks}")
        insort(self.waiting, seq, key=_age)

    def adopt(self, seq: Sequence) -> None:
        """Take over a sequence whose prompt KV is in `block_table`."""
        insort(self.running, seq, key=_age)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """`child` continues from the parent's KV: full blocks are shared, a partial last one is copied.

        Without room for the copy the child waits and computes what it lacks, like a preempted sequence.
        """
        num_full, partial = divmod(parent.num_computed_tokens, self._pool.block_size)
        if not self.has_row or (partial and self._pool.num_free_blocks == 0):
            self.add(child)
            return
        shared = parent.block_table[:num_full]
        self._pool.pin(shared)
        child.block_table = list(shared)
        if partial:
            child.block_table += self._pool.allocate(1)
            self.copy_block(parent.block_table[num_full], child.block_table[-1])
        child.num_computed_tokens = parent.num_computed_tokens
        child.num_cached_tokens = parent.num_cached_tokens
        child.block_hashes = list(parent.block_hashes)
        child.num_published_blocks = num_full
        self.adopt(child)

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block's content when the next step begins."""
        self._pool.pin([source])
        self._copies.append((source, target))

    def remove(self, seq: Sequence) -> None:
        """The sequence ended. Blocks that a running step uses are given back by `complete`."""
        if seq in self.waiting:
            self.waiting.remove(seq)
            return
        self.running.remove(seq)
        if seq not in self._stepping:
            self._give_back(seq)

    def _give_back(self, seq: Sequence) -> None:
        """Free the sequence's blocks; a copy into one of them must not run: it may have a new owner by then."""
        table = set(seq.block_table)
        self._pool.free([source for source, target in self._copies if target in table])
        self._copies = [copy for copy in self._copies if copy[1] not in table]
        self._pool.free(seq.block_table)
        seq.block_table = []

    # --- steps ---------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next step, rows of one token first."""
        assert not self._stepping, "the last step was not completed"
        while self.waiting and self.has_row and self._admit(self.waiting[0]):
            insort(self.running, self.waiting.pop(0), key=_age)
        rows = self._decode_rows()
        rows += self._chunk_rows(self._max_num_batched_tokens - len(rows))
        if not rows:
            return None
        rows.sort(key=lambda row: row.num_scheduled_tokens > 1)
        batch = Batch(rows, self._copies)
        self._copies = []
        self._stepping = {row.seq for row in rows}
        return batch

    def _decode_rows(self) -> list[BatchRow]:
        rows = []
        for seq in list(self.running):
            # A sequence without blocks was preempted for an older one a moment ago.
            if seq.num_uncomputed_tokens == 1 and seq.block_table and self._grow(seq):
                rows.append(BatchRow(seq, 1))
        return [row for row in rows if row.seq.block_table]

    def _grow(self, seq: Sequence) -> bool:
        """Room for the sequence's next token; preempts younger ones, or itself, where there is none."""
        if seq.num_computed_tokens < len(seq.block_table) * self._pool.block_size:
            return True
        while self._pool.num_free_blocks == 0:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is seq:
                return False
        seq.block_table += self._pool.allocate(1)
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._give_back(seq)
        seq.num_computed_tokens = seq.num_published_blocks = 0
        insort(self.waiting, seq, key=_age)
        self.num_preemptions += 1

    def _chunk_rows(self, budget: int) -> list[BatchRow]:
        """Chunks of the sequences that still compute known tokens.

        The oldest has half of the budget for itself, so that it moves on whatever comes; the rest goes to those
        with the least left, so that short prompts do not wait for long ones.
        """
        pending = [seq for seq in self.running if seq.num_uncomputed_tokens > 1]
        if not pending:
            return []
        shares = dict.fromkeys(pending, 0)
        if len(pending) > 1:
            shares[pending[0]] = min(budget // 2, pending[0].num_uncomputed_tokens)
            budget -= shares[pending[0]]
        for seq in sorted(pending, key=lambda seq: seq.num_uncomputed_tokens):
            num_tokens = min(budget, seq.num_uncomputed_tokens - shares[seq])
            shares[seq] += num_tokens
            budget -= num_tokens
        return [BatchRow(seq, num_tokens) for seq, num_tokens in shares.items() if num_tokens]

    def _admit(self, seq: Sequence) -> bool:
        """Give a waiting sequence blocks for its known tokens; leaves one block for each running sequence."""
        seq.block_hashes = hash_blocks(
            seq.token_ids, self._pool.block_size, prefix_salt(self._spec, seq.cache_salt), seq.block_hashes
        )
        hits: list[int] = []
        if seq.sampling.prompt_logprobs is None or seq.num_output_tokens > 0:
            # The last known token is always fed: its logits choose the next one.
            hits = self._pool.match_prefix(seq.block_hashes[: (seq.num_tokens - 1) // self._pool.block_size])
        num_new = self._num_blocks(seq.num_tokens) - len(hits)
        available = self._pool.num_free_blocks - self._pool.num_evictable(hits)
        if num_new + (len(self.running) if self.running else 0) > available:
            return False
        self._pool.pin(hits)
        seq.block_table = hits + self._pool.allocate(num_new)
        seq.num_computed_tokens = len(hits) * self._pool.block_size
        seq.num_published_blocks = len(hits)
        if seq.num_output_tokens == 0:
            seq.num_cached_tokens = seq.num_computed_tokens
        self.prefix_queries += seq.num_tokens
        self.prefix_hits += seq.num_computed_tokens
        return True

    def complete(self, batch: Batch) -> list[bool]:
        """Count the step's tokens as computed. For each row: is its sequence still there?"""
        alive = []
        self._stepping.clear()
        self._pool.free([source for source, _ in batch.block_copies])
        for row in batch.rows:
            seq = row.seq
            if seq not in self.running:
                self._give_back(seq)
                alive.append(False)
                continue
            seq.num_computed_tokens += row.num_scheduled_tokens
            self._publish(seq)
            alive.append(True)
        return alive

    def _publish(self, seq: Sequence) -> None:
        num_full = seq.num_computed_tokens // self._pool.block_size
        if num_full <= seq.num_published_blocks:
            return
        if len(seq.block_hashes) < num_full:
            seq.block_hashes = hash_blocks(
                seq.token_ids,  # those that are not computed yet are hashed along
                self._pool.block_size,
                prefix_salt(self._spec, seq.cache_salt),
                seq.block_hashes,
            )
        for index in range(seq.num_published_blocks, num_full):
            self._pool.publish(seq.block_table[index], seq.block_hashes[index])
        seq.num_published_blocks = num_full

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._pool.block_size)
