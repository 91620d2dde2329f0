"""Prefixes that one simulated worker reads from another, in time and blocks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvferry.simulator import Fleet, Router, Scenario, Traffic
from kvferry.simulator.costs.network import Link, Network
from kvferry.simulator.jobs import Job, make_request
from kvferry.simulator.worker import SimWorker
from kvferry.simulator.world import World
from kvferry.tools.load.traces import TraceRow
from kvferry.transfer.fetch.fetch import FetchFailure
from kvferry.wire.tasks import FetchFrom, LocalTask

BLOCK = 64  # tokens
BLOCK_BYTES = BLOCK * 327_680  # of the model that fleets have where none is named
HASHES = [bytes([number]) * 16 for number in range(8)]


@dataclass
class Pair:
    """A reader that has the first block of a prompt of eight, and a lender of six. Ten blocks cross in a second."""

    world: World
    reader: SimWorker
    lender: SimWorker

    @classmethod
    def make(cls, num_lent: int = 6) -> Pair:
        fleet = Fleet(
            prefill=0,
            decode=2,
            block_tokens=BLOCK,
            prefix_caching=True,
            network=Network(Link(10.0 * BLOCK_BYTES, latency_s=0.5)),
        )
        row = TraceRow(0.0, 8 * BLOCK, 1)
        world = World(Scenario(Traffic((row,)), fleet, router=Router(knows_objectives=False), message_s=0.0))
        pair = cls(world, world.workers["decode-0"], world.workers["decode-1"])
        _store(pair.reader, HASHES[:1])
        _store(pair.lender, HASHES[:num_lent])
        return pair

    def ask(self, within_s: float) -> None:
        """Have the reader compute the prompt, after a fetch of its beginning."""
        job = self.world.jobs["0"] = Job(0, 0.0, 8 * BLOCK, 1, HASHES)
        source = FetchFrom(
            worker_id=self.lender.worker_id,
            kv_address=self.lender.address,
            num_tokens=8 * BLOCK,
            within_s=within_s,
        )
        self.reader.send(LocalTask(spec=make_request(job, 16, BLOCK).spec(None), fetch=source))

    def run(self, until_s: float) -> None:
        self.world.kernel.at(until_s, int)
        self.world.kernel.run(lambda: self.world.kernel.now() >= until_s)

    @property
    def num_found(self) -> int:
        return len(self.reader.pool.match_prefix(HASHES))

    @property
    def failures(self) -> list[FetchFailure]:
        return list(self.reader.core.fetches.failures)


def _store(worker: SimWorker, hashes: list[bytes]) -> None:
    blocks = worker.pool.allocate(len(hashes))
    for block, value in zip(blocks, hashes, strict=True):
        worker.pool.publish(block, value)
    worker.pool.free(blocks)


def test_what_is_missing_is_read_and_found_from_then_on() -> None:
    pair = Pair.make()
    pair.ask(within_s=2.0)
    pair.run(until_s=0.999)
    assert pair.num_found == 1 and len(pair.reader.core.fetches) == 1
    pair.run(until_s=1.001)  # five blocks, and the link's latency
    assert pair.num_found == 6
    pair.run(until_s=1.5)
    assert pair.reader.core.fetches.seconds == pytest.approx(1.0)
    # The seventh is gone over there; it is computed, and the last block always is.
    assert pair.failures == [FetchFailure.EVICTED]
    assert pair.num_found == 8 and pair.world.leftovers() == []


def test_a_fetch_that_takes_longer_than_its_patience_brings_nothing() -> None:
    pair = Pair.make()
    pair.ask(within_s=0.6)
    pair.run(until_s=0.9)
    assert pair.failures == [FetchFailure.LATE]
    assert pair.num_found == 8  # computed here
    assert pair.reader.core.fetches.given_up.num_blocks == 5  # bytes are still on their way into them
    assert pair.world.leftovers() == []


def test_a_prompt_whose_lender_dies_is_computed() -> None:
    pair = Pair.make()
    pair.ask(within_s=2.0)
    pair.run(until_s=0.3)
    pair.world.kill(pair.lender.worker_id, None)
    pair.run(until_s=0.8)
    assert pair.failures == [FetchFailure.PEER_LOST]
    assert pair.num_found == 8 and pair.world.leftovers() == []


def test_nothing_is_fetched_that_nobody_has() -> None:
    pair = Pair.make(num_lent=0)
    pair.ask(within_s=2.0)
    pair.run(until_s=0.4)
    assert pair.failures == [FetchFailure.REFUSED]
    assert pair.num_found == 8 and pair.world.leftovers() == []
