"""Prefixes that one worker reads from another, in time and blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from kvferry.common.messages import FetchFrom
from kvferry.common.request import Sequence as TokenSequence
from kvferry.kvcache.blocks import BlockPool
from kvferry.simulator.costs.network import Link, Port
from kvferry.simulator.fetches import SimFetches
from kvferry.simulator.jobs import Job, make_request
from kvferry.simulator.kernel import Kernel

BLOCK = 16
HASHES = [bytes([number]) * 16 for number in range(8)]


class Peer:
    """A lender of six blocks; time is the kernel's."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.sending = Port()

    def lend(self, worker_id: str, hashes: Sequence[bytes], answer: Callable[[int, Link, Port], None]) -> bool:
        count = sum(value in set(HASHES[:6]) for value in hashes)
        if count:
            answer(count, Link(BLOCK * 10.0, 0.5), self.sending)  # ten blocks a second
        return count > 0

    def at(self, time_s: float, handler: Callable[..., None], *args: object) -> None:
        self.kernel.at(time_s, handler, *args)


def _fetches(kernel: Kernel, pool: BlockPool) -> SimFetches:
    return SimFetches(pool, kernel, Peer(kernel), Port(), token_bytes=1, reserve=lambda: 2)


def _prompt() -> TokenSequence:
    job = Job(0, 0.0, 8 * BLOCK, 1, HASHES)
    return job.sequence(make_request(job, 16, BLOCK).spec(None))


def _waits(seq: TokenSequence) -> bool:
    return seq.is_fetching


def _run(kernel: Kernel) -> None:
    kernel.run(lambda: False)


def test_what_is_missing_is_read_and_found_from_then_on() -> None:
    kernel, pool = Kernel(), BlockPool(16, BLOCK)
    [own] = pool.allocate(1)
    pool.publish(own, HASHES[0])
    fetches, seq = _fetches(kernel, pool), _prompt()
    assert fetches.begin(seq, FetchFrom(worker_id="w", kv_address="w", num_tokens=6 * BLOCK, within_s=2.0))
    assert _waits(seq)
    _run(kernel)
    assert kernel.now() == pytest.approx(5 / 10 + 0.5)
    assert not _waits(seq) and len(pool.match_prefix(HASHES)) == 6
    assert pool.num_owned_blocks == 1 and fetches.num_bytes == 5 * BLOCK


def test_a_fetch_that_takes_longer_than_its_patience_brings_nothing() -> None:
    kernel, pool = Kernel(), BlockPool(16, BLOCK)
    fetches, seq = _fetches(kernel, pool), _prompt()
    assert fetches.begin(seq, FetchFrom(worker_id="w", kv_address="w", num_tokens=6 * BLOCK, within_s=0.8))
    _run(kernel)
    assert kernel.now() == pytest.approx(0.8)
    assert not _waits(seq) and not pool.match_prefix(HASHES)


def test_as_much_is_kept_as_there_is_room_for() -> None:
    kernel, pool = Kernel(), BlockPool(5, BLOCK)
    fetches, seq = _fetches(kernel, pool), _prompt()
    assert fetches.begin(seq, FetchFrom(worker_id="w", kv_address="w", num_tokens=6 * BLOCK, within_s=2.0))
    _run(kernel)
    assert len(pool.match_prefix(HASHES)) == 3


def test_nothing_is_fetched_that_nobody_has() -> None:
    kernel, pool = Kernel(), BlockPool(16, BLOCK)
    for value in HASHES[:6]:
        [block] = pool.allocate(1)
        pool.publish(block, value)
    fetches, seq = _fetches(kernel, pool), _prompt()
    assert not fetches.begin(seq, FetchFrom(worker_id="w", kv_address="w", num_tokens=8 * BLOCK))
    assert not _waits(seq)
