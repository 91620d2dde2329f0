"""A decode scheduler over a memory that remembers which token each slot is about.

`step` does to that memory what an engine does, in its order, and asserts that every row reads its own sequence's
tokens. Between scheduling and that, every block that the pool would hand out is written to, as by a prefill worker.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvferry.common.batch import Batch, RowOutput, StepOutput
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.decode.scheduler import DecodeScheduler
from kvferry.kvcache.blocks import BlockPool
from kvferry.kvcache.disk_tier import DiskTier
from kvferry.kvcache.prefix_cache import PrefixCache
from kvferry.kvcache.tiers import TierIndex
from kvferry.tests.fake_clock import FakeClock

from ..kvcache.fake_disk import FakeDisk

BLOCK = 4
SPEC = KVCacheSpec(model="m", num_layers=1, num_kv_heads=1, head_dim=8, block_size=BLOCK, dtype="float32")
_FOREIGN = -7


class TaggedScheduler:
    """`live`: sequences that have not ended, and how many tokens each ends with."""

    def __init__(
        self,
        num_blocks: int,
        *,
        num_swap_blocks: int = 0,
        num_host_blocks: int = 0,
        num_disk_blocks: int = 0,
        budget: int = 16,
        rows: int = 8,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.pool = BlockPool(num_blocks, BLOCK, enable_prefix_caching=enable_prefix_caching)
        self._slots = [[0] * BLOCK for _ in range(num_swap_blocks + num_host_blocks)]
        host = TierIndex(num_host_blocks, num_swap_blocks)
        self.clock = FakeClock()
        self.disk = FakeDisk(num_disk_blocks, self._slots)
        tier = DiskTier(self.disk, host, self.clock, lambda result: None) if num_disk_blocks else None
        self.cache = PrefixCache(self.pool, host=host, disk=tier)
        self.scheduler = DecodeScheduler(
            self.pool,
            SPEC,
            max_num_batched_tokens=budget,
            max_num_seqs=rows,
            num_swap_blocks=num_swap_blocks,
            cache=self.cache,
        )
        self.swap = self.scheduler.blocks.swap
        self.live: dict[Sequence, int] = {}
        self.granted: list[int] = []  # blocks that a prefill worker writes to
        self._memory = [[0] * BLOCK for _ in range(num_blocks)]
        self.num_computed = 0  # tokens that rows have fed

    # --- sequences ----------------------------------------------------------------------------------------------

    def sequence(self, name: str, tokens: Iterable[int], *, arrival: int = 0, priority: int = 0) -> Sequence:
        params = SamplingParams(temperature=0.0, max_tokens=10_000)
        ids = list(tokens)
        return Sequence(RequestId(name), 0, 0, ids, len(ids), params, arrival=arrival, priority=priority)

    def prompt(self, name: str, num_tokens: int, num_outputs: int, *, first: int = 0, **order: int) -> Sequence:
        """A prompt that is computed here."""
        seq = self.sequence(name, _tokens(first, num_tokens), **order)
        self.scheduler.add(seq)
        self.live[seq] = num_tokens + num_outputs
        return seq

    def adopted(self, name: str, num_tokens: int, num_outputs: int, *, first: int = 0, **order: int) -> Sequence:
        """A prompt whose KV came over the wire, with its first token."""
        seq = self.sequence(name, _tokens(first, num_tokens), **order)
        seq.block_table = self.pool.allocate(-(-num_tokens // BLOCK))
        for place, token in enumerate(seq.token_ids):
            self._memory[seq.block_table[place // BLOCK]][place % BLOCK] = token
        seq.num_computed_tokens = num_tokens
        self.scheduler.blocks.known.publish(seq)
        seq.token_ids.append(_sampled(seq))
        self.scheduler.adopt(seq)
        self.live[seq] = num_tokens + num_outputs
        return seq

    def fork(self, parent: Sequence, choice: int) -> Sequence:
        child = self.sequence(parent.request_id, parent.token_ids, arrival=parent.arrival, priority=parent.priority)
        child.choice = choice
        child.num_prompt_tokens = parent.num_prompt_tokens
        child.token_ids[-1] += choice
        self.scheduler.fork(parent, child)
        self.live[child] = self.live[parent]
        return child

    def end(self, seq: Sequence) -> None:
        del self.live[seq]
        self.scheduler.remove(seq)

    # --- steps --------------------------------------------------------------------------------------------------

    def begin(self) -> Batch | None:
        batch = self.scheduler.schedule()
        if batch is None:
            batch = self.cache.idle()
        self._write_foreign_tokens()
        self.check()
        return batch

    def grant(self, count: int) -> None:
        """Promise blocks to a prefill worker, which writes at once."""
        self.granted += self.pool.allocate(min(count, self.pool.num_free_blocks))
        self._write_foreign_tokens()

    def _write_foreign_tokens(self) -> None:
        free = [block for block in range(self.pool.num_blocks) if self.pool.ref_count(block) == 0]
        unknown = [block for block in free if not self.pool.is_published(block)]  # of the others the hash would be gone
        for block in self.granted + unknown:
            self._memory[block] = [_FOREIGN] * BLOCK

    def compute(self, batch: Batch) -> None:
        for block, slot in batch.swap_out:
            self._slots[slot] = list(self._memory[block])
        for slot, block in batch.swap_in:
            self._memory[block] = list(self._slots[slot])
        for source, target in batch.block_copies:
            self._memory[target] = list(self._memory[source])
        for row in batch.rows:
            self.num_computed += row.num_scheduled_tokens
            for place in range(row.start, row.end):
                self._memory[row.seq.block_table[place // BLOCK]][place % BLOCK] = row.seq.token_ids[place]
        for row in batch.rows:
            read = [self._memory[row.seq.block_table[place // BLOCK]][place % BLOCK] for place in range(row.end)]
            assert read == row.seq.token_ids[: row.end], f"{row.seq.request_id}/{row.seq.choice} reads {read}"

    def finish(self, batch: Batch, *, swap_s: float = 0.001) -> None:
        samples = [row.samples for row in batch.rows]
        step_s = 0.01 * max(1, batch.num_tokens) + swap_s
        rows = [RowOutput(()) for _ in batch.rows]
        self.scheduler.observe(batch, StepOutput(rows, step_s, batch.num_tokens, swap_s))
        for row, sampled, alive in zip(batch.rows, samples, self.scheduler.complete(batch), strict=True):
            if alive and sampled:
                row.seq.token_ids.append(_sampled(row.seq))
                if row.seq.num_tokens >= self.live[row.seq]:
                    self.end(row.seq)
        self.check()

    def step(self) -> Batch | None:
        batch = self.begin()
        if batch is not None:
            self.compute(batch)
            self.finish(batch)
        return batch

    def run(self, most: int = 500) -> int:
        """Steps until nothing lives."""
        for count in range(most):
            if not self.live:
                assert self.scheduler.is_quiet
                return count
            assert self.step() is not None, f"{len(self.live)} sequences stand still"
        raise AssertionError(f"{len(self.live)} sequences live after {most} steps")

    def check(self) -> None:
        self.scheduler.check()
        held: dict[int, int] = {}
        for blocks in (*self.scheduler.references(), self.granted):
            for block in blocks:
                held[block] = held.get(block, 0) + 1
        counts = {block: self.pool.ref_count(block) for block in range(self.pool.num_blocks)}
        assert {block: count for block, count in counts.items() if count} == held


def _tokens(first: int, count: int) -> list[int]:
    return [first + 1 + place for place in range(count)]


def _sampled(seq: Sequence) -> int:
    """The same whenever it is computed."""
    return (31 * seq.token_ids[-1] + 17 * seq.num_tokens + seq.choice) % 1000 + 1


def names(batch: Batch | None) -> list[str]:
    return [] if batch is None else [str(row.seq.request_id) for row in batch.rows]
