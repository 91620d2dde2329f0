"""The parts of a worker's core, made over one pool: its roles, its receiver, what it lends and what it fetches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..common.clock import Clock
from ..common.grammar import Grammars
from ..common.served import Served
from ..decode.role import DecodeRole
from ..kvcache.blocks import BlockPool
from ..kvcache.contents import Contents
from ..kvcache.prefix_cache import PrefixCache
from ..prefill.role import PrefillRole
from ..prefill.shipments import Shipping
from ..transfer.fetch.fetches import Fetches
from ..transfer.fetch.lending import Lending
from ..transfer.fetch.ranks import Reading
from ..transfer.protocol.handoff import Endpoint
from ..transfer.receive.opens import WatchProcesses
from ..transfer.receive.receiver import KVReceiver
from ..wire.grants import RegionInfo
from .adapters import AdapterCache
from .effects import CoreConfig, Effects


@dataclass(frozen=True, slots=True)
class CoreParts:
    """`CoreParts` makes each part of a core, and holds what they share. The core joins them."""

    config: CoreConfig
    pool: BlockPool
    cache: PrefixCache  # around `pool`
    clock: Clock
    effects: Effects
    grammars: Grammars | None  # None: requests that ask for one are refused
    adapters: AdapterCache | None
    contents: Contents | None  # None: requests are read by their token ids

    def receiver(self, regions: tuple[RegionInfo, ...], watch_processes: WatchProcesses) -> KVReceiver:
        """Make what others write to; `regions`: of every rank's agent through which they do."""
        config = self.config
        return KVReceiver(
            worker_id=config.worker_id,
            incarnation=config.incarnation,
            spec=config.spec,
            tp_size=config.tp_size,
            pool=self.pool,
            regions=regions,
            kv_address=config.kv_address,
            config=config.transfer,
            clock=self.clock,
            version=config.version,
            transport=config.incoming,
            to_router=self.effects.to_router,
            to_peer=self.effects.to_peer,
            rotate=self.effects.rotate,
            watch=watch_processes,
            checks_bytes=config.checks_bytes,
            contents=self.contents,
        )

    def decode_role(self, receiver: KVReceiver) -> DecodeRole:
        """Make the role that adopts what `receiver` takes in."""
        config = self.config
        return DecodeRole(
            pool=self.pool,
            spec=config.spec,
            receiver=receiver,
            clock=self.clock,
            to_router=self.effects.to_router,
            eos_token_ids=config.eos_token_ids,
            max_model_len=config.max_model_len,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            num_swap_blocks=config.num_swap_blocks,
            cache=self.cache,
            tpot_objective_s=config.tpot_objective_s,
            leaving=self.effects.leaving,
            served=self._served,
            speculative=config.speculative,
            keeps_states=config.keeps_states,
            contents=self.contents,
        )

    def prefill_role(self, shipping: Shipping) -> PrefillRole:
        config = self.config
        return PrefillRole(
            pool=self.pool,
            endpoint=self._endpoint(config.outgoing),
            clock=self.clock,
            shipping=shipping,
            to_router=self.effects.to_router,
            eos_token_ids=config.eos_token_ids,
            max_model_len=config.max_model_len,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            own_id=config.worker_id,
            cache=self.cache,
            served=self._served,
            contents=self.contents,
        )

    def fetches(self, reading: Reading, *, reserve: Callable[[], int]) -> Fetches:
        """Make what reads from others; `reserve`: blocks that running answers need to grow.

        Not those for what waits: the prompt that is fetched for is among it.
        """
        config = self.config
        return Fetches(
            pool=self.pool,
            endpoint=self._endpoint(config.outgoing),
            clock=self.clock,
            reading=reading,
            to_peer=self.effects.to_target,
            has_checksums=config.sums_writes,
            needs_checksums=config.transfer.kv_checksum == "on",
            reserve=reserve,
            also_held=self.cache.has_below,
        )

    def lending(self, regions: Callable[[], tuple[RegionInfo, ...]], *, reserve: Callable[[], int]) -> Lending:
        """Make what others read from; `regions`: as they are now. `reserve`: blocks kept for running answers."""
        config = self.config
        return Lending(
            pool=self.pool,
            endpoint=self._endpoint(config.incoming),
            clock=self.clock,
            lease_s=config.transfer.lease_s,
            regions=regions,
            to_peer=self.effects.to_peer,
            sum_blocks=self.effects.sum_loan if config.sums_loans else None,
            needs_checksums=config.transfer.kv_checksum == "on",
            reserve=reserve,
            lift=lambda hashes, num_thin, done: self.cache.lift(hashes, num_thin, done, reserve=reserve()),
        )

    @property
    def _served(self) -> Served:
        return Served(self.config.served_model, self.grammars, self.adapters)

    def _endpoint(self, transport: str) -> Endpoint:
        config = self.config
        return Endpoint(config.spec, config.version, transport, config.tp_size)
