"""The life of requests, row by row of the handoff's router table; workers answer as each test says."""

from __future__ import annotations

import asyncio

import pytest

from kvferry.common.errors import CapacityError, ProtocolError, RequestError
from kvferry.common.request import BACKGROUND_PRIORITY, SampledToken, unpack_ids
from kvferry.router.dispatch.placer import LOOK_AHEAD
from kvferry.router.placement.slo import SloPolicy
from kvferry.router.state.demand import Placement, Reason
from kvferry.router.state.errors import StreamError
from kvferry.router.state.failures import CLEARED_BY_STEPS
from kvferry.router.state.predictor import Predictor
from kvferry.router.state.request import RequestStatus
from kvferry.router.state.token_stream import TokenStream
from kvferry.wire.results import (
    ChoiceTokens,
    HandoffDone,
    NoCapacity,
    PromptLogprobs,
    RequestTokens,
    StepTokens,
    TaskRefused,
    WorkerFailure,
)
from kvferry.wire.tasks import Abort, LocalTask, PrefillTask, ReserveKV
from kvferry.wire.workers import Drain, LiveRequests, SetRole, TransferReport

from ..fleet import BLOCK_SIZE, Fleet, Link, config, hello, received, status, text, tokens


async def failure(stream: TokenStream) -> StreamError:
    """The error that the stream ends with, after the tokens that came before it."""
    with pytest.raises(StreamError) as info:
        async for _ in stream:
            pass
    return info.value


def state(stream: TokenStream) -> RequestStatus:
    return stream.request.status


def refused(fleet: Fleet, worker: Link, task: PrefillTask | LocalTask, reason: str) -> None:
    message = TaskRefused(request_id=task.spec.request_id, attempt=task.spec.attempt, reason=reason)
    fleet.dispatcher.on_message(worker, message)


# --- the way without trouble -----------------------------------------------------------------------------------------


async def test_a_request_goes_through_reservation_prefill_and_decode() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream = fleet.submit(20, max_tokens=3)
    request = stream.request
    assert state(stream) is RequestStatus.RESERVED
    fleet.clock.advance(1)
    ask = fleet.grant(d)
    task = p.take(PrefillTask)
    assert unpack_ids(task.spec.prompt) == list(range(20)) and task.sample and ask.spec == task.spec
    assert state(stream) is RequestStatus.PREFILLING
    fleet.clock.advance(1)
    fleet.first_token(p, task)
    assert text(stream) == [0]
    fleet.clock.advance(1)
    fleet.arrived(d, task)
    assert state(stream) is RequestStatus.DECODING
    fleet.clock.advance(1)
    fleet.step(d, task, tokens(0, 0, 2))
    fleet.step(d, task, tokens(0, 2, 1, "length"))
    assert [update async for update in stream][-1].finish == "length"
    assert state(stream) is RequestStatus.FINISHED and fleet.observer.finished == [request]
    assert request.timestamps == {
        "queued": 100.0,
        "reserved": 100.0,
        "prefill_start": 101.0,
        "first_token": 102.0,
        "arrived": 103.0,
        "first_decode": 104.0,
        "last_token": 104.0,
        "finished": 104.0,
    }
    assert (request.prefill_worker, request.decode_worker, request.num_output_tokens) == ("p-0", "d-0", 3)
    assert not p.sent and not d.sent
    assert fleet.observer.dropped == {"duplicate": 1}
    assert all(worker.num_bound == 0 for worker in fleet.dispatcher.view().workers)


async def test_updates_wake_a_waiting_reader() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d)
    reader = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    assert not reader.done()
    fleet.first_token(p, task)
    assert (await reader).tokens == tokens(0, 0, 1).tokens


def test_decode_tokens_may_come_before_the_first_token_and_its_report() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d)
    fleet.step(d, task, tokens(0, 0, 3))
    assert state(stream) is RequestStatus.DECODING
    fleet.first_token(p, task)
    fleet.arrived(d, task)
    assert text(stream) == [0, 1, 2]


def test_tokens_that_come_early_wait_for_the_missing_one() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d)
    fleet.arrived(d, task)
    fleet.step(d, task, tokens(0, 1, 2, "stop"))
    assert text(stream) == []
    fleet.first_token(p, task)
    assert text(stream) == [0, 1, 2] and state(stream) is RequestStatus.FINISHED


def test_a_gap_that_stays_open_makes_the_request_resume() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.decode(p, d)
    fleet.step(d, task, tokens(0, 2, 1))
    fleet.wait(1.2, p, d)
    assert d.take(Abort).attempt == 0
    resumed = fleet.grant(d)
    assert resumed.spec.attempt == 1 and resumed.spec.output_token_ids(0) == [1000]
    assert fleet.observer.retries == {("decode", "gap"): 1}
    fleet.step(d, task, tokens(0, 1, 1))
    assert text(stream) == [0] and fleet.observer.dropped["stale_attempt"] == 1


def test_each_missing_token_is_waited_for_as_long() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.decode(p, d)
    fleet.step(d, task, tokens(0, 2, 1))
    fleet.wait(0.5, p, d)
    fleet.step(d, task, tokens(0, 1, 1))
    fleet.wait(0.3, p, d)
    fleet.step(d, task, tokens(0, 4, 1))
    fleet.wait(0.8, p, d)
    assert stream.request.attempt_number == 0
    fleet.wait(0.4, p, d)
    assert stream.request.attempt_number == 1


def test_a_token_that_came_early_is_forgotten_with_its_attempt() -> None:
    fleet = Fleet()
    p, d0, d1 = fleet.join("p-0"), fleet.join("d-0"), fleet.join("d-1")
    stream, task = fleet.decode(p, d0)
    fleet.step(d0, task, tokens(0, 2, 1, "stop"))  # after a token that nobody will see
    fleet.dispatcher.worker_left(d0, "killed")
    fleet.grant(d1)
    resumed = p.take(PrefillTask)
    fleet.step(d1, resumed, ChoiceTokens(0, 1, (SampledToken(7),)))
    assert [one.token_id for one in stream.request.choices[0].tokens] == [1000, 7]
    fleet.step(d1, resumed, ChoiceTokens(0, 2, (SampledToken(8),)))
    assert [one.token_id for one in stream.request.choices[0].tokens] == [1000, 7, 8]


def test_another_token_at_a_known_index_is_dropped_and_counted() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.decode(p, d)
    fleet.step(d, task, tokens(0, 0, 1))
    fleet.step(d, task, ChoiceTokens(0, 0, (SampledToken(7),)))
    assert text(stream) == [0] and fleet.observer.dropped == {"duplicate": 1, "mismatch": 1}


def test_all_choices_that_end_with_the_first_token_free_the_reservation() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d, n=2)
    fleet.first_token(p, task, "stop")
    assert state(stream) is RequestStatus.FINISHED
    assert d.take(Abort).request_id == stream.request.request_id


def test_a_transfer_report_reaches_the_observer() -> None:
    fleet = Fleet()
    p = fleet.join("p-0")
    report = TransferReport(
        request_id="r", attempt=0, decode_worker="d-0", num_bytes=1, num_blocks=1, transfer_s=1, exposed_s=0, clean=True
    )
    fleet.dispatcher.on_message(p, report)
    assert fleet.observer.transfers == [report]


def test_a_second_hello_in_a_session_is_a_protocol_error() -> None:
    fleet = Fleet()
    with pytest.raises(ProtocolError):
        fleet.dispatcher.on_message(fleet.join("p-0"), hello("p-0", "prefill"))


# --- reservations ----------------------------------------------------------------------------------------------------


def test_no_capacity_asks_the_other_decode_worker_in_the_same_attempt() -> None:
    fleet = Fleet()
    fleet.join("p-0")
    d0, d1 = fleet.join("d-0"), fleet.join("d-1")
    fleet.submit()
    fleet.refuse(d0)
    assert d1.take(ReserveKV).spec.attempt == 0 and not d0.sent


def test_no_capacity_anywhere_waits_for_the_next_heartbeat() -> None:
    fleet = Fleet()
    fleet.join("p-0")
    d = fleet.join("d-0")
    stream = fleet.submit()
    fleet.refuse(d)
    assert state(stream) is RequestStatus.QUEUED and not d.sent
    fleet.clock.advance(0.1)
    fleet.beat(d)
    assert d.take(ReserveKV).spec.attempt == 0


def test_a_worker_that_says_when_to_ask_again_is_not_asked_before() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream = fleet.submit()
    d.take(ReserveKV)
    answer = NoCapacity(request_id=stream.request.request_id, attempt=0, reason="blocks", retry_after_s=2.0)
    fleet.dispatcher.on_message(d, answer)
    fleet.wait(1.8, p, d)
    assert not d.sent
    fleet.wait(0.3, p, d)
    d.take(ReserveKV)


def test_a_decode_worker_that_holds_the_prompt_computes_the_rest_itself() -> None:
    fleet = Fleet(config(max_local_prefill_tokens=5))
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream = fleet.submit()
    assert fleet.refuse(d, "held").max_local_tokens == 5
    task = d.take(LocalTask)
    assert not p.sent and not fleet.observer.fallbacks
    assert not fleet.dispatcher.breaches(), "the prefill worker is free again"
    fleet.wait(5.0, p, d, num_running=1)  # longer than an answer may take
    fleet.step(d, task, tokens(0, 0, 1))
    assert state(stream) is RequestStatus.DECODING and stream.request.prefill_worker is None


def test_a_short_prompt_that_is_handed_over_is_not_computed_on_the_decode_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The policy had a reason: its streams have no room for it."""
    handoff = Placement("p-0", "d-0", Reason.HANDOFF)
    monkeypatch.setattr(SloPolicy, "place", lambda self, view, demand: handoff)
    fleet = Fleet(config(policy="slo", max_local_prefill_tokens=20))
    fleet.join("p-0")
    d = fleet.join("d-0")
    fleet.submit()
    assert d.take(ReserveKV).max_local_tokens == 0


def test_what_was_said_of_a_handoff_is_not_held_against_a_worker_that_holds_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[object] = []
    monkeypatch.setattr(Predictor, "on_first_token", lambda self, way, *times, **more: told.append(way))
    fleet = Fleet(config(policy="slo", max_local_prefill_tokens=5))
    fleet.join("p-0")
    d = fleet.join("d-0")
    fleet.submit()
    fleet.refuse(d, "held")
    fleet.step(d, d.take(LocalTask), tokens(0, 0, 1))
    assert not told


def test_a_draining_decode_worker_gets_no_more_requests() -> None:
    fleet = Fleet()
    fleet.join("p-0")
    d0, d1 = fleet.join("d-0"), fleet.join("d-1")
    fleet.submit()
    fleet.refuse(d0, "draining")
    fleet.submit()
    assert not d0.sent and len(d1.sent) == 2


def test_no_answer_to_a_reservation_starts_a_new_attempt() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    fleet.submit()
    d.take(ReserveKV)
    fleet.wait(3.6, p, d)
    assert d.take(Abort).attempt == 0
    assert d.take(ReserveKV).spec.attempt == 1
    assert fleet.observer.retries == {("reserve", "no_answer"): 1}


def test_a_worker_that_comes_back_in_the_step_that_it_hung_in_gets_nothing_before_that_has_ended() -> None:
    fleet = Fleet()
    d, step = fleet.join("d-0"), {"step_tokens": 64, "step_s": 0.1, "num_running": 1}
    fleet.submit()
    d.take(LocalTask)
    fleet.beat(d, **step, steps=5)
    fleet.beat(d, **step, steps=5, busy_for_s=3.5)
    fleet.dispatcher.tick()
    assert "a step runs for 3.5 s" in str(d.dropped)
    back = Link("d-0", 9)
    fleet.dispatcher.worker_joined(back, hello("d-0", "decode"))
    back.take(LiveRequests)
    for tenth in range(200):
        fleet.wait(0.1, back, **step, steps=5, busy_for_s=3.6 + 0.1 * tenth)
    assert not back.dropped and not back.sent
    fleet.beat(back, **step, steps=6)
    fleet.dispatcher.tick()
    assert back.take(LocalTask).spec.attempt == 1


def test_a_worker_that_comes_back_without_the_step_that_it_hung_in_gets_work() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d = fleet.join("d-0")
    fleet.submit()
    for busy_for_s in (0.0, 3.5):
        fleet.beat(d, num_running=1, steps=5, step_s=0.1, step_tokens=64, busy_for_s=busy_for_s)
    fleet.dispatcher.tick()
    back = Link("d-0", 9)
    fleet.dispatcher.worker_joined(back, hello("d-0", "decode"))
    back.take(LiveRequests)
    fleet.beat(back, steps=5)
    assert back.take(LocalTask).spec.attempt == 1


def test_a_missing_token_is_waited_for_anew_after_a_standstill() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.decode(p, d)
    fleet.step(d, task, tokens(0, 2, 1))
    fleet.clock.advance(2)
    fleet.dispatcher.stood_still()
    fleet.wait(0.8, p, d)
    assert stream.request.attempt_number == 0
    fleet.wait(0.4, p, d)
    assert stream.request.attempt_number == 1


def test_an_answer_is_waited_for_anew_after_a_standstill() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    fleet.submit()
    d.take(ReserveKV)
    fleet.wait(3.0, p, d)
    fleet.clock.advance(600.0)
    fleet.dispatcher.stood_still()
    fleet.wait(3.4, p, d)
    assert not d.sent and not fleet.observer.retries
    fleet.wait(0.2, p, d)
    assert d.take(Abort).attempt == 0 and fleet.observer.retries == {("reserve", "no_answer"): 1}


def test_a_grant_that_nobody_waits_for_is_given_back() -> None:
    fleet = Fleet()
    fleet.join("p-0")
    d = fleet.join("d-0")
    stream = fleet.submit()
    ask = d.take(ReserveKV)
    stream.abort()
    d.sent[:] = [ask]
    fleet.grant(d)
    assert d.take(Abort).request_id == stream.request.request_id


def test_an_answer_out_of_turn_or_from_the_wrong_worker_is_dropped() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    other = fleet.join("p-1")
    stream, task = fleet.decode(p, d)
    fleet.first_token(other, task)
    fleet.arrived(p, task)
    assert fleet.observer.dropped == {"wrong_worker": 1, "out_of_turn": 1}
    assert state(stream) is RequestStatus.DECODING


# --- prefill ---------------------------------------------------------------------------------------------------------


def test_a_refused_task_goes_with_its_grant_to_another_prefill_worker() -> None:
    fleet = Fleet()
    p0, p1, d = fleet.join("p-0"), fleet.join("p-1"), fleet.join("d-0")
    stream, task = fleet.start(p0, d)
    refused(fleet, p0, task, "blocks")
    assert p1.take(PrefillTask).grant == task.grant and not d.sent
    assert stream.request.prefill_worker == "p-1"


def test_a_refused_task_without_another_worker_gives_the_grant_back() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d)
    refused(fleet, p, task, "blocks")
    assert d.take(Abort).attempt == 0
    assert stream.request.num_failures == 0  # nobody failed
    fleet.clock.advance(0.1)
    fleet.beat(p)
    assert d.take(ReserveKV).spec.attempt == 1


def test_a_decode_worker_that_prefills_by_now_does_not_hand_over_to_itself() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0", can_change_role=True)
    stream = fleet.submit()
    fleet.beat(d, role="prefill")
    fleet.dispatcher.worker_left(p, "killed")
    fleet.grant(d)
    d.take(Abort)
    assert not d.sent and state(stream) is RequestStatus.QUEUED


def test_a_stale_grant_is_not_handed_on() -> None:
    fleet = Fleet()
    p0, p1, d = fleet.join("p-0"), fleet.join("p-1"), fleet.join("d-0")
    _, task = fleet.start(p0, d)
    fleet.clock.advance(1.5)
    refused(fleet, p0, task, "draining")
    assert not p1.sent
    assert d.take(Abort).attempt == 0 and d.take(ReserveKV).spec.attempt == 1


def test_a_prefill_worker_lost_before_its_task_is_replaced_when_the_grant_comes() -> None:
    fleet = Fleet()
    p0, p1, d = fleet.join("p-0"), fleet.join("p-1"), fleet.join("d-0")
    stream = fleet.submit()
    fleet.dispatcher.worker_left(p0, "killed")
    fleet.grant(d)
    assert p1.take(PrefillTask).spec.attempt == 0 and stream.request.num_failures == 0


def test_the_decode_worker_decides_when_the_prefill_worker_is_lost_after_its_task() -> None:
    fleet = Fleet()
    p0, p1, d = fleet.join("p-0"), fleet.join("p-1"), fleet.join("d-0")
    stream, task = fleet.start(p0, d)
    fleet.dispatcher.worker_left(p0, "killed")
    assert d.take(Abort).unless_arrived and not p1.sent
    fleet.arrived(d, task)
    fleet.wait(5.0, p1, d, num_running=1)  # longer than an answer may take
    assert state(stream) is RequestStatus.DECODING and not fleet.observer.retries
    fleet.step(d, task, tokens(0, 0, 2))
    assert text(stream) == [0, 1]


def test_a_lost_prefill_worker_whose_kv_has_not_arrived_is_replaced() -> None:
    fleet = Fleet()
    p0, p1, d = fleet.join("p-0"), fleet.join("p-1"), fleet.join("d-0")
    _, task = fleet.start(p0, d)
    fleet.dispatcher.worker_left(p0, "killed")
    d.take(Abort)
    fleet.failed(d, task, "abort")
    assert not d.take(Abort).unless_arrived
    assert fleet.grant(d).spec.attempt == 1 and p1.take(PrefillTask).spec.attempt == 1
    assert fleet.observer.retries == {("prefill", "worker_lost"): 1}


def test_a_decode_worker_that_does_not_decide_in_time_is_left() -> None:
    fleet = Fleet()
    p0, p1, d = fleet.join("p-0"), fleet.join("p-1"), fleet.join("d-0")
    fleet.start(p0, d)
    fleet.dispatcher.worker_left(p0, "killed")
    d.take(Abort)
    fleet.wait(3.6, p1, d)
    d.take(Abort)
    assert d.take(ReserveKV).spec.attempt == 1


def test_the_prefill_workers_loss_does_not_matter_once_the_kv_has_arrived() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, _ = fleet.decode(p, d)
    fleet.dispatcher.worker_left(p, "killed")
    assert state(stream) is RequestStatus.DECODING and not d.sent


def test_a_failed_handoff_tries_another_pair_first() -> None:
    fleet = Fleet()
    p0, p1, d = fleet.join("p-0"), fleet.join("p-1"), fleet.join("d-0")
    _, task = fleet.start(p0, d)
    fleet.failed(d, task)
    assert p0.take(Abort).attempt == 0 and d.take(Abort).attempt == 0
    fleet.grant(d)
    assert p1.take(PrefillTask).spec.attempt == 1 and not fleet.observer.fallbacks


def test_a_failed_handoff_of_the_only_pair_falls_back_to_local_prefill() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d)
    fleet.failed(d, task)
    d.take(Abort)
    local = d.take(LocalTask)
    assert local.spec.attempt == 1 and fleet.observer.fallbacks == {"local_prefill": 1}
    fleet.failed(d, task)  # the old attempt's
    fleet.step(d, local, tokens(0, 0, 1))
    assert text(stream) == [0]


def test_a_grant_that_lapsed_unopened_does_not_speak_against_the_pair() -> None:
    fleet = Fleet(config(local_prefill=False))
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d)
    fleet.failed(d, task, "expired", peer="")
    d.take(Abort)
    p.take(Abort)
    fleet.grant(d)
    assert p.take(PrefillTask).spec.attempt == 1 and stream.request.num_failures == 1


def test_a_prefill_worker_that_was_late_is_not_asked_again_while_another_one_may_be() -> None:
    """It may be dead, and then costs the request a second attempt; the other one has more to do."""
    fleet = Fleet()
    p0, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p0, d)
    p1 = fleet.join("p-1")
    fleet.beat(p1, num_waiting=1, waiting_tokens=20)
    fleet.failed(d, task, "expired", peer="")
    d.take(Abort)
    fleet.grant(d)
    assert p1.take(PrefillTask).spec.attempt == 1 and stream.request.num_failures == 1


def test_a_pair_whose_grants_lapse_again_and_again_cannot_talk_and_another_one_is_tried() -> None:
    fleet = Fleet()
    p, d0, d1 = fleet.join("p-0"), fleet.join("d-0"), fleet.join("d-1")
    _, task = fleet.start(p, d0)
    fleet.failed(d0, task, "expired", peer="")
    d0.take(Abort)
    p.take(Abort)
    fleet.grant(d0)
    fleet.failed(d0, p.take(PrefillTask), "expired", peer="")
    fleet.wait(1.0, p, d0, d1)
    assert d1.take(ReserveKV).spec.attempt == 2


def test_a_grant_that_lapsed_though_its_prompt_was_computed_speaks_against_the_pair() -> None:
    fleet = Fleet()
    p, d0, d1 = fleet.join("p-0"), fleet.join("d-0"), fleet.join("d-1")
    _, task = fleet.start(p, d0)
    fleet.first_token(p, task)
    fleet.failed(d0, task, "expired", peer="")
    assert d1.take(ReserveKV).spec.attempt == 1


def test_a_pair_whose_handoff_failed_is_avoided_by_other_requests_for_a_while() -> None:
    fleet = Fleet()
    p0, p1, d = fleet.join("p-0"), fleet.join("p-1"), fleet.join("d-0")
    stream, task = fleet.start(p0, d)
    fleet.failed(d, task)
    stream.abort()
    for link in (p0, p1, d):
        link.sent.clear()
    fleet.start(p1, d)
    assert not p0.sent


async def test_without_local_prefill_the_only_pair_is_tried_until_no_attempt_is_left() -> None:
    fleet = Fleet(config(local_prefill=False))
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d)
    for number in range(1, fleet.config.max_attempts):
        fleet.failed(d, task)
        p.take(Abort)
        d.take(Abort)
        fleet.wait(0.8, p, d)
        assert not d.sent  # the next attempt waits for a moment
        fleet.wait(2.0, p, d)
        assert fleet.grant(d).spec.attempt == number
        task = p.take(PrefillTask)
    fleet.failed(d, task)
    error = await failure(stream)
    assert error.code == "handoff_failed" and error.status == 500
    assert "5 attempts failed" in str(error) and "p-0 -> d-0" in str(error) and "a write failed" in str(error)
    assert "(5 times)" in str(error)
    assert not fleet.observer.fallbacks


def test_without_local_prefill_a_restarted_prefill_worker_is_a_new_pair() -> None:
    fleet = Fleet(config(local_prefill=False))
    p, d = fleet.join("p-0"), fleet.join("d-0")
    _, task = fleet.start(p, d)
    fleet.failed(d, task, "peer")  # seen by the decode worker before the router
    fleet.dispatcher.worker_left(p, "killed")
    fleet.wait(2.0, d)
    p = fleet.join("p-0", incarnation=2)
    d.take(Abort)
    fleet.grant(d)
    assert p.take(PrefillTask).spec.attempt == 1


def test_a_worker_that_fails_a_request_is_retried() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, _ = fleet.decode(p, d)
    message = WorkerFailure(request_id=stream.request.request_id, attempt=0, reason="out of memory")
    fleet.dispatcher.on_message(d, message)
    assert stream.request.attempt_number == 1 and fleet.observer.retries == {("decode", "worker_failure"): 1}


def test_a_choice_that_a_worker_gives_up_is_resumed_not_ended() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.decode(p, d)
    fleet.step(d, task, tokens(0, 1, 1, "error"))
    assert [update.finish for update in received(stream)] == [None]
    d.take(Abort)
    assert d.take(ReserveKV).spec.output_token_ids(0) == [1000, 1001]


def test_a_choice_that_is_given_up_as_another_one_ends_is_resumed() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.decode(p, d, n=2)
    fleet.step(d, task, tokens(0, 1, 1, "stop"), tokens(1, 1, 1, "abort"))
    assert stream.request.attempt_number == 1 and stream.request.unfinished == (1,)


def test_a_request_that_an_idle_decode_worker_has_forgotten_is_retried() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, _ = fleet.decode(p, d)
    fleet.wait(3.0, p, d)
    assert stream.request.attempt_number == 0
    fleet.wait(1.0, p, d)
    assert stream.request.attempt_number == 1 and fleet.observer.retries == {("decode", "forgotten"): 1}


def test_a_handoff_that_an_idle_prefill_worker_has_forgotten_is_asked_for() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    _, task = fleet.start(p, d)
    fleet.wait(4.0, p, d)
    assert d.take(Abort).unless_arrived
    fleet.failed(d, task, "unknown")
    d.take(Abort)
    assert d.take(LocalTask).spec.attempt == 1


def test_a_decode_worker_that_is_asked_and_does_not_answer_is_asked_once() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, _ = fleet.start(p, d, prompt_logprobs=0)  # which is looked at each second
    fleet.wait(7.0, p, d)
    assert d.take(Abort).unless_arrived and not d.sent and stream.request.attempt_number == 0
    fleet.wait(1.0, p, d)
    assert stream.request.attempt_number == 1 and fleet.observer.retries == {("prefill", "no_answer"): 1}


def test_a_busy_worker_is_not_taken_for_forgetful() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, _ = fleet.start(p, d)
    for steps in range(200):
        fleet.clock.advance(0.1)
        fleet.beat(p, d, num_running=1, steps=steps)
        fleet.dispatcher.tick()
    assert stream.request.attempt_number == 0 and not d.sent


# --- loss of decode workers and resuming -----------------------------------------------------------------------------


def test_a_lost_decode_worker_while_prefilling_aborts_the_task() -> None:
    fleet = Fleet()
    p, d0, d1 = fleet.join("p-0"), fleet.join("d-0"), fleet.join("d-1")
    fleet.start(p, d0)
    fleet.dispatcher.worker_left(d0, "killed")
    assert p.take(Abort).attempt == 0
    assert fleet.grant(d1).spec.attempt == 1 and p.take(PrefillTask).sample


def test_a_lost_decode_worker_resumes_with_the_accepted_tokens() -> None:
    fleet = Fleet()
    p, d0, d1 = fleet.join("p-0"), fleet.join("d-0"), fleet.join("d-1")
    stream, task = fleet.decode(p, d0)
    fleet.step(d0, task, tokens(0, 0, 4))
    assert text(stream) == [0, 1, 2, 3]
    fleet.dispatcher.worker_left(d0, "killed")
    ask = fleet.grant(d1)
    resumed = p.take(PrefillTask)
    assert not resumed.sample and resumed.spec == ask.spec
    assert ask.spec.output_token_ids(0) == [1000, 1001, 1002, 1003] and ask.spec.attempt == 1
    fleet.arrived(d1, resumed)
    fleet.step(d1, resumed, tokens(0, 4, 1, "stop"))
    assert text(stream) == [4] and state(stream) is RequestStatus.FINISHED
    assert fleet.observer.retries == {("decode", "worker_lost"): 1}


def test_a_stream_that_pauses_is_counted_once_however_many_attempts_its_next_token_takes() -> None:
    fleet = Fleet()
    p, d0, d1 = fleet.join("p-0"), fleet.join("d-0"), fleet.join("d-1")
    _, task = fleet.decode(p, d0)
    fleet.dispatcher.worker_left(d0, "killed")
    fleet.refuse(d1, "stale")
    d1.take(Abort)
    fleet.grant(d1)
    p.sent.clear()
    assert not fleet.observer.resumed
    fleet.dispatcher.on_message(d1, HandoffDone(request_id=task.spec.request_id, attempt=2))
    update = RequestTokens(task.spec.request_id, 2, (tokens(0, 1, 1),))
    fleet.dispatcher.on_message(d1, StepTokens(updates=(update,)))
    assert fleet.observer.resumed == {"ok": 1}


def test_only_unfinished_choices_are_resumed() -> None:
    fleet = Fleet()
    p, d0, d1 = fleet.join("p-0"), fleet.join("d-0"), fleet.join("d-1")
    stream, task = fleet.decode(p, d0, n=2)
    fleet.step(d0, task, tokens(0, 1, 1, "stop"), tokens(1, 1, 2))
    fleet.dispatcher.worker_left(d0, "killed")
    ask = fleet.grant(d1)
    assert ask.spec.choices == (1,) and ask.spec.output_token_ids(0) == [2000, 2001, 2002]
    resumed = p.take(PrefillTask)
    fleet.step(d1, resumed, tokens(0, 2, 1), tokens(1, 3, 1, "length"))
    updates = received(stream)
    assert [(u.choice, len(u.tokens), u.finish) for u in updates] == [(0, 2, "stop"), (1, 4, "length")]
    assert fleet.observer.dropped["unknown_choice"] == 1


def test_a_local_prefill_resumes_too() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d0, d1 = fleet.join("d-0"), fleet.join("d-1")
    stream = fleet.submit()
    fleet.step(d0, d0.take(LocalTask), tokens(0, 0, 2))
    fleet.dispatcher.worker_left(d0, "killed")
    task = d1.take(LocalTask)
    assert task.spec.is_resume and task.spec.output_token_ids(0) == [1000, 1001]
    fleet.step(d1, task, tokens(0, 2, 1, "stop"))
    assert text(stream) == [0, 1, 2] and not fleet.observer.fallbacks


async def test_attempts_are_bounded_and_the_error_names_the_last_worker() -> None:
    fleet = Fleet(config(expect_prefill=False, max_attempts=3))
    stream = fleet.submit()
    for index in range(3):
        d = fleet.join(f"d-{index}")
        d.take(LocalTask)
        fleet.dispatcher.worker_left(d, "killed")
    error = await failure(stream)
    assert error.code == "worker_lost" and error.status == 503 and "3 attempts" in str(error) and "d-2" in str(error)
    assert state(stream) is RequestStatus.FAILED and fleet.observer.finished == [stream.request]


def test_a_new_incarnation_replaces_the_older_session() -> None:
    fleet = Fleet(config(expect_prefill=False))
    old = fleet.join("d-0")
    stream = fleet.submit()
    task = old.take(LocalTask)
    new = fleet.join("d-0", incarnation=2)
    assert old.dropped and new.take(LocalTask).spec.attempt == 1
    fleet.step(old, task, tokens(0, 0, 1))  # still queued in the old session
    assert text(stream) == [] and fleet.observer.dropped == {"old_session": 1}


def test_a_reopened_session_of_the_same_life_is_told_that_nothing_lives() -> None:
    fleet = Fleet(config(expect_prefill=False))
    old = fleet.join("d-0")
    fleet.submit()
    fleet.dispatcher.worker_left(old, "connection reset")
    new = fleet.join("d-0")
    assert new.take(LiveRequests).attempts == () and new.take(LocalTask).spec.attempt == 1


def test_a_silent_worker_is_dropped_after_three_seconds() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d0, d1 = fleet.join("d-0"), fleet.join("d-1")
    fleet.submit()
    d0.take(LocalTask)
    fleet.wait(2.9, d1)
    assert not d0.dropped
    fleet.wait(0.3, d1)
    assert "heartbeat" in d0.dropped and d1.take(LocalTask).spec.attempt == 1
    assert [worker.worker_id for worker in fleet.dispatcher.view().workers] == ["d-1"]


# --- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["queued", "reserved", "prefilling", "transferring", "decoding"])
def test_a_client_that_leaves_frees_everything(stage: str) -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    if stage == "queued":
        fleet.dispatcher.worker_left(d, "killed")
    stream = fleet.submit()
    if stage not in ("queued", "reserved"):
        fleet.grant(d)
        task = p.take(PrefillTask)
        if stage != "prefilling":
            fleet.first_token(p, task)
        if stage == "decoding":
            fleet.arrived(d, task)
    stream.abort()
    stream.abort()
    assert state(stream) is RequestStatus.ABORTED and fleet.observer.finished == [stream.request]
    view = fleet.dispatcher.view()
    assert (view.num_in_flight, view.num_queued) == (0, 0) and all(worker.num_bound == 0 for worker in view.workers)
    assert any(isinstance(message, Abort) for message in d.sent) == (stage != "queued")
    assert any(isinstance(message, Abort) for message in p.sent) == (
        stage in ("reserved", "prefilling", "transferring")
    )


def test_late_tokens_of_an_ended_request_make_the_worker_drop_it() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.decode(p, d)
    stream.abort()
    d.take(Abort)
    fleet.step(d, task, tokens(0, 1, 1))
    assert d.take(Abort).request_id == task.spec.request_id
    assert fleet.observer.dropped == {"unknown_request": 1}


def test_a_stop_string_ends_one_choice_and_then_the_request() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.decode(p, d, n=2)
    received(stream)
    stream.finish_choice(0)
    stream.finish_choice(0)
    assert d.take(Abort).choices == (0,) and not p.sent
    fleet.step(d, task, tokens(0, 1, 1), tokens(1, 1, 1))
    assert [(u.choice, len(u.tokens)) for u in received(stream)] == [(1, 1)]
    assert d.take(Abort).choices == (0,)  # it had not reached the decode worker's sequences
    stream.finish_choice(1)
    assert d.take(Abort).choices == () and state(stream) is RequestStatus.FINISHED
    assert [choice.finish for choice in stream.request.choices] == ["stop", "stop"]


def test_nothing_is_missing_of_a_choice_that_a_stop_string_has_ended() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.decode(p, d, n=2)
    fleet.step(d, task, tokens(0, 2, 1))
    stream.finish_choice(0)
    fleet.wait(2.0, p, d, num_running=1)
    assert stream.request.attempt_number == 0


def test_the_room_of_an_answer_that_a_stop_string_ends_is_the_next_ones() -> None:
    fleet = Fleet(config(expect_prefill=False))
    fleet.join("d-0", max_num_seqs=1)
    answer, waiting = fleet.submit(), fleet.submit()
    answer.finish_choice(0)
    assert state(waiting) is RequestStatus.PREFILLING


def test_a_stop_string_during_the_handoff_reaches_both_workers() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d, n=2)
    fleet.first_token(p, task)
    received(stream)
    stream.finish_choice(1)
    assert p.take(Abort).choices == (1,) and d.take(Abort).choices == (1,)


def test_a_resumed_request_leaves_out_a_choice_that_a_stop_string_ended() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, _ = fleet.decode(p, d, n=2)
    received(stream)
    stream.finish_choice(0)
    fleet.dispatcher.worker_left(d, "killed")
    d = fleet.join("d-1")
    assert d.take(ReserveKV).spec.choices == (1,)


async def test_a_reader_that_ended_every_choice_sees_the_end_of_the_stream() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.decode(p, d)
    fleet.step(d, task, tokens(0, 1, 3))
    await anext(stream)
    stream.finish_choice(0)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


@pytest.mark.parametrize("started", [False, True])
async def test_a_deadline_ends_the_request_with_an_error(started: bool) -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    if started:
        stream, task = fleet.start(p, d, timeout_s=2.0, allowed_s=2.5)
        assert task.spec.remaining_s == 2.0
    else:
        fleet.dispatcher.worker_left(d, "killed")
        stream = fleet.submit(timeout_s=2.0, allowed_s=2.5)
    fleet.wait(2.1, p, d)
    error = await failure(stream)
    assert (error.code, error.status) == ("deadline_exceeded", 504)
    assert str(error).startswith("the request's 2.5 s are over")  # as it was asked for, not what was left of it
    assert state(stream) is RequestStatus.FAILED
    assert any(isinstance(message, Abort) for message in p.sent) == started


async def test_accepted_tokens_are_delivered_before_the_error() -> None:
    fleet = Fleet(config(expect_prefill=False, max_attempts=1))
    d = fleet.join("d-0")
    stream = fleet.submit()
    fleet.step(d, d.take(LocalTask), tokens(0, 0, 2))
    fleet.dispatcher.worker_left(d, "killed")
    assert len((await anext(stream)).tokens) == 2
    with pytest.raises(StreamError, match="d-0 lost: killed"):
        await anext(stream)


# --- placing ---------------------------------------------------------------------------------------------------------


def test_the_queue_is_bounded() -> None:
    fleet = Fleet(config(max_queue=2))
    fleet.submit()
    fleet.submit()
    with pytest.raises(CapacityError, match="2 requests wait"):
        fleet.submit()
    assert fleet.dispatcher.view().num_queued == 2


def test_requests_leave_the_queue_by_priority_and_arrival() -> None:
    fleet = Fleet(config(expect_prefill=False))
    streams = [fleet.submit(priority=priority) for priority in (1, 0, 1, 0)]
    d = fleet.join("d-0")
    order = [d.take(LocalTask).spec.request_id for _ in range(4)]
    assert order == [streams[i].request.request_id for i in (1, 3, 0, 2)]


def test_a_task_is_bound_only_while_a_step_of_work_is_ahead() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    first = fleet.submit(200)
    fleet.grant(d)
    p.take(PrefillTask)
    second, short = fleet.submit(200), fleet.submit(20)
    assert state(second) is RequestStatus.QUEUED
    assert state(short) is RequestStatus.QUEUED  # the long one has not begun: nothing can overtake it
    fleet.clock.advance(0.1)
    fleet.beat(p, num_running=1, waiting_tokens=136, steps=1, step_tokens=64, step_s=0.1)
    assert state(short) is RequestStatus.RESERVED and state(second) is RequestStatus.QUEUED
    fleet.clock.advance(0.2)
    fleet.beat(p, num_running=1, waiting_tokens=30, steps=3, step_tokens=64, step_s=0.1)
    assert state(second) is RequestStatus.RESERVED
    assert state(first) is RequestStatus.PREFILLING


def test_a_first_token_frees_the_prefill_worker_for_the_next_prompt() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    _, task = fleet.start(p, d, num_prompt_tokens=100)
    second = fleet.submit(100)
    assert state(second) is RequestStatus.QUEUED
    fleet.first_token(p, task)
    assert state(second) is RequestStatus.RESERVED


def test_requests_that_go_at_once_see_each_others_load() -> None:
    fleet = Fleet(config(expect_prefill=False))
    streams = [fleet.submit() for _ in range(3)]
    d = fleet.join("d-0", max_num_seqs=2)
    assert [state(one) is RequestStatus.QUEUED for one in streams] == [False, False, True] and len(d.sent) == 2


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d = fleet.join("d-0", max_num_batched_tokens=1024)
    running = fleet.submit(100)
    fleet.step(d, d.take(LocalTask), tokens(0, 0, 1))
    fleet.clock.advance(0.1)
    fleet.beat(d, num_running=1, num_free_blocks=20)
    large, small = fleet.submit(400), fleet.submit(20)
    assert state(large) is state(small) is RequestStatus.QUEUED
    running.abort()
    assert state(large) is RequestStatus.PREFILLING


@pytest.mark.parametrize("policy", ["least_loaded", "slo"])
async def test_nobody_waits_behind_those_that_a_lost_worker_alone_could_hold(policy: str) -> None:
    fleet = Fleet(config(expect_prefill=False, policy=policy))
    small, large = fleet.join("d-0", num_blocks=16), fleet.join("d-1", num_blocks=4096, max_num_seqs=64)
    fleet.beat(large, num_blocks=4096, num_free_blocks=4096)
    lost = []
    for _ in range(2 * LOOK_AHEAD):
        lost.append(fleet.submit(600))
        fleet.step(large, large.take(LocalTask), tokens(0, 0, CLEARED_BY_STEPS))
    fleet.dispatcher.worker_left(large, "killed")
    fleet.wait(0.5, small)
    other = fleet.submit()
    assert state(other) is RequestStatus.PREFILLING and small.take(LocalTask)
    fleet.wait(5.0, small)
    large = fleet.join("d-2", num_blocks=4096, max_num_seqs=64)
    assert state(lost[0]) is RequestStatus.PREFILLING, "they are looked at again when workers come"
    fleet.dispatcher.worker_left(large, "killed")
    assert not fleet.dispatcher.breaches()
    fleet.wait(34.0, small)
    assert {one.request.error_code for one in lost} == {"no_decode_capacity"}


def test_a_request_that_a_worker_can_hold_again_waits_there_for_room() -> None:
    fleet = Fleet(config(expect_prefill=False))
    small, large = fleet.join("d-0", num_blocks=16), fleet.join("d-1", num_blocks=256)
    fleet.beat(large, num_free_blocks=256)
    streams = []
    for _ in range(2):
        streams.append(fleet.submit(600))
        fleet.step(large, large.take(LocalTask), tokens(0, 0, CLEARED_BY_STEPS - 1))
    fleet.dispatcher.worker_left(large, "killed")
    fleet.wait(10, small)
    large = fleet.join("d-2", num_blocks=256, max_num_seqs=1)
    fleet.wait(25, small, large, num_running=1)
    assert sorted(state(one).value for one in streams) == ["prefilling", "queued"]


async def test_small_workers_that_come_do_not_prolong_the_wait_for_a_large_one() -> None:
    fleet = Fleet(config(expect_prefill=False))
    links = [fleet.join("d-0", num_blocks=16)]
    large = fleet.join("d-1")
    stream = fleet.submit(600)
    fleet.step(large, large.take(LocalTask), tokens(0, 0, 1))
    fleet.dispatcher.worker_left(large, "killed")
    for number in (2, 3):
        fleet.wait(15.5, *links)
        links.append(fleet.join(f"d-{number}", num_blocks=16))
    assert (await failure(stream)).code == "no_decode_capacity"


def test_a_short_prompt_is_prefilled_where_it_decodes() -> None:
    fleet = Fleet(config(max_local_prefill_tokens=20))
    fleet.join("p-0")
    d = fleet.join("d-0")
    fleet.submit(20)
    d.take(LocalTask)
    fleet.submit(21)
    d.take(ReserveKV)
    assert not fleet.observer.fallbacks


def test_without_a_prefill_worker_the_decode_worker_stands_in_and_it_is_counted() -> None:
    fleet = Fleet()
    d = fleet.join("d-0")
    fleet.submit()
    d.take(LocalTask)
    assert fleet.observer.fallbacks == {"local_prefill": 1}


async def test_without_local_prefill_the_request_waits_for_a_prefill_worker() -> None:
    fleet = Fleet(config(local_prefill=False))
    d = fleet.join("d-0")
    waiting = fleet.submit()
    fleet.wait(29, d)
    assert state(waiting) is RequestStatus.QUEUED and not d.sent
    p = fleet.join("p-0")
    assert state(waiting) is RequestStatus.RESERVED
    fleet.dispatcher.worker_left(p, "killed")
    lost = fleet.submit()
    fleet.wait(30.5, d)
    error = await failure(lost)
    assert (error.code, error.status) == ("no_prefill_capacity", 503)


def test_a_request_waits_for_room_for_as_long_as_a_worker_is_there() -> None:
    fleet = Fleet(config(expect_prefill=False))
    fleet.wait(1)  # nobody is there yet
    d = fleet.join("d-0", max_num_seqs=1)
    running, waiting = fleet.submit(), fleet.submit()
    fleet.wait(40, d, num_running=1)
    assert state(running) is RequestStatus.PREFILLING and state(waiting) is RequestStatus.QUEUED


def test_a_request_that_comes_back_waits_its_whole_time_for_a_worker_that_is_long_gone() -> None:
    fleet = Fleet(config(local_prefill=False))
    p, d0, d1 = fleet.join("p-0"), fleet.join("d-0"), fleet.join("d-1")
    stream, _ = fleet.decode(p, d0)
    fleet.dispatcher.worker_left(p, "killed")
    fleet.wait(31, d1)  # `d0` is silent, which is seen after three seconds
    assert state(stream) is RequestStatus.QUEUED
    fleet.join("p-1")
    assert state(stream) is RequestStatus.RESERVED


async def test_without_any_decode_worker_the_request_fails_after_a_while() -> None:
    fleet = Fleet()
    stream = fleet.submit()
    fleet.wait(30.5)
    assert (await failure(stream)).code == "no_decode_capacity"


def test_a_request_that_can_never_fit_is_refused_with_numbers() -> None:
    fleet = Fleet()
    fleet.join("d-0", num_blocks=8)
    with pytest.raises(RequestError, match=r"need 9 KV blocks of 16 tokens.* has 8") as info:
        fleet.submit(100, max_tokens=8 * BLOCK_SIZE - 99)
    assert info.value.status == 400
    assert fleet.observer.submitted == []  # no worker more could serve it: it is no load
    fleet.submit(100, max_tokens=8 * BLOCK_SIZE - 100)
    assert len(fleet.observer.submitted) == 1


async def test_what_no_worker_holds_is_told_in_words_that_clients_know() -> None:
    words = "This model's maximum context length is 128 tokens"
    fleet = Fleet()
    early = fleet.submit(100, max_tokens=99)  # before there is anybody who could say so
    fleet.join("d-0", num_blocks=8)
    with pytest.raises(RequestError, match=words):
        fleet.submit(100, max_tokens=99)
    fleet.wait(0.2)
    told = await failure(early)
    assert words in str(told) and (told.code, told.status) == ("context_length_exceeded", 400)


async def test_an_answer_as_long_as_the_context_becomes_what_a_worker_holds_that_comes_later() -> None:
    fleet = Fleet()
    fitted, fixed, large = (
        fleet.submit(num_prompt, max_tokens=999, takes_less=fills)
        for num_prompt, fills in ((100, True), (100, False), (200, True))
    )
    p, d = fleet.join("p-0"), fleet.join("d-0", num_blocks=8)
    fleet.wait(0.2)
    for refused_one in (fixed, large):
        assert (await failure(refused_one)).code == "context_length_exceeded"
    fleet.grant(d)
    (task,) = [each for each in p.sent if isinstance(each, PrefillTask)]
    assert task.spec.request_id == fitted.request.request_id
    assert task.spec.sampling.max_tokens == fitted.request.choices[0].max_tokens == 8 * BLOCK_SIZE - 100


@pytest.mark.parametrize(("num_prompt", "num_choices"), [(1, 1), (20, 1), (64, 3), (70, 2), (16, 7), (127, 1)])
def test_the_longest_answer_is_the_longest_that_is_taken(num_prompt: int, num_choices: int) -> None:
    fleet = Fleet()
    fleet.join("d-0", num_blocks=4)
    fleet.join("d-1", num_blocks=8)
    fleet.join("p-0", num_blocks=99)
    longest = fleet.dispatcher.longest_answer(num_prompt, num_choices, 1000)
    fleet.submit(num_prompt, n=num_choices, max_tokens=longest)
    with pytest.raises(RequestError, match=r"KV blocks of 16 tokens.* has 8"):
        fleet.submit(num_prompt, n=num_choices, max_tokens=longest + 1)
    assert fleet.dispatcher.longest_answer(num_prompt, num_choices, 1) == 1


def test_a_prompt_that_no_worker_holds_is_refused_whatever_its_answer() -> None:
    fleet = Fleet()
    assert fleet.dispatcher.longest_answer(200, 1, 1000) == 1000  # nobody is there who could say so
    fleet.join("d-0", num_blocks=8)
    with pytest.raises(RequestError, match="200 prompt tokens and 1 x up to 1 new ones need 13 KV blocks"):
        fleet.submit(200, max_tokens=fleet.dispatcher.longest_answer(200, 1, 1000))


def test_every_choice_needs_blocks_of_its_own() -> None:
    fleet = Fleet()
    fleet.join("d-0", num_blocks=8)
    fleet.submit(64, n=2, max_tokens=32)
    with pytest.raises(RequestError, match="need 10 KV blocks"):
        fleet.submit(64, n=3, max_tokens=32)


async def test_a_request_that_every_worker_says_never_fits_is_told_so() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream = fleet.submit()
    fleet.refuse(d, "never_fits")  # as a handoff; perhaps the worker can compute it itself
    refused(fleet, d, d.take(LocalTask), "never_fits")
    assert (await failure(stream)).status == 400 and not p.sent


# --- prompt logprobs, readiness, drain -------------------------------------------------------------------------------


def test_prompt_logprobs_come_before_the_first_update() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d, num_prompt_tokens=4, prompt_logprobs=0)
    entries = tuple(SampledToken(i, -1.0) for i in range(1, 4))

    def message(start: int, end: int) -> PromptLogprobs:
        return PromptLogprobs(
            request_id=task.spec.request_id, attempt=0, start=start, tokens=entries[start - 1 : end - 1]
        )

    fleet.step(d, task, tokens(0, 0, 1))  # another channel: it may be faster
    assert received(stream) == []
    fleet.dispatcher.on_message(p, message(1, 3))
    fleet.dispatcher.on_message(p, message(2, 4))
    assert stream.prompt_logprobs == list(entries) and text(stream) == [0]


def test_prompt_logprobs_that_do_not_come_hold_nothing_back_for_long() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d, prompt_logprobs=0)
    fleet.first_token(p, task)
    fleet.wait(1.2, p, d, num_running=1)
    assert text(stream) == [0]


@pytest.mark.parametrize("end", ["they come", "they are late", "the decode worker is lost"])
def test_an_answer_that_is_complete_before_its_prompt_logprobs_waits_for_them(end: str) -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d, num_prompt_tokens=3, prompt_logprobs=0)
    entries = (SampledToken(1, -1.0), SampledToken(2, -1.0))
    fleet.step(d, task, tokens(0, 0, 2, "length"))  # all of it, while the prefill worker's channel is slow
    assert received(stream) == [] and not stream.request.is_finished
    match end:
        case "they come":
            fleet.dispatcher.on_message(
                p, PromptLogprobs(request_id=task.spec.request_id, attempt=0, start=1, tokens=entries)
            )
            assert stream.prompt_logprobs == list(entries)
        case "they are late":
            fleet.wait(1.2, p, d)
        case _:
            fleet.dispatcher.worker_left(d, "gone")
            assert not stream.request.is_finished
            fleet.wait(1.2, p)
    assert stream.request.status is RequestStatus.FINISHED and text(stream) == [0, 1]
    assert fleet.dispatcher.view().num_in_flight == 0


def test_ready_says_what_is_missing() -> None:
    fleet = Fleet()
    assert fleet.dispatcher.ready() == ["no decode worker is ready", "no prefill worker is ready"]
    p = fleet.join("p-0")
    d = fleet.join("d-0")
    assert fleet.dispatcher.ready() == []
    fleet.dispatcher.on_message(p, status(state="draining"))
    assert fleet.dispatcher.ready() == ["no prefill worker is ready"]
    assert Fleet(config(expect_prefill=False)).dispatcher.ready() == ["no decode worker is ready"]
    assert fleet.dispatcher.drain_worker("d-0", 5.0) and d.take(Drain).deadline_s == 5.0
    assert not fleet.dispatcher.drain_worker("d-9", 5.0)
    assert "no decode worker is ready" in fleet.dispatcher.ready()


def test_a_worker_is_told_another_role_if_it_can_have_one() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0", can_change_role=True), fleet.join("d-0")
    assert fleet.dispatcher.set_role("p-0", "decode") and p.take(SetRole).role == "decode"
    assert not fleet.dispatcher.set_role("d-0", "prefill") and not d.sent, "it has one for good"
    assert not fleet.dispatcher.set_role("d-9", "prefill")


async def test_drain_waits_for_what_runs_and_takes_nothing_new() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.decode(p, d)
    drained = asyncio.ensure_future(fleet.dispatcher.drain(60))
    await asyncio.sleep(0)
    with pytest.raises(CapacityError):
        fleet.submit()
    assert not drained.done() and fleet.dispatcher.ready() == ["the router is draining"]
    fleet.step(d, task, tokens(0, 1, 1, "stop"))
    await drained
    assert state(stream) is RequestStatus.FINISHED


async def test_what_is_left_when_the_drain_ends_fails() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, _ = fleet.decode(p, d)
    await fleet.dispatcher.drain(0.0)
    assert (await failure(stream)).code == "router_stopping"
    assert isinstance(d.sent[-1], Abort)


@pytest.mark.parametrize("is_decoding", [False, True])
async def test_an_error_that_every_worker_would_meet_is_the_last_word_and_nobodys_fault(is_decoding: bool) -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, _ = fleet.decode(p, d) if is_decoding else fleet.start(p, d)
    reason = "the logits that follow token 9 are NaN or infinite"
    message = WorkerFailure(request_id=stream.request.request_id, attempt=0, reason=reason, code="nonfinite_logits")
    fleet.dispatcher.on_message(d if is_decoding else p, message)
    error = await failure(stream)
    assert (error.code, error.status, str(error)) == ("nonfinite_logits", 500, reason)
    for worker in [d] if is_decoding else [p, d]:
        assert not worker.take(Abort).unless_arrived and not worker.sent
    assert not fleet.observer.retries and not fleet.observer.num_poisoned and stream.request.attempt_number == 0
    _, again = fleet.decode(p, d)  # no pair is avoided
    assert again.spec.attempt == 0 and not fleet.dispatcher.view().avoided_pairs


def test_a_decode_worker_is_told_how_much_waits_behind_the_prompt_that_it_computes() -> None:
    fleet = Fleet(config(expect_prefill=False))
    worker = fleet.join("d-0", max_num_seqs=1, max_num_batched_tokens=16)
    fleet.submit()
    for priority in (0, 0, 3, BACKGROUND_PRIORITY):
        fleet.submit(priority=priority)
    behind = []
    for _ in range(5):
        task = worker.take(LocalTask)
        behind.append((task.spec.priority, task.tokens_behind))
        fleet.step(worker, task, tokens(0, 0, 1, "stop"))
        fleet.beat(worker)
    # The first one came alone. Who is less urgent than a prompt does not hurry it.
    assert behind == [(0, 0), (0, 20), (0, 0), (3, 0), (BACKGROUND_PRIORITY, 0)]


@pytest.mark.parametrize(("num_decode", "has_prefill", "behind"), [(1, False, 60), (2, False, 30), (2, True, None)])
def test_those_that_wait_are_shared_among_the_workers_that_will_compute_their_prompts(
    num_decode: int, has_prefill: bool, behind: int | None
) -> None:
    fleet = Fleet(config(expect_prefill=has_prefill, max_local_prefill_tokens=12))
    if has_prefill:
        fleet.join("p-0")
    workers = [fleet.join(f"d-{number}", max_num_seqs=1, max_num_batched_tokens=16) for number in range(num_decode)]
    for _ in range(num_decode + 6):
        fleet.submit(12)
    first = workers[0].take(LocalTask)
    assert first.tokens_behind == (None if has_prefill else 0)
    fleet.step(workers[0], first, tokens(0, 0, 1, "stop"))
    fleet.beat(workers[0])
    assert workers[0].take(LocalTask).tokens_behind == behind
