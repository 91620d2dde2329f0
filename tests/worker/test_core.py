"""A worker's core between its sockets and its parts: what it announces, whom it forgets, when a drain is over."""

from __future__ import annotations

import pytest

from kvferry.common.errors import ProtocolError
from kvferry.engine.loop import StepFigures
from kvferry.wire.fields import Message
from kvferry.wire.results import Grant
from kvferry.wire.tasks import Abort, FetchFrom, LocalTask, ReserveKV
from kvferry.wire.workers import CacheChange, Drain, SetRole, WorkerStatus
from kvferry.worker.status import make_status

from ..decode.bench import Bench
from .core_bench import Outside, make_core


class CoreBench:
    """A core with one router, and requests for it."""

    def __init__(self) -> None:
        self.outside = Outside()
        self.bench = Bench()
        self.clock = self.bench.clock
        self.core = make_core(self.outside, self.clock, 64)

    def send(self, message: Message, router_id: str = "R") -> None:
        self.core.on_router_message(router_id, message)

    def step(self) -> None:
        batch = self.core.steps.schedule()
        if batch is not None:
            self.core.steps.complete(batch, self.bench.output(batch, 9))
            self.core.steps.note_turn(0.01)

    def status(self, router_id: str = "R") -> WorkerStatus:
        return make_status(self.core, router_id, StepFigures(0, 0.0, 0.0, 0))


def test_heartbeats_come_with_every_tick_of_a_worker_that_works_and_with_every_tenth_of_another() -> None:
    bench = CoreBench()
    for _ in range(20):
        bench.core.tick()
    assert bench.outside.count("announce") == 2
    bench.send(LocalTask(spec=bench.bench.spec("a", 6)))
    for number in range(1, 4):
        bench.core.tick()
        assert bench.outside.count("announce") == 2 + number
    bench.send(Abort(request_id="a", attempt=0))
    bench.core.tick()
    assert bench.outside.count("announce") == 6, "that it is idle is news"
    bench.core.tick()
    assert bench.outside.count("announce") == 6


def test_a_drain_is_over_with_the_last_request_and_shipment_or_with_its_time() -> None:
    bench = CoreBench()
    bench.send(LocalTask(spec=bench.bench.spec("a", 6)))
    bench.send(Drain(deadline_s=5.0))
    assert bench.core.is_draining and bench.status().state == "draining" and bench.outside.count("announce") == 1

    def has_drained(num_shipments: int) -> bool:
        bench.outside.num_shipments = num_shipments
        return bench.core.has_drained

    assert not has_drained(0)
    bench.send(Abort(request_id="a", attempt=0))
    assert not has_drained(1) and has_drained(0)
    bench.send(Drain(deadline_s=60.0))
    bench.clock.advance(5.0)
    assert has_drained(1), "who is told again ends no later"


def test_a_role_that_is_none_is_refused_and_another_is_told_at_once() -> None:
    bench = CoreBench()
    with pytest.raises(ProtocolError, match="no role"):
        bench.send(SetRole(role="router"))
    bench.send(LocalTask(spec=bench.bench.spec("a", 6)))
    bench.send(SetRole(role="prefill"))
    assert bench.status().role == "prefill" and bench.outside.count("announce") == 1
    assert bench.core.decodes, "its answers are not finished"
    bench.send(Abort(request_id="a", attempt=0))
    assert not bench.core.decodes


def test_whatever_waits_for_a_router_is_dropped_when_it_is_lost_and_begun_anew_when_it_comes_back() -> None:
    bench = CoreBench()
    assert not bench.status().samples
    bench.send(LocalTask(spec=bench.bench.spec("a", 6)))
    bench.step()
    assert bench.status().samples and not bench.status().samples, "told once"
    bench.step()
    bench.core.on_router_lost("R")
    assert bench.core.num_unfinished == 0 and not bench.status().samples
    bench.core.tick()
    assert not [message for _, message in bench.outside.sent if isinstance(message, CacheChange)]
    bench.core.on_router_joined("R")
    bench.core.tick()
    [change] = [message for _, message in bench.outside.sent if isinstance(message, CacheChange) and message.stored]
    assert change.seq == 1


def test_others_writes_are_watched_while_there_may_be_some() -> None:
    bench = CoreBench()
    spec = bench.bench.spec("a", 6)
    bench.send(ReserveKV(spec=spec))
    assert bench.outside.count("watch") == 0, "nobody may write yet"
    [(_, granted)] = bench.outside.sent
    assert isinstance(granted, Grant)
    grant = granted.grant
    bench.bench.receiver = bench.core.receiver
    bench.bench.open(spec, grant)
    bench.core.tick()
    bench.core.tick()
    assert bench.outside.told("watch") == [(True,)]
    bench.bench.arrive(spec, grant, ())
    bench.core.tick()
    assert bench.outside.told("watch") == [(True,), (False,)]


def test_a_prompt_waits_for_no_worker_to_which_the_connection_has_ended() -> None:
    bench = CoreBench()
    source = FetchFrom(worker_id="p", kv_address="p:1", num_tokens=16, within_s=5.0)
    bench.send(LocalTask(spec=bench.bench.spec("a", 20), fetch=source))
    assert bench.outside.count("to_target") == 1 and bench.core.steps.schedule() is None
    for address, is_lost in (("q:1", False), ("p:1", True)):
        bench.core.on_target_lost(address)
        assert (bench.core.steps.schedule() is not None) is is_lost


def test_a_step_of_which_nothing_is_wanted_is_stopped() -> None:
    bench = CoreBench()
    bench.send(LocalTask(spec=bench.bench.spec("a", 6)))
    assert bench.core.steps.schedule() is not None
    assert bench.outside.count("stop_step") == 0
    bench.send(Abort(request_id="a", attempt=0))
    assert bench.outside.count("stop_step") == 1


def test_routers_that_send_work_share_a_worker() -> None:
    bench = CoreBench()
    bench.send(Abort(request_id="x", attempt=0), "Q")
    assert bench.status().share == 1.0
    bench.send(LocalTask(spec=bench.bench.spec("a", 1000)), "Q")  # refused: it never fits
    assert bench.status().share == 0.5
    bench.clock.advance(2.0)
    assert bench.status().share == 1.0
