"""A decode worker's agents are replaced together: one rank's answer is not enough, an old try's counts for nothing."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import pytest
import torch
from structlog.testing import capture_logs

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.transfer.backends.local import LocalBackend, LocalNetwork
from kvferry.transfer.fetch.ranks import RankSumming
from kvferry.transfer.fetch.reader import BlockSums
from kvferry.transfer.protocol.checksums import PageSums
from kvferry.transfer.protocol.rank_calls import Each, OwnCalls
from kvferry.transfer.protocol.rank_messages import Rotated
from kvferry.transfer.thread import TransferThread
from kvferry.wire.codec import encode
from kvferry.wire.grants import RegionInfo
from kvferry.wire.handoff import KVArrived
from kvferry.worker.agents import Agents, RankAgent, rotated
from kvferry.worker.decode_rank import RECEIVING

from ..transfer.test_thread import ARRIVED

WAIT_S = 120.0


class Ranks:
    """Rank 0 with its thread; what the others would do is said by hand."""

    def __init__(self, tp_size: int) -> None:
        self.network = LocalNetwork()
        self.backend = LocalBackend("d-0.1.0.0", self.network)
        self.backend.register(torch.zeros(1, 2, 2, 1, 1, 1), rank=0, tp_size=tp_size, generation=0)
        self.others = [LocalBackend(f"d-0.1.0.{rank}", self.network) for rank in range(1, tp_size)]
        for rank, other in enumerate(self.others, start=1):
            other.register(torch.zeros(1, 2, 2, 1, 1, 1), rank=rank, tp_size=tp_size, generation=0)
        self.arrived: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.told: list[tuple[str, tuple[object, ...]]] = []
        self.done: queue.SimpleQueue[tuple[RegionInfo, ...] | None] = queue.SimpleQueue()
        self.thread = TransferThread(
            self.backend, on_arrived=lambda agent, message: self.arrived.put(message), on_failure=self.arrived.put
        )
        self.agents = Agents(
            Each(RECEIVING, self.thread, lambda payload: self.told.append(RECEIVING.decode(payload))),
            self.thread,
            tp_size,
            done=self.done.put,
        )
        self.thread.start()

    def answer(self, rank: int, generation: int) -> None:
        self.agents.on_rank(rotated(rank, generation, self.others[rank - 1].rotate(generation)))


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.thread.close()


def test_only_the_answers_of_all_ranks_end_a_rotation(ranks: Ranks) -> None:
    ranks.agents.start(1)
    assert ranks.told == [("rotate", (1,))]
    ranks.answer(1, 1)
    regions = ranks.done.get(timeout=WAIT_S)
    assert regions is not None
    assert [(region.rank, region.agent) for region in regions] == [(0, "d-0.1.1.0"), (1, "d-0.1.1.1")]


def test_regions_come_in_the_order_of_their_ranks_whoever_answers_first() -> None:
    ranks = Ranks(3)
    try:
        ranks.agents.start(1)
        for rank in (2, 1):
            ranks.answer(rank, 1)
        regions = ranks.done.get(timeout=WAIT_S)
        assert regions is not None and [region.rank for region in regions] == [0, 1, 2]
    finally:
        ranks.thread.close()


def test_an_old_try_that_all_ranks_answer_late_ends_nothing(ranks: Ranks) -> None:
    for generation in (1, 2):
        ranks.agents.start(generation)
    for rank, backend in enumerate((ranks.backend, *ranks.others)):
        ranks.agents.on_rank(rotated(rank, 1, backend._region(1)))
    ranks.answer(1, 2)
    regions = ranks.done.get(timeout=WAIT_S)
    assert regions is not None and {region.generation for region in regions} == {2}


def test_one_rank_without_an_agent_means_that_it_failed_and_its_late_answers_do_not_count(ranks: Ranks) -> None:
    ranks.network.can_make_agents = False
    ranks.agents.start(1)
    ranks.agents.on_rank(rotated(1, 1, ranks.others[0]._region(1)))
    assert ranks.done.get(timeout=WAIT_S) is None
    ranks.network.can_make_agents = True
    ranks.agents.start(2)
    ranks.agents.on_rank(rotated(1, 1, ranks.others[0]._region(1)))
    ranks.answer(1, 2)
    regions = ranks.done.get(timeout=WAIT_S)
    assert regions is not None and {region.generation for region in regions} == {2}


def test_what_has_arrived_is_handed_out_before_the_agent_goes(ranks: Ranks) -> None:
    writer = LocalBackend("p-0.1.0.0", ranks.network)
    writer.register(torch.zeros(1, 2, 2, 1, 1, 1), rank=0, tp_size=1, generation=0)
    writer.notify("d-0.1.0.0", encode(ARRIVED))
    ranks.agents.start(1)
    assert isinstance(ranks.arrived.get(timeout=WAIT_S), KVArrived)
    ranks.answer(1, 1)
    assert ranks.done.get(timeout=WAIT_S) is not None


def test_a_follower_carries_out_what_rank_0_calls_and_answers(ranks: Ranks) -> None:
    answers: queue.SimpleQueue[object] = queue.SimpleQueue()
    pages = torch.rand(2, 3, 2, 1, 4, 2)
    spec = KVCacheSpec(model="m", num_layers=2, num_kv_heads=1, head_dim=2, block_size=4, dtype="float32")
    sums = BlockSums(PageSums(pages), spec, 1, 3)
    thread = TransferThread(ranks.others[0], on_failure=answers.put)
    summing = RankSumming(1, sums, lambda *found: answers.put(found))
    follower = OwnCalls(RECEIVING, thread, thread, RankAgent(1, thread, answers.put), summing)
    each = Each(RECEIVING, ranks.thread, follower.run)
    own = RankSumming(0, sums, lambda *found: answers.put(found))
    thread.start()
    try:
        each(own.sum_blocks, 9, (2, 0), 1)
        made = sums.make((2, 0), 1)
        assert {answers.get(timeout=WAIT_S) for _ in range(2)} == {(0, 9, made), (1, 9, made)}
        each(RankAgent(0, ranks.thread, answers.put).rotate, 1)
        found = [answers.get(timeout=WAIT_S) for _ in range(2)]
        assert {(answer.rank, answer.generation) for answer in found if isinstance(answer, Rotated)} == {(0, 1), (1, 1)}
    finally:
        thread.close()


def test_an_outage_is_one_warning_however_often_it_is_tried(ranks: Ranks) -> None:
    with capture_logs() as logs:
        for generation in (1, 2, 3, 4, 5):
            ranks.network.can_make_agents = generation >= 4
            ranks.agents.start(generation)
            ranks.agents.on_rank(rotated(1, generation, ranks.others[0]._region(generation)))
            assert (ranks.done.get(timeout=WAIT_S) is None) == (generation < 4)
    told = [line["event"] for line in logs if line["log_level"] in ("warning", "info")]
    assert told == ["transfer_agents_not_replaced", "transfer_agents_are_back"]
