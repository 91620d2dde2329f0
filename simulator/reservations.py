"""A simulated decode worker's promises of blocks: the rules of `transfer.grants`, without agents, leases and fences.

    reserve ─> granted ─open─> under way ─arrive─> arrived ─> adopted
                  └── not opened in time, aborted, writer lost: blocks free again

Hashes, prefix hits, the growth reserve and the share of promised blocks are as in a real worker; a writer that fails
stops writing at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..common.clock import Clock
from ..common.kv_spec import KVCacheSpec
from ..common.messages import Grant, GrantId, GrantInfo, NoCapacity
from ..common.request import BlockId, RequestSpec
from ..kvcache.blocks import BlockPool
from ..transfer.receive.reservations import MAX_PROMISED_SHARE
from .jobs import Job

OPEN_WITHIN_S = 2.0


@dataclass(slots=True, eq=False)
class Reservation:
    """Blocks for one attempt's prompt."""

    spec: RequestSpec
    router_id: str
    hits: list[BlockId]
    blocks: list[BlockId]
    deadline_s: float
    grant: GrantInfo
    writer: str | None = None  # the prefill worker's session that ships
    has_arrived: bool = False
    num_first_tokens: int = 0  # that came with it
    retains_prefix: bool = True  # the prompt's KV for others; False: its writer does


class Reservations:
    """Stands where a real worker has its `KVReceiver`."""

    num_quarantined_blocks = 0

    def __init__(
        self, pool: BlockPool, spec: KVCacheSpec, clock: Clock, job_of: Callable[[str], Job], worker_id: str, life: int
    ) -> None:
        self._pool = pool
        self._spec = spec
        self._clock = clock
        self._job_of = job_of
        self._worker_id = worker_id
        self._life = life
        self._epoch = 0
        self._live: dict[str, Reservation] = {}  # by request id
        self.draining = False
        self.is_active = True
        self.arrived: list[Reservation] = []
        self.num_granted_blocks = 0
        self.prefix_queries = 0
        self.prefix_hits = 0

    def __len__(self) -> int:
        return len(self._live)

    def get(self, request_id: str) -> Reservation | None:
        return self._live.get(request_id)

    def reserve(
        self,
        spec: RequestSpec,
        router_id: str,
        *,
        max_local_tokens: int = 0,
        growth_reserve: int = 0,
        retains_prefix: bool = True,
    ) -> Grant | NoCapacity:
        """Reserve blocks as `KVReceiver.reserve` does."""
        known = self._live.get(spec.request_id)
        if known is not None and known.spec.attempt >= spec.attempt:
            return self._refusal(spec, "stale")
        if known is not None:
            self.drop(known)
        if self.draining:
            return self._refusal(spec, "draining")
        num_tokens, block_size = spec.num_prompt_tokens, self._spec.block_size
        hashes = self._job_of(spec.request_id).block_hashes[: num_tokens // block_size]
        hits = self._pool.match_prefix(hashes)
        num_cached = len(hits) * block_size
        if num_tokens - num_cached <= max_local_tokens:
            return self._refusal(spec, "held", num_cached)
        num_total = self._spec.num_blocks_for(num_tokens)
        reason = self._shortage(num_total, hits, growth_reserve)
        if reason is not None:
            return self._refusal(spec, reason, num_cached)
        self.prefix_queries += num_tokens
        self.prefix_hits += num_cached
        answer = self._grant(spec, router_id, hits, num_total - len(hits))
        self._live[spec.request_id].retains_prefix = retains_prefix
        return answer

    def _grant(self, spec: RequestSpec, router_id: str, hits: list[BlockId], num_new: int) -> Grant:
        self._pool.pin(hits)
        blocks = self._pool.allocate(num_new)
        self._epoch += 1
        grant = GrantInfo(
            grant_id=GrantId(self._worker_id, self._life, self._epoch),
            spec=self._spec,
            kv_address=self._worker_id,
            block_ids=tuple(blocks),
            num_tokens=spec.num_prompt_tokens,
            num_computed_tokens=len(hits) * self._spec.block_size,
            ranks=(),
            open_within_s=OPEN_WITHIN_S,
            mac=b"",
        )
        deadline_s = self._clock.now() + OPEN_WITHIN_S
        self._live[spec.request_id] = Reservation(spec, router_id, hits, blocks, deadline_s, grant)
        self.num_granted_blocks += len(blocks)
        return Grant(request_id=spec.request_id, attempt=spec.attempt, grant=grant)

    def _shortage(self, num_total: int, hits: list[BlockId], growth_reserve: int) -> str | None:
        num_new = num_total - len(hits)
        num_free = self._pool.num_free_blocks - self._pool.num_evictable(hits)
        if num_total > self._pool.num_blocks:
            return "never_fits"
        if num_new > num_free:
            return "blocks"
        if num_new + growth_reserve > num_free:
            return "growth"
        if self.num_granted_blocks + num_new > MAX_PROMISED_SHARE * self._pool.num_blocks and self.num_granted_blocks:
            return "growth"
        return None

    def _refusal(self, spec: RequestSpec, reason: str, num_cached: int = 0) -> NoCapacity:
        return NoCapacity(
            request_id=spec.request_id,
            attempt=spec.attempt,
            reason=reason,
            num_free_blocks=self._pool.num_free_blocks,
            num_cached_tokens=num_cached,
        )

    # --- what becomes of them ---------------------------------------------------------------------------------

    def open(self, grant: GrantInfo, request_id: str, writer: str) -> Reservation | None:
        """A prefill worker begins to ship. None: the promise is over."""
        reservation = self._live.get(request_id)
        if reservation is None or reservation.grant is not grant or reservation.writer is not None:
            return None
        reservation.writer = writer
        return reservation

    def is_live(self, reservation: Reservation) -> bool:
        return self._live.get(reservation.spec.request_id) is reservation

    def arrive(self, reservation: Reservation, num_first_tokens: int) -> None:
        reservation.has_arrived, reservation.num_first_tokens = True, num_first_tokens
        self.num_granted_blocks -= len(reservation.blocks)
        self.arrived.append(reservation)

    def adopt(self, reservation: Reservation) -> list[BlockId]:
        """The prompt's blocks, which are the caller's from here on. Full ones are published."""
        self._forget(reservation)
        blocks = reservation.hits + reservation.blocks
        hashes = self._job_of(reservation.spec.request_id).block_hashes
        for block, block_hash in zip(
            blocks[: reservation.grant.num_tokens // self._spec.block_size], hashes, strict=False
        ):
            self._pool.publish(block, block_hash, spare=not reservation.retains_prefix)
        if reservation.retains_prefix:
            self._pool.keep(reservation.hits)
        return blocks

    def drop(self, reservation: Reservation) -> None:
        """Nobody wants it any more, or nobody writes it."""
        self._forget(reservation)
        self._pool.free(reservation.hits + reservation.blocks)

    def _forget(self, reservation: Reservation) -> None:
        del self._live[reservation.spec.request_id]
        if reservation.has_arrived:
            self.arrived.remove(reservation)
        else:
            self.num_granted_blocks -= len(reservation.blocks)

    def lapsed(self) -> list[Reservation]:
        """Return the reservations that nobody opened in time."""
        now = self._clock.now()
        return [r for r in self._live.values() if r.writer is None and now >= r.deadline_s]

    def written_by(self, writer: str) -> list[Reservation]:
        return [r for r in self._live.values() if r.writer == writer and not r.has_arrived]
