"""`PrefillScheduler` says which prompts compute how many tokens in the next step. Pure over a block pool and a clock.

A prompt gets the blocks of its whole length when its first chunk is scheduled: prompts that hold a part and wait
for the rest of each other's blocks cannot happen. Chunks of several prompts share a step up to the token budget.

Order: higher classes first; within one, earliest due first, where a prompt is due `PROMPT_DUE_STRETCH` times its own
compute time, as it is predicted now, after it came. A short prompt overtakes a long one that has time left, and a long
one cannot starve: a change of speed moves all due times, and newcomers' are later by the time that has passed.

A prompt that has begun is never preempted: its KV is under way to a decode worker. Whoever waits for its blocks
waits for its end, so it goes on behind them.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from ..common.batch import Batch, BatchRow
from ..common.clock import Clock
from ..common.errors import CapacityError
from ..common.pacing import BACKGROUND_STEP_S, MIN_CHUNK_TOKENS, PROMPT_DUE_STRETCH
from ..common.request import BACKGROUND_PRIORITY, Sequence, reuses_prefix
from ..common.served import failed_part
from ..kvcache.blocks import BlockPool, hash_blocks
from ..kvcache.prefix_cache import PrefixCache
from ..kvcache.thin import name_of

# A step is cut to about this: who comes while it runs waits for its end, and grants lapse in seconds. A GPU does a
# whole token budget in less; a single core at the end of a long context does not.
MAX_STEP_S = 0.5
MIN_STEP_TOKENS = 64  # where nobody waits for a step's end
_INITIAL_S_PER_TOKEN = 1e-3  # until a whole step was measured
_SMOOTHING = 0.3
_WHOLE_STEP = 64  # tokens: what fewer take says more of the step than of them
_OUTLIER = 2.0  # times what is known: one slow step is no new speed


@dataclass(slots=True, eq=False)
class Prompt:
    """A sequence on its way through the prefill scheduler."""

    seq: Sequence
    salt: bytes  # of its prefix hashes
    received_s: float
    expires_s: float | None = None  # it is not begun from then on
    started_s: float | None = None  # its first chunk was scheduled


class PrefillScheduler:
    """Packs chunks. Owns its prompts' blocks until `remove`."""

    def __init__(
        self,
        pool: BlockPool,
        clock: Clock,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        cache: PrefixCache | None = None,
    ) -> None:
        """`cache`: around the pool; None: one without further tiers."""
        self._pool = pool
        self.cache = cache if cache is not None else PrefixCache(pool)
        self._clock = clock
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self.prompts: list[Prompt] = []  # in the order in which they are served
        self.max_step_s = MAX_STEP_S
        self.reserve: Callable[[], int] = lambda: 0  # blocks that a prompt which starts must leave
        self._s_per_token, self._is_measured = _INITIAL_S_PER_TOKEN, False
        self.prefix_queries = 0  # tokens
        self.prefix_hits = 0

    @property
    def num_running(self) -> int:
        return sum(prompt.started_s is not None for prompt in self.prompts)

    @property
    def num_waiting(self) -> int:
        return len(self.prompts) - self.num_running

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that are not computed yet."""
        return sum(prompt.seq.num_uncomputed_tokens for prompt in self.prompts)

    def add(self, seq: Sequence, salt: bytes, remaining_s: float | None = None) -> Prompt:
        """Queue a prompt that is not begun any more in `remaining_s`. Raises CapacityError if it can never fit."""
        if self._num_blocks(seq) > self._pool.num_blocks:
            raise CapacityError(
                f"the prompt needs {self._num_blocks(seq)} blocks, the pool has {self._pool.num_blocks}"
            )
        now = self._clock.now()
        prompt = Prompt(seq, salt, now, now + remaining_s if remaining_s is not None else None)
        insort(self.prompts, prompt, key=self._turn)
        self._awaits(prompt)  # asked for now, it is here when the prompt's turn has come
        return prompt

    def _turn(self, prompt: Prompt) -> tuple[int, float]:
        """Return its class, and when it is due by the speed that is known now: the least comes first."""
        seq = prompt.seq
        return seq.priority, prompt.received_s + PROMPT_DUE_STRETCH * self._s_per_token * len(seq.token_ids)

    def expired(self) -> list[Prompt]:
        """Return the prompts that were not begun before their deadlines."""
        now = self._clock.now()
        return [p for p in self.prompts if p.started_s is None and p.expires_s is not None and now >= p.expires_s]

    def failed(self) -> list[tuple[Prompt, tuple[str, str]]]:
        """Return the prompts whose adapter cannot be loaded, and why."""
        whys = [(prompt, failed_part(None, prompt.seq.held_adapter)) for prompt in self.prompts]
        return [(prompt, why) for prompt, why in whys if why is not None]

    def schedule(self) -> tuple[Batch, list[Prompt]] | None:
        """The next step's chunks and, beside each row, its prompt."""
        self.prompts.sort(key=self._turn)
        budget = self._budget()
        rows: list[BatchRow] = []
        prompts: list[Prompt] = []
        may_start = True
        for prompt in self.prompts:
            if budget == 0 or len(rows) == self._max_num_seqs:
                break
            if prompt.started_s is None:
                if self._awaits(prompt):
                    continue
                # The first that waits for blocks is passed by those alone that hold theirs, or it would wait for ever.
                may_start = may_start and self._start(prompt)
                if not may_start:
                    continue
            if not prompt.seq.num_computable_tokens:
                continue
            num_tokens = self._chunk(prompt.seq, budget, is_first=not rows)
            rows.append(BatchRow(prompt.seq, num_tokens))
            prompts.append(prompt)
            budget = max(0, budget - num_tokens)
        batch = self.cache.begin(Batch(rows)) if rows else None
        return (batch, prompts) if batch is not None else None

    def _chunk(self, seq: Sequence, budget: int, *, is_first: bool) -> int:
        """Tokens of a prompt; a short rest goes along where it may, for it would be a step of its own."""
        rest = seq.num_uncomputed_tokens - budget
        if is_first and 0 < rest <= self._min_chunk and seq.num_uncomputed_tokens <= self._max_num_batched_tokens:
            return seq.num_uncomputed_tokens
        return min(budget, seq.num_uncomputed_tokens)

    def _budget(self) -> int:
        """Tokens of the next step."""
        max_step_s = min(self.max_step_s, BACKGROUND_STEP_S) if self._is_background else self.max_step_s
        affordable = max(self._min_chunk, int(max_step_s / self._s_per_token))
        return min(self._max_num_batched_tokens, affordable)

    @property
    def _min_chunk(self) -> int:
        return MIN_CHUNK_TOKENS if self._is_background or self.max_step_s < MAX_STEP_S else MIN_STEP_TOKENS

    @property
    def _is_background(self) -> bool:
        """True where nobody waits for any of the prompts: the first one is of the highest class."""
        return bool(self.prompts) and self.prompts[0].seq.priority == BACKGROUND_PRIORITY

    def complete(self, prompt: Prompt, num_tokens: int) -> bool:
        """Count a row's tokens as computed and publish its full blocks. True when the prompt is done.

        A prompt that is done leaves the scheduler; its blocks stay its owner's.
        """
        seq = prompt.seq
        seq.num_computed_tokens += num_tokens
        for index in range(seq.num_published_blocks, seq.num_computed_tokens // self._pool.block_size):
            self._pool.publish(seq.block_table[index], name_of(seq, index), spare=seq.is_retained_elsewhere)
            seq.num_published_blocks = index + 1
        if seq.num_uncomputed_tokens == 0:
            self.prompts.remove(prompt)
            return True
        return False

    def observe(self, step_s: float, num_tokens: int) -> None:
        """Learn the speed from a finished step."""
        value, known = step_s / num_tokens, self._s_per_token
        if num_tokens >= _WHOLE_STEP and not self._is_measured:
            self._s_per_token, self._is_measured = value, True
            return
        weight = _SMOOTHING * min(1.0, num_tokens / _WHOLE_STEP)
        self._s_per_token += weight * (min(value, _OUTLIER * known) - known)

    def remove(self, prompt: Prompt) -> None:
        """Forget a prompt that is not done. Its blocks stay its owner's (`Sequence.block_table`)."""
        if prompt in self.prompts:
            self.prompts.remove(prompt)
        self.cache.forget(prompt.seq)

    def _awaits(self, prompt: Prompt) -> bool:
        """Is KV of it on its way from elsewhere, or its adapter? It starts when that is here."""
        if prompt.seq.is_fetching or not prompt.seq.may_begin:
            return True
        return self.cache.awaits(prompt.seq, lambda: self.reusable_hashes(prompt))

    def reusable_hashes(self, prompt: Prompt) -> list[bytes]:
        """Return the hashes of the blocks that need not be computed, if anybody has them."""
        seq = prompt.seq
        seq.block_hashes = hash_blocks(seq.token_ids, self._pool.block_size, prompt.salt, seq.block_hashes)
        if not reuses_prefix(seq.sampling, seq.pooling):
            return []
        # The last token is always computed: its logits choose the first output token.
        return seq.block_hashes[: (seq.num_tokens - 1) // self._pool.block_size]

    def _num_blocks(self, seq: Sequence) -> int:
        return -(-seq.num_tokens // self._pool.block_size)

    def _start(self, prompt: Prompt) -> bool:
        """Give the prompt its blocks: what the prefix cache has in any tier, and new ones for the rest."""
        seq, pool = prompt.seq, self._pool
        found = self.cache.find(self.reusable_hashes(prompt), self.cache.thin_rule(seq.num_tokens))
        num_new = self._num_blocks(seq) - len(found.hits)
        if num_new + self.reserve() > pool.num_free_blocks - pool.num_evictable(found.hits.values()):
            return False
        pool.pin(found.hits.values())
        if not seq.is_retained_elsewhere:
            pool.keep(found.hits.values())
        fresh = iter(self.cache.allocate(num_new))
        seq.block_table = [found.hits[n] if n in found.hits else next(fresh) for n in range(self._num_blocks(seq))]
        self.cache.promote(found, seq.block_table)
        self.cache.forget(seq)
        seq.num_cached_tokens = seq.num_computed_tokens = len(found) * pool.block_size
        seq.num_promoted_tokens = (len(found) - found.num_ready) * pool.block_size
        seq.num_published_blocks, seq.num_thin_blocks = found.num_ready, found.num_thin
        if pool.enable_prefix_caching and reuses_prefix(seq.sampling, seq.pooling):
            self.prefix_queries += seq.num_tokens
        self.prefix_hits += seq.num_computed_tokens
        prompt.started_s = self._clock.now()
        return True
