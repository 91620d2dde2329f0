"""One rank's reads: how much is under way, what is told of them, and how long something may still land."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvferry.common.errors import TransferError
from kvferry.tests.fake_clock import FakeClock
from kvferry.transfer.backends.base import TransferHandle
from kvferry.transfer.backends.local import LocalBackend, LocalFault, LocalHandle, LocalNetwork
from kvferry.transfer.backends.peers import Peers
from kvferry.transfer.fetch.reader import FAILED_AFTER_S, MIN_INTERVAL_S, STUCK_AFTER_S, KVReader
from kvferry.transfer.protocol.checksums import PageSums
from kvferry.transfer.protocol.rank_messages import ReadOutcome

from .fetch_hosts import ADDRESS, SPEC

NUM_BLOCKS = 8
DONE, FAILED, OVER = ReadOutcome.DONE, ReadOutcome.FAILED, ReadOutcome.OVER


class Backend(LocalBackend):
    num_held = 0  # posted and not released

    def read(self, *args: Any) -> LocalHandle:
        handle = super().read(*args)
        self.num_held += 1
        return handle

    def release(self, handle: TransferHandle) -> None:
        self.num_held -= 1


class Bench:
    """A reader, the pages that it reads into, and the agent that it reads from."""

    def __init__(self, *, max_read_pages: float = 2, max_in_flight_pages: float = 4, checksums: bool = False) -> None:
        self.clock, self.network = FakeClock(100.0), LocalNetwork()
        shape = (SPEC.num_layers, NUM_BLOCKS, *SPEC.page_shape())
        self.theirs, self.ours = torch.rand(shape, generator=torch.manual_seed(1)), torch.zeros(shape)
        self.lender = LocalBackend("d-0.1.0.0", self.network)
        self.region = self.lender.register(self.theirs, rank=0, tp_size=1, generation=0)
        self.backend = Backend("p-0.1.0.0", self.network)
        self.backend.register(self.ours, rank=0, tp_size=1, generation=0)
        self.peers = Peers(self.backend)
        self.told: list[tuple[int, ReadOutcome]] = []
        self.sums = b""
        self.reader = KVReader(
            rank=0,
            backend=self.backend,
            spec=SPEC,
            tp_size=1,
            num_blocks=NUM_BLOCKS,
            clock=self.clock,
            peers=self.peers,
            tell=self._tell,
            sums=PageSums(self.ours) if checksums else None,
            max_read_bytes=int(max_read_pages * SPEC.page_bytes()),
            max_in_flight_bytes=int(max_in_flight_pages * SPEC.page_bytes()),
        )

    def _tell(self, fetch_id: int, outcome: ReadOutcome, sums: bytes) -> None:
        self.told.append((fetch_id, outcome))
        self.sums += sums

    def begin(self, fetch_id: int = 1, *, wants_sums: bool = False) -> None:
        """Read three blocks, six pages."""
        self.reader.begin(fetch_id, ADDRESS, (self.region,), (5, 2, 7), (1, 3, 0), 0, wants_sums)

    def steps(self, count: int = 6) -> list[tuple[int, ReadOutcome]]:
        """What is told in so many steps."""
        self.told.clear()
        for _ in range(count):
            self.reader.step()
        return list(self.told)

    def wants_new_agent(self) -> bool:
        return self.reader.wants_new_agent(self.clock.now())

    def replace_agent(self) -> None:
        self.backend.rotate(int(self.backend.agent.split(".")[2]) + 1)
        self.peers.clear()
        self.reader.agent_replaced(self.clock.now())


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(("checksums", "wants_sums"), [(True, False), (True, True), (False, True)])
def test_a_read_is_done_when_every_page_is_here(checksums: bool, wants_sums: bool) -> None:
    bench = Bench(checksums=checksums)
    assert bench.reader.step() is None
    bench.begin(wants_sums=wants_sums)
    assert (bench.reader.step(), bench.reader.made_progress, bench.reader.num_unfinished) == (0.0, True, 1)
    assert bench.steps() == [(1, DONE)]
    assert (bench.reader.made_progress, bench.reader.step(), bench.reader.num_unfinished) == (False, None, 0)
    assert torch.equal(bench.ours[:, [5, 2, 7]], bench.theirs[:, [1, 3, 0]])
    assert not bench.ours[:, [0, 1, 3, 4, 6]].any()
    assert bench.reader.num_bytes == 6 * SPEC.page_bytes() and len(bench.sums) == 3 * 8 * (checksums and wants_sums)


@pytest.mark.parametrize(
    ("max_read_pages", "max_in_flight_pages", "posted"),
    [(2, 4, [2, 2]), (2, 1, [2]), (0.5, 3, [1, 1, 1]), (4, 9, [4, 2])],
)
def test_so_much_is_under_way_at_once(max_read_pages: float, max_in_flight_pages: float, posted: list[int]) -> None:
    bench = Bench(max_read_pages=max_read_pages, max_in_flight_pages=max_in_flight_pages)
    bench.network.set_fault(bench.region.agent, LocalFault.HOLD)
    bench.begin()
    assert bench.steps(1) == [] and bench.reader.made_progress
    assert bench.steps() == [] and [len(handle.local_pages) for handle in bench.network.late] == posted
    bench.network.clear_fault(bench.region.agent)
    assert bench.steps() == [(1, DONE)]


def test_what_is_given_up_is_over_when_what_was_posted_has_ended(bench: Bench) -> None:
    bench.reader.give_up(1)  # never begun, or done
    bench.network.set_fault(bench.region.agent, LocalFault.HOLD)
    bench.begin()
    bench.reader.step()
    bench.reader.give_up(1)
    wait_s = bench.reader.step()
    assert wait_s is not None and 0.0 < wait_s < 0.1
    assert bench.steps() == [] and len(bench.network.late) == 1
    bench.network.clear_fault(bench.region.agent)
    assert bench.steps(1) == [(1, OVER)] and bench.reader.made_progress
    assert not bench.reader.num_unfinished and not bench.backend.num_held


def test_what_fails_is_told_once_and_over_when_our_agent_is_gone(bench: Bench) -> None:
    bench.network.set_fault(bench.region.agent, LocalFault.HOLD)
    bench.begin()
    bench.steps(2)
    bench.lender.close()  # both of its posts fail
    assert bench.steps() == [(1, FAILED)] and bench.reader.num_unfinished == 1 and not bench.backend.num_held
    bench.clock.advance(FAILED_AFTER_S - 0.1)
    assert not bench.wants_new_agent()
    bench.clock.advance(0.1)
    assert bench.wants_new_agent()
    bench.replace_agent()
    assert bench.steps() == [(1, OVER)] and not bench.wants_new_agent()


def test_what_was_given_up_and_fails_then_may_land_until_our_agent_is_gone(bench: Bench) -> None:
    bench.network.set_fault(bench.region.agent, LocalFault.HOLD)
    bench.begin()
    bench.reader.step()
    bench.reader.give_up(1)
    bench.lender.close()
    assert bench.steps() == [] and bench.reader.num_unfinished == 1, "nobody waits to hear that it failed"
    bench.replace_agent()
    assert bench.steps() == [(1, OVER)]


def test_a_read_that_neither_ends_nor_fails_gets_longer_and_counts_from_its_first_end(bench: Bench) -> None:
    bench.network.set_fault(bench.region.agent, LocalFault.HOLD)
    bench.begin()
    bench.reader.step()
    bench.clock.advance(STUCK_AFTER_S)
    assert not bench.wants_new_agent(), "it is waited for"
    bench.reader.give_up(1)
    bench.clock.advance(STUCK_AFTER_S - 0.1)
    bench.reader.give_up(1)
    assert not bench.wants_new_agent()
    bench.clock.advance(0.1)
    assert bench.wants_new_agent()


def test_our_agents_keep_their_distance(bench: Bench) -> None:
    bench.replace_agent()
    bench.network.set_fault(bench.region.agent, LocalFault.FAIL)
    bench.begin()
    assert bench.steps() == [(1, FAILED)]
    bench.clock.advance(MIN_INTERVAL_S - 0.1)
    assert not bench.wants_new_agent()
    bench.clock.advance(0.1)
    assert bench.wants_new_agent()


def test_of_what_was_never_posted_nothing_lands(bench: Bench) -> None:
    bench.network.set_fault(bench.region.agent, LocalFault.GONE)
    bench.begin()
    assert bench.steps() == [(1, FAILED), (1, OVER)]


@pytest.mark.parametrize("may_land", [False, True])
def test_a_post_that_raises_may_have_begun(bench: Bench, may_land: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: object) -> None:
        raise TransferError("no", may_land=may_land)

    monkeypatch.setattr(bench.backend, "read", read)
    bench.begin()
    assert bench.steps() == ([(1, FAILED)] if may_land else [(1, FAILED), (1, OVER)])


def test_a_connection_is_kept_while_something_is_read_over_it(bench: Bench) -> None:
    bench.network.set_fault(bench.region.agent, LocalFault.HOLD)
    bench.begin()
    bench.reader.step()
    for is_read in (True, False):
        bench.peers.peer_lost(ADDRESS)
        bench.peers.forget_lost()
        assert (bench.region.agent in bench.backend._pieces) is is_read
        bench.network.clear_fault(bench.region.agent)
        bench.steps()
