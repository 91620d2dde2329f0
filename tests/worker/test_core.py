"""A worker's core between its sockets and its parts: what it announces, whom it forgets, when a drain is over."""

from __future__ import annotations

import pytest

from kvferry.common.adapter import AdapterLoader
from kvferry.common.batch import stopped_output
from kvferry.common.errors import ProtocolError
from kvferry.engine.loop import StepFigures
from kvferry.transfer.send.counters import SendCounters
from kvferry.wire.fetches import KVFetch, KVFetchDone
from kvferry.wire.fields import Message
from kvferry.wire.results import Grant
from kvferry.wire.tasks import Abort, FetchFrom, LocalTask, ReserveKV
from kvferry.wire.workers import CacheChange, Drain, SetRole, StepSample, WorkerStatus
from kvferry.worker.adapters import PATIENCE_S
from kvferry.worker.roles import RoleName
from kvferry.worker.status import make_status

from ..decode.bench import SPEC
from .bench import BothBench
from .core_bench import Outside, make_core
from .test_adapters import FakeLoader


class CoreBench:
    """A core with one router, and requests for it."""

    def __init__(self, adapters: AdapterLoader | None = None) -> None:
        self.outside = Outside()
        self.bench = BothBench()
        self.clock = self.bench.clock
        self.core = make_core(self.outside, self.clock, 64, adapters)

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


def test_a_heartbeat_tells_every_figure_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = CoreBench()
    core = bench.core
    monkeypatch.setattr(bench.outside, "counters", lambda: SendCounters(0, 11, 12, 13))
    core.receiver.counters.num_failures, core.receiver.counters.checksum_failures = 100, 2
    core.receiver.rotation.timer.num_rotations, core.receiver.rotation.timer.num_failures = 21, 22
    core.fetches.num_fetches, core.fetches.num_bytes, core.fetches.seconds = 31, 32, 33.0
    core.cache.num_promoted_blocks = 41
    held, cached, *_ = blocks = core.pool.allocate(4)
    core.pool.publish(cached, b"h" * 16)
    core.pool.free([block for block in blocks if block != held])
    told = bench.status()
    assert (told.transfer_bytes, told.transfer_failures, told.wire_bytes) == (11, 112, 13)
    assert (told.checksum_failures, told.num_fences, told.num_failed_fences) == (2, 21, 22)
    assert (told.num_fetches, told.failed_fetches, told.fetched_bytes, told.fetch_s) == (31, 0, 32, 33.0)
    assert (told.promoted_blocks, told.demoted_blocks) == (41, 0)
    assert (told.num_blocks, told.num_free_blocks, told.num_cached_blocks) == (64, 63, 1)


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
    [sample] = bench.status().samples
    assert sample == StepSample(0.01, prefill_tokens=6, prefill_pairs=18) and not bench.status().samples, "told once"
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


def test_others_reads_are_watched_while_blocks_are_lent() -> None:
    bench = CoreBench()
    blocks = bench.core.pool.allocate(1)
    bench.core.pool.publish(blocks[0], b"h" * 16)
    question = KVFetch(
        fetch_id=1, hashes=b"h" * 16, spec=SPEC, version="0", transport="local", tp_size=1, wants_checksums=True
    )
    bench.core.on_peer_message("f#1", question)
    bench.core.tick()
    assert bench.outside.told("watch") == [(True,)]
    bench.core.on_peer_message("f#1", KVFetchDone(fetch_id=1))
    assert bench.outside.told("watch") == [(True,), (False,)]


def test_a_request_begins_as_soon_as_its_adapter_is_loaded_and_a_step_keeps_it_to_its_end() -> None:
    loader = FakeLoader(num_slots=1, num_host=2)
    bench = CoreBench(loader)
    bench.send(LocalTask(spec=bench.bench.spec("a", 6, adapter="aa")))
    bench.core.tick()
    assert bench.core.steps.schedule() is None and bench.status().loading_adapters == 1
    loader.end()
    batch = bench.core.steps.schedule()
    assert batch is not None and bench.status().adapters == ("aa",)
    bench.send(Abort(request_id="a", attempt=0))
    bench.send(LocalTask(spec=bench.bench.spec("b", 6, adapter="bb")))
    for _ in range(2):
        bench.core.tick()
        assert not loader.tasks, "it is computed with"
        bench.clock.advance(PATIENCE_S)
    bench.core.steps.complete(batch, stopped_output(batch, 0.001))
    bench.core.steps.note_turn(0.01)
    bench.core.tick()
    assert [task.digest for task in loader.tasks] == ["bb"]
    assert not bench.status().samples, "of a step that was stopped"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_what_has_begun_keeps_its_adapter_between_its_steps(role: RoleName) -> None:
    loader = FakeLoader(num_slots=1, num_host=2)
    bench = CoreBench(loader)
    bench.core.set_role(role)
    for name, adapter in (("a", "aa"), ("b", "bb")):
        spec = bench.bench.spec(name, 100, adapter=adapter)
        bench.send(LocalTask(spec=spec) if role == "decode" else bench.bench.task(spec))
        bench.core.tick()
        if name == "a":
            loader.end()
            bench.step()
    for _ in range(2):
        assert not loader.tasks
        bench.clock.advance(PATIENCE_S)
        bench.core.tick()
    bench.send(Abort(request_id="a", attempt=0))
    bench.core.tick()
    assert [task.digest for task in loader.tasks] == ["bb"]


def test_deadlines_of_both_roles_are_looked_at() -> None:
    bench = CoreBench()
    bench.send(ReserveKV(spec=bench.bench.spec("granted", 6)))
    bench.core.set_role("prefill")
    bench.send(bench.bench.task(bench.bench.spec("prompt", 6)))
    bench.core.tick()
    assert bench.outside.count("open") == 0 and bench.core.decode.num_unfinished == 1
    bench.clock.advance(2.5)
    bench.core.tick()
    assert bench.outside.count("open") == 1, "the prompt's grant"
    assert bench.core.decode.num_unfinished == 0, "nobody has opened it"


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
