"""Two workers that lend and fetch over a LocalNetwork, message by message, as a test drives them.

Every block's pages say whose content they are, layer by layer: what stands in a published block must be its hash's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.kvcache.blocks import BlockPool, hash_blocks
from kvferry.kvcache.thin import thin_rule, twin
from kvferry.tests.fake_clock import FakeClock
from kvferry.transfer.backends.local import LocalBackend, LocalNetwork
from kvferry.transfer.backends.peers import Peers
from kvferry.transfer.fetch.fetches import Fetches
from kvferry.transfer.fetch.lending import Lending
from kvferry.transfer.fetch.ranks import RankReading, RankSumming
from kvferry.transfer.fetch.reader import BlockSums, KVReader
from kvferry.transfer.protocol.checksums import PageSums
from kvferry.transfer.protocol.handoff import Endpoint
from kvferry.transfer.protocol.rank_calls import Each
from kvferry.transfer.protocol.rank_messages import ReadOutcome
from kvferry.transfer.send.ranks import SENDING
from kvferry.wire.fetches import KVFetch, KVFetchable, KVFetchDone, KVFetchRefused, KVFetchSums
from kvferry.wire.fields import Message
from kvferry.wire.grants import RegionInfo
from kvferry.wire.tasks import FetchFrom

SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=1, head_dim=2, block_size=4, dtype="float32")
ENDPOINT = Endpoint(SPEC, "1", "local", 1)
LEASE_S = 3.0
HASHES = hash_blocks(list(range(4 * 24)), 4, b"")
ADDRESS = "lender:1"


class AtOnce:
    """Implements `rank_calls.Calls` on the caller's thread."""

    def call(self, function: object, *args: object) -> None:
        assert callable(function)
        function(*args)

    def call_after(self, event: object, function: object, *args: object) -> None:
        self.call(function, *args)


class Host:
    """Pages and a pool, and what is written into a block when it is filled."""

    def __init__(self, name: str, num_blocks: int, network: LocalNetwork, spec: KVCacheSpec = SPEC) -> None:
        self.name = name
        self.spec = spec
        self.clock = FakeClock(100.0)
        self.pool = BlockPool(num_blocks, SPEC.block_size)
        self.pages = torch.zeros(SPEC.num_layers, num_blocks, 2, 1, SPEC.block_size, SPEC.head_dim)
        self.backend = LocalBackend(f"{name}.1.0.0", network)
        self.region: RegionInfo = self.backend.register(self.pages, rank=0, tp_size=1, generation=0)
        self.generation = 0

    def rotate(self) -> None:
        self.generation += 1
        self.region = self.backend.rotate(self.generation)

    def fill(self, block: int, block_hash: bytes) -> None:
        """As computing does."""
        number = HASHES.index(block_hash)
        for layer in range(SPEC.num_layers):
            self.pages[layer, block] = 1 + number * SPEC.num_layers + layer

    def store(self, hashes: Sequence[bytes], *, keep: bool = False) -> list[int]:
        """Compute blocks and publish them; the least recently used ones give way."""
        blocks = self.pool.allocate(len(hashes))
        for block, block_hash in zip(blocks, hashes, strict=True):
            self.fill(block, block_hash)
            self.pool.publish(block, block_hash)
        if not keep:
            self.pool.free(blocks)
        return blocks

    def check_content(self) -> None:
        """What is found by a hash is what was computed for it."""
        for block, name in self.pool._hash_of.items():
            is_thin = name not in HASHES
            number = HASHES.index(twin(name) if is_thin else name)
            for layer in range(SPEC.num_layers):
                if is_thin and self.spec.is_windowed(layer):
                    continue
                found = self.pages[layer, block]
                assert bool((found == 1 + number * SPEC.num_layers + layer).all()), (
                    f"{self.name}: block {block} of hash {number} holds {set(found.view(-1).tolist())} in layer {layer}"
                )


class Pair:
    """A lender and a fetcher, and the messages between them."""

    fetches_class: type[Fetches] = Fetches
    lending_class: type[Lending] = Lending

    def __init__(
        self,
        *,
        num_blocks: int = 12,
        checksums: bool = False,
        part_blocks: int = 8,
        max_read_pages: int = 1,
        spec: KVCacheSpec = SPEC,
    ) -> None:
        self.network = LocalNetwork()
        endpoint = Endpoint(spec, "1", "local", 1)
        self.lender = Host("lender", num_blocks, self.network, spec)
        self.fetcher = Host("fetcher", num_blocks, self.network, spec)
        self.to_lender: deque[Message] = deque()
        self.to_fetcher: deque[Message] = deque()
        self.ended: list[str] = []
        self.session = 0
        self.peers = Peers(self.fetcher.backend)
        self.reader = KVReader(
            rank=0,
            backend=self.fetcher.backend,
            spec=spec,
            tp_size=1,
            num_blocks=num_blocks,
            clock=self.fetcher.clock,
            peers=self.peers,
            tell=self._on_read,
            sums=PageSums(self.fetcher.pages) if checksums else None,
            max_read_bytes=max_read_pages * SPEC.page_bytes(),
            max_in_flight_bytes=4 * SPEC.page_bytes(),
        )
        self.fetches = self.fetches_class(
            pool=self.fetcher.pool,
            endpoint=endpoint,
            clock=self.fetcher.clock,
            reading=RankReading(Each(SENDING, AtOnce(), None), self.reader),
            to_peer=lambda address, message: self.to_lender.append(message),
            has_checksums=checksums,
            part_bytes=part_blocks * SPEC.block_bytes(),
        )
        sums = BlockSums(PageSums(self.lender.pages), spec, 1, num_blocks)
        summing = RankSumming(0, sums, lambda rank, fetch, found: self._on_sums(rank, fetch, found))
        self.lending = self.lending_class(
            pool=self.lender.pool,
            endpoint=endpoint,
            clock=self.lender.clock,
            lease_s=LEASE_S,
            regions=lambda: (self.lender.region,),
            to_peer=lambda session, message: self.to_fetcher.append(message),
            sum_blocks=summing.sum_blocks if checksums else None,
        )

    def _on_read(self, fetch_id: int, outcome: ReadOutcome, sums: bytes) -> None:
        self.fetches.on_read(0, fetch_id, outcome, sums)

    def _on_sums(self, rank: int, fetch_id: int, checksum: bytes) -> None:
        self.lending.on_sums(rank, fetch_id, checksum)

    def begin(
        self, hashes: Sequence[bytes], key: str = "q", within_s: float = 10.0, num_blocks: int | None = None
    ) -> bool:
        """`num_blocks`: that the lender is said to have; None: all."""
        num_tokens = SPEC.block_size * (len(hashes) if num_blocks is None else num_blocks)
        source = FetchFrom(worker_id="lender", kv_address=ADDRESS, num_tokens=num_tokens, within_s=within_s)
        return self.fetches.begin(key, hashes, source, thin_rule(self.lender.spec), lambda: self.ended.append(key))

    def deliver(self, *, to_lender: bool) -> bool:
        """One message."""
        if to_lender and self.to_lender:
            message = self.to_lender.popleft()
            assert isinstance(message, KVFetch | KVFetchDone)
            self.lending.on_message(f"s{self.session}", message)
        elif not to_lender and self.to_fetcher:
            answer = self.to_fetcher.popleft()
            assert isinstance(answer, KVFetchable | KVFetchSums | KVFetchRefused)
            self.fetches.on_message(answer)
        else:
            return False
        return True

    def cut(self) -> None:
        """The control connection breaks with all that is under way."""
        self.to_lender.clear()
        self.to_fetcher.clear()
        self.session += 1
        self.fetches.on_peer_lost(ADDRESS)

    def advance(self, seconds: float, *, drift: float = 0.0) -> None:
        self.lender.clock.advance(seconds * (1 + drift))
        self.fetcher.clock.advance(seconds * (1 - drift))

    def tick(self) -> None:
        self.lending.tick()
        self.fetches.tick()

    def settle(self, rounds: int = 200) -> None:
        """Deliver and step until nothing moves."""
        for _ in range(rounds):
            moved = self.deliver(to_lender=True) | self.deliver(to_lender=False)
            self.reader.step()
            if not moved and not self.reader.made_progress:
                return

    def check(self) -> None:
        """Books and content of both."""
        for host, held in ((self.lender, self.lending.references()), (self.fetcher, self.fetches.references())):
            host.pool.check()
            host.check_content()
            counts = [0] * host.pool.num_blocks
            for blocks in held:
                for block in blocks:
                    counts[block] += 1
            assert all(host.pool.ref_count(block) >= counts[block] for block in range(host.pool.num_blocks))
        self.fetches.check()
