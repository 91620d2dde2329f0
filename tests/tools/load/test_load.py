from __future__ import annotations

import asyncio
import itertools
from statistics import mean

import pytest

from kvferry.tools.load.endpoint import RequestRecord
from kvferry.tools.load.load import PlannedRequest, poisson_arrivals, run_closed_loop, run_open_loop


class Server:
    """Answers at once, or when told to."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.gate: asyncio.Event | None = None
        self.is_full = asyncio.Event()  # five are in flight

    async def send(self, request: PlannedRequest) -> RequestRecord:
        self.asked.append(request.index)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        if self.in_flight == 5:
            self.is_full.set()
        sent_s = float(len(self.asked))
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        self.in_flight -= 1
        return RequestRecord(request.index, sent_s, 1, finished_s=sent_s + 1)


def planned(num_requests: int, gap_s: float = 0.0) -> list[PlannedRequest]:
    return [PlannedRequest(index, [1], 1, index * gap_s) for index in range(num_requests)]


def test_poisson_arrivals_have_the_rate_asked_for_and_repeat_with_the_seed() -> None:
    arrivals = list(itertools.islice(poisson_arrivals(4.0, seed=3), 20_001))
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert arrivals[0] == 0.0
    assert mean(gaps) == pytest.approx(0.25, rel=0.03)
    # Of an exponential distribution, a share of 1 / e is above the mean.
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.015)
    assert arrivals[:50] == list(itertools.islice(poisson_arrivals(4.0, seed=3), 50))
    assert arrivals[:50] != list(itertools.islice(poisson_arrivals(4.0, seed=4), 50))


def test_infinite_rate_sends_all_at_once() -> None:
    assert list(itertools.islice(poisson_arrivals(float("inf"), 0), 3)) == [0.0, 0.0, 0.0]


async def test_closed_loop_keeps_that_many_in_flight_and_sends_each_request_once() -> None:
    server = Server()
    result = await run_closed_loop(planned(20), server.send, max_concurrency=3)
    assert server.most_in_flight == 3
    assert sorted(server.asked) == list(range(20))
    assert [record.index for record in result.records] == server.asked
    assert result.duration_s == 20.0


async def test_open_loop_does_not_wait_for_answers() -> None:
    server = Server()
    server.gate = asyncio.Event()
    run = asyncio.ensure_future(run_open_loop(planned(5), server.send))
    await server.is_full.wait()
    server.gate.set()
    result = await run
    assert [record.index for record in result.records] == [0, 1, 2, 3, 4]


async def test_open_loop_leaves_out_what_arrives_after_the_duration() -> None:
    server = Server()
    result = await run_open_loop(planned(1000, gap_s=0.01), server.send, duration_s=0.03)
    assert [record.index for record in result.records] == [0, 1, 2]


async def test_closed_loop_sends_nothing_new_after_the_duration() -> None:
    result = await run_closed_loop(planned(1000), Server().send, max_concurrency=2, duration_s=0.0)
    assert result.records == []
    assert result.duration_s == 0.0


async def test_open_loop_notes_how_late_a_request_was_sent() -> None:
    async def send(request: PlannedRequest) -> RequestRecord:
        return RequestRecord(request.index, asyncio.get_running_loop().time() + 1e6, 1, finished_s=0.0)

    result = await run_open_loop(planned(1), send)
    assert result.records[0].late_s > 0
