"""Promises of blocks: what a prompt needs here beyond what is cached, and the grant that lets somebody ask to fill it.

    ReserveKV ─> blocks pinned (hits) and allocated ─> Grant, minted      or NoCapacity, which says why

A grant names the agents of now; if they have been replaced by the time it is opened, its KVOpened names the new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ...common.clock import Clock
from ...common.config import TransferConfig
from ...common.kv_spec import KVCacheSpec
from ...common.request import BlockId, RequestSpec
from ...kvcache.blocks import BlockPool
from ...kvcache.contents import Contents
from ...kvcache.thin import leading, thin_rule, usable
from ...wire.grants import GrantId, GrantInfo
from ...wire.results import Grant, NoCapacity
from ..protocol.handoff import mint_grant, num_thin_behind
from .endings import Counters, Endings
from .reservation import Reservation, ReservationState
from .reservations import Kept, Reservations
from .rotation import Rotation


class Grants:
    """Makes reservations. Their epochs are never used again within an incarnation."""

    def __init__(
        self,
        *,
        worker_id: str,
        incarnation: int,
        spec: KVCacheSpec,
        pool: BlockPool,
        reservations: Reservations,
        endings: Endings,
        rotation: Rotation,
        counters: Counters,
        kv_address: str,
        key: bytes,
        config: TransferConfig,
        clock: Clock,
        contents: Contents,
    ) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._spec = spec
        self._pool = pool
        self._reservations = reservations
        self._endings = endings
        self._rotation = rotation
        self._counters = counters
        self._kv_address = kv_address
        self._key = key
        self._config = config
        self._clock = clock
        self._contents = contents
        self._epoch = 0

    def reserve(
        self,
        spec: RequestSpec,
        router_id: str,
        *,
        max_local_tokens: int,
        growth_reserve: int,
        kept: Kept,
        hashes: Callable[[], list[bytes]] | None = None,
        refusal: str = "",
    ) -> Grant | NoCapacity:
        """Reserve, as `KVReceiver.reserve`. `refusal`: why nothing new is granted; empty: it is."""
        known = self._reservations.of_request(spec.request_id)
        if known is not None and known.spec.attempt == spec.attempt and known.state is ReservationState.GRANTED:
            return Grant(request_id=spec.request_id, attempt=spec.attempt, grant=known.grant)
        if self._reservations.is_stale(spec.request_id, spec.attempt):
            self._counters.stale_messages += 1
            return self._no_capacity(spec, "stale")
        if known is not None:
            self._endings.drop(known, "a newer attempt has begun")
        if refusal:
            return self._no_capacity(spec, refusal)
        found = hashes() if hashes is not None else self._contents.prompt_hashes(spec)
        return self._grant(spec, router_id, found, max_local_tokens, growth_reserve, kept)

    def _grant(
        self,
        spec: RequestSpec,
        router_id: str,
        hashes: list[bytes],
        max_local_tokens: int,
        growth_reserve: int,
        kept: Kept,
    ) -> Grant | NoCapacity:
        num_tokens, block_size = spec.num_prompt_tokens, self._spec.block_size
        if num_tokens - (num_held := self._num_held(hashes) * block_size) <= max_local_tokens:
            return self._no_capacity(spec, "held", num_held)
        hits = self._pool.match_prefix(leading(hashes, self._pool.knows, self._spec.num_left_out(num_tokens)))
        num_cached = len(hits) * block_size
        if self._rotation.timer.has_failed:
            return self._no_capacity(spec, "no_agent", num_cached)
        num_copies = len(spec.choices) - 1 if num_tokens % block_size else 0
        num_total = self._spec.num_blocks_for(num_tokens) + num_copies
        num_thin = num_thin_behind(self._spec, num_tokens, len(hits), num_total - len(hits))
        lacks = partial(self._reservations.shortage, num_total, hits, growth_reserve, kept, num_thin=num_thin)
        reason = lacks()
        if reason is not None:
            if lacks(without_quarantine=True) is None:
                self._rotation.want()
            return self._no_capacity(spec, reason, num_cached)
        self._pool.pin(hits)
        blocks = self._pool.allocate(num_total - len(hits), num_thin)
        if self._pool.enable_prefix_caching:
            self._counters.prefix_queries += num_tokens
        self._counters.prefix_hits += num_cached
        reservation = self._new_reservation(spec, router_id, hashes, hits, blocks, num_copies)
        return Grant(request_id=spec.request_id, attempt=spec.attempt, grant=reservation.grant)

    def _num_held(self, hashes: list[bytes]) -> int:
        """Count the leading blocks from which the prompt could be computed on here."""
        return len(usable(hashes, self._pool.knows, thin_rule(self._spec)))

    def _no_capacity(self, spec: RequestSpec, reason: str, num_cached_tokens: int = 0) -> NoCapacity:
        return NoCapacity(
            request_id=spec.request_id,
            attempt=spec.attempt,
            reason=reason,
            num_free_blocks=self._pool.num_free_blocks,
            num_cached_tokens=num_cached_tokens,
        )

    def _new_reservation(
        self,
        spec: RequestSpec,
        router_id: str,
        hashes: list[bytes],
        hits: list[BlockId],
        blocks: list[BlockId],
        num_copies: int,
    ) -> Reservation:
        self._epoch += 1
        num_shipped = len(blocks) - num_copies
        grant = GrantInfo(
            grant_id=GrantId(self._worker_id, self._incarnation, self._epoch),
            spec=self._spec,
            kv_address=self._kv_address,
            block_ids=tuple(blocks[:num_shipped]),
            num_tokens=spec.num_prompt_tokens,
            num_computed_tokens=len(hits) * self._spec.block_size,
            ranks=self._rotation.regions,
            open_within_s=self._config.open_within_s,
            mac=b"",
        )
        now = self._clock.now()
        reservation = Reservation(
            spec=spec,
            router_id=router_id,
            grant=mint_grant(self._key, grant, spec.request_id, spec.attempt),
            block_hashes=hashes,
            hit_blocks=hits,
            block_ids=blocks[:num_shipped],
            copy_blocks=blocks[num_shipped:],
            deadline=now + self._config.open_within_s,
            since=now,
        )
        self._reservations.add(reservation)
        return reservation
