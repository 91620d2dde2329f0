"""Fetches under faults in any order: nothing wrong is ever published, nothing is lost, and everything ends.

The lender, the fetcher and the reader are real; messages are lost with their connection, reads are held, fail and land
late, agents are replaced, either side evicts and fills blocks anew at any moment, and stands still for any time.
Each rule that the protocol rests on is taken out once, with the shortest trace that then ends in a wrong block.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvferry.common.errors import CapacityError
from kvferry.common.request import BlockId
from kvferry.transfer.backends.local import LocalFault
from kvferry.transfer.fetch.fetch import Part
from kvferry.transfer.fetch.fetches import Fetches
from kvferry.transfer.fetch.lending import Lending
from kvferry.wire.fetches import KVFetch, KVFetchDone

from .fetch_hosts import HASHES, Host, Pair

DRIFT = 1e-3


class FetchMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(num_blocks=12, part_blocks=2)
        self.kept: list[tuple[str, list[BlockId]]] = []  # of running sequences, on either side
        self.number = 0

    @rule(first=st.integers(0, 8), count=st.integers(1, 4), within_s=st.sampled_from([0.1, 2.0, 20.0]))
    def begin(self, first: int, count: int, within_s: float) -> None:
        self.number += 1
        self.pair.begin(HASHES[first : first + count], f"q{self.number}", within_s)

    @rule(to_lender=st.booleans())
    def deliver(self, to_lender: bool) -> None:
        self.pair.deliver(to_lender=to_lender)

    @rule()
    def step(self) -> None:
        self.pair.reader.step()

    @rule()
    def all_goes_well(self) -> None:
        self.pair.settle(rounds=12)

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0, 2.8, 3.1]), drift=st.sampled_from([-DRIFT, 0.0, DRIFT]))
    def wait(self, seconds: float, drift: float) -> None:
        self.pair.advance(seconds, drift=drift)

    @rule()
    def tick_lender(self) -> None:
        self.pair.lending.tick()

    @rule()
    def tick_fetcher(self) -> None:
        self.pair.fetches.tick()

    @rule()
    def cut(self) -> None:
        self.pair.cut()

    @rule(
        side=st.sampled_from(["lender", "fetcher"]),
        first=st.integers(0, 16),
        count=st.integers(1, 6),
        keep=st.booleans(),
    )
    def compute(self, side: str, first: int, count: int, keep: bool) -> None:
        """New blocks, for which cached ones give way: what was in them is overwritten."""
        host = getattr(self.pair, side)
        try:
            blocks = host.store(HASHES[first : first + count], keep=keep)
        except CapacityError:
            return
        if keep:
            self.kept.append((side, blocks))

    @rule(side=st.sampled_from(["lender", "fetcher"]))
    def overwrite(self, side: str) -> None:
        """Everything that is not held gets another content."""
        _overwrite(getattr(self.pair, side))

    @rule(first=st.integers(0, 8))
    def fetcher_stands_still(self, first: int) -> None:
        """With all that is asked for under way, while the lender goes on."""
        pair = self.pair
        pair.tick()
        if pair.lender.pool.num_free_blocks > 1:
            pair.lender.store(HASHES[first : first + 2])
        self.begin(first, 2, 20.0)
        pair.deliver(to_lender=True)
        pair.deliver(to_lender=False)
        pair.reader.step()
        pair.advance(3.1)
        pair.lending.tick()

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        side, blocks = self.kept.pop(data.draw(st.integers(0, len(self.kept) - 1)))
        getattr(self.pair, side).pool.free(blocks)

    @rule(fault=st.sampled_from([LocalFault.HOLD, LocalFault.FAIL]))
    def break_path(self, fault: LocalFault) -> None:
        self.pair.network.set_fault(self.pair.lender.region.agent, fault)

    @rule()
    def mend_path(self) -> None:
        self.pair.network.clear_fault(self.pair.lender.region.agent)

    @rule()
    def lender_rotates(self) -> None:
        self.pair.lender.rotate()

    @rule()
    def fetcher_rotates(self) -> None:
        self.pair.fetcher.rotate()
        self.pair.peers.clear()
        self.pair.reader.agent_replaced(self.pair.fetcher.clock.now())

    @precondition(lambda self: self.number)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.pair.fetches.cancel(f"q{data.draw(st.integers(1, self.number))}")

    @invariant()
    def nothing_wrong_is_found(self) -> None:
        self.pair.check()

    def teardown(self) -> None:
        """Faults stop: every block comes back, and every prompt was told, or cancelled, once."""
        pair = self.pair
        for side, blocks in self.kept:
            getattr(pair, side).pool.free(blocks)
        pair.network.clear_fault(pair.lender.region.agent)
        for _ in range(4):
            pair.settle()
            pair.advance(5.0)
            pair.tick()
        if pair.reader.wants_new_agent(pair.fetcher.clock.now()):
            self.fetcher_rotates()
        pair.settle()
        pair.check()
        assert not len(pair.lending) and not len(pair.fetches) and not pair.reader.num_unfinished
        assert pair.lender.pool.num_owned_blocks == pair.fetcher.pool.num_owned_blocks == 0
        assert len(pair.ended) == len(set(pair.ended)) <= self.number


SETTINGS = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestFetchMachine = pytest.mark.slow(FetchMachine.TestCase)
TestFetchMachine.settings = SETTINGS


class _NoLeaseCheck(Fetches):
    """What has been read is taken, whenever the read has ended."""

    def on_message(self, message: object) -> None:
        super().on_message(message)  # type: ignore[arg-type]
        for fetch in self._fetches.values():
            if fetch.part is not None and fetch.part.deadline is not None:
                fetch.part.deadline = float("inf")


class _FreesAtOnce(Fetches):
    """The blocks of a read that is not waited for any more are free."""

    def _give_back(self, part: Part) -> None:
        self._reading.give_up(part.fetch_id)
        self._pool.free(part.blocks)


class _LeaseFromTheAnswer(Fetches):
    """The lease counts from when it was heard of."""

    def on_message(self, message: object) -> None:
        fetch = self._parts.get(message.fetch_id)  # type: ignore[attr-defined]
        if fetch is not None and fetch.part is not None:
            fetch.part.asked_at = self._clock.now()
        super().on_message(message)  # type: ignore[arg-type]


class _UnpinsWithTheConnection(Lending):
    """A reader whose connection ended is taken for gone."""

    def on_session_lost(self) -> None:
        for fetch_id in list(self._leases):
            self._end(fetch_id)


class _PinsNothing(Lending):
    """Blocks are lent and may be evicted."""

    def on_message(self, session: str, message: KVFetch | KVFetchDone) -> None:
        super().on_message(session, message)
        for fetch_id in list(self._leases):
            self._end(fetch_id)


def _overwrite(host: Host) -> None:
    blocks = host.pool.allocate(host.pool.num_free_blocks)
    for block in blocks:
        host.pages[:, block] = -1
    host.pool.free(blocks)


def _read_is_late(pair: Pair) -> None:
    """Asked, answered, begun; the rest is read when the lease is over."""
    pair.lender.store(HASHES[:2])
    pair.begin(HASHES[:2])
    pair.deliver(to_lender=True)
    pair.deliver(to_lender=False)
    pair.reader.step()
    pair.advance(3.1)
    pair.lending.tick()
    _overwrite(pair.lender)
    pair.settle()


def _answer_is_late(pair: Pair) -> None:
    pair.lender.store(HASHES[:2])
    pair.begin(HASHES[:2])
    pair.deliver(to_lender=True)
    pair.advance(2.9)
    pair.deliver(to_lender=False)
    pair.reader.step()
    pair.advance(0.2)
    pair.lending.tick()
    _overwrite(pair.lender)
    pair.settle()


def _late_landing(pair: Pair) -> None:
    """A read that nobody waits for any more lands when the path is well again."""
    pair.lender.store(HASHES[:2])
    pair.network.set_fault(pair.lender.region.agent, LocalFault.HOLD)
    pair.begin(HASHES[:2])
    pair.settle()
    pair.fetches.cancel("q")
    pair.fetcher.store(HASHES[8:18])
    pair.fetcher.store(HASHES[18:20])
    pair.network.clear_fault(pair.lender.region.agent)


def _connection_ends(pair: Pair) -> None:
    pair.lender.store(HASHES[:2])
    pair.begin(HASHES[:2])
    pair.deliver(to_lender=True)
    pair.deliver(to_lender=False)
    pair.reader.step()
    if isinstance(pair.lending, _UnpinsWithTheConnection):
        pair.lending.on_session_lost()  # the fetcher has not seen it yet
    _overwrite(pair.lender)
    pair.settle()


@pytest.mark.parametrize(
    ("trace", "planted"),
    [
        (_read_is_late, {"fetches_class": _NoLeaseCheck}),
        (_answer_is_late, {"fetches_class": _LeaseFromTheAnswer}),
        (_late_landing, {"fetches_class": _FreesAtOnce}),
        (_connection_ends, {"lending_class": _UnpinsWithTheConnection}),
        (_connection_ends, {"lending_class": _PinsNothing}),
    ],
)
def test_a_rule_that_is_left_out_is_missed(trace: Callable[[Pair], None], planted: dict[str, type]) -> None:
    sound, broken = Pair(), type("Broken", (Pair,), planted)()
    trace(sound)
    sound.check()
    trace(broken)
    with pytest.raises(AssertionError, match="holds"):
        broken.check()
