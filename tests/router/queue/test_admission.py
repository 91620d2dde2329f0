"""Overload in virtual time: what is refused, what is admitted, and how near to capacity the rest stays."""

from __future__ import annotations

import math
import re

import pytest

from kvferry.common.errors import CapacityError
from kvferry.common.request import SampledToken, SamplingParams
from kvferry.router.queue.admission import Admission
from kvferry.router.queue.forecast import QueueForecast
from kvferry.router.queue.request_queue import RequestQueue
from kvferry.router.state.demand import Promise
from kvferry.router.state.errors import StreamError
from kvferry.router.state.objectives import Objectives
from kvferry.router.state.request import RequestStatus, RouterRequest
from kvferry.router.state.token_stream import TokenStream
from kvferry.router.state.tracked_request import TrackedRequest
from kvferry.wire.tasks import LocalTask
from kvferry.wire.workers import StepSample

from ..fleet import Fleet, Recorder, config, tokens
from ..overload import simulate

SECONDS = 15.0
CAPACITY = 2 * 4000.0 * SECONDS  # prompt tokens, of two workers


async def failure(stream: TokenStream) -> StreamError:
    assert stream.request.status is RequestStatus.FAILED
    with pytest.raises(StreamError) as info:
        async for _ in stream:
            pass
    return info.value


# --- under load ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("load", [1.0, 2.0, 5.0])
def test_goodput_stays_at_capacity_and_first_tokens_within_the_objective(load: float) -> None:
    outcome = simulate(load, objective_s=2.0, seconds=SECONDS)
    assert outcome.good >= 0.95 * min(CAPACITY, outcome.offered)
    assert outcome.ttft_s(0.99) <= 2.0
    assert outcome.num_late <= 0.01 * len(outcome.ttfts_s)  # refused at once, not after a wait
    assert outcome.longest_queue < 400


@pytest.mark.slow
def test_a_sudden_overload_of_a_quiet_system_is_held() -> None:
    outcome = simulate(5.0, objective_s=1.0, seconds=SECONDS, warm_s=5.0)
    assert outcome.good >= 0.95 * CAPACITY and outcome.ttft_s(0.99) <= 1.0


@pytest.mark.slow
def test_where_rows_are_scarce_requests_are_what_is_counted() -> None:
    outcome = simulate(
        5.0, objective_s=2.0, seconds=SECONDS, tokens_per_s=20000.0, max_num_seqs=16, decode_s=1.0, rows_per_s=15.0
    )
    assert len(outcome.ttfts_s) >= 0.95 * 2 * 15 * SECONDS and outcome.ttft_s(0.99) <= 2.0


def test_without_an_objective_nothing_is_refused_but_by_the_queues_length() -> None:
    fleet = Fleet(config(max_queue=3))
    for _ in range(3):
        fleet.submit()
    with pytest.raises(CapacityError, match="3 requests wait, the queue holds 3"):
        fleet.submit()
    assert fleet.observer.rejected == {"queue_full": 1}
    assert len(fleet.observer.submitted) == 4  # who is refused is load, too: pools are sized by it


@pytest.mark.slow
def test_who_is_refused_is_told_when_the_work_before_it_will_be_done() -> None:
    outcome = simulate(5.0, objective_s=1.0, seconds=SECONDS)
    waits = sorted(outcome.retry_after_s)
    # Four times the capacity is turned away, so that after a second four seconds of work would come again.
    assert 1.0 < waits[len(waits) // 2] < 6.0 and waits[-1] < 30.0


# --- single decisions ------------------------------------------------------------------------------------------------


def busy_fleet(**changes: object) -> Fleet:
    """One worker that answers a prompt every 100 ms, and whose drain rate is known."""
    fleet = Fleet(config(expect_prefill=False, **changes))
    d = fleet.join("d-0", max_num_batched_tokens=16)
    fleet.submit(20)
    fleet.submit(20)
    for index in range(10):
        fleet.submit(20)
        fleet.clock.advance(0.1)
        fleet.step(d, d.take(LocalTask), tokens(0, 0, 1, "stop"))
        fleet.beat(d, steps=index)
    return fleet


def test_a_request_that_would_come_too_late_is_refused_at_once() -> None:
    fleet = busy_fleet(ttft_objective_ms=1000.0)
    with pytest.raises(CapacityError, match=r"requests wait: .* the limit is 1 s") as info:
        for _ in range(20):
            fleet.submit(20)
    told = re.search(r"may take ([0-9.]+) s", str(info.value))
    assert told is not None and 1.0 <= float(told[1]) < 1.2  # what is compared, caution and all, is what is told
    assert fleet.observer.rejected == {"objective": 1}
    # What is in excess is done by then, and so is the work of the one that was refused.
    assert info.value.retry_after_s == pytest.approx(float(told[1]) - 1.0 + 0.1, abs=0.02)
    assert 3 < fleet.dispatcher.view().num_queued < 12


def test_a_requests_own_deadline_counts_too() -> None:
    fleet = busy_fleet()
    for _ in range(6):
        fleet.submit(20)
    with pytest.raises(CapacityError, match=r"the limit is 0\.3 s"):
        fleet.submit(20, timeout_s=0.3)
    fleet.submit(20)
    assert fleet.observer.rejected == {"deadline": 1}


def test_where_nobody_waits_nobody_is_refused_however_slow_the_workers_are() -> None:
    fleet = Fleet(config(expect_prefill=False, ttft_objective_ms=10.0))
    d = fleet.join("d-0")
    for _ in range(3):
        stream = fleet.submit()
        fleet.clock.advance(5.0)
        fleet.step(d, d.take(LocalTask), tokens(0, 0, 1, "stop"))
        assert stream.request.status is RequestStatus.FINISHED


async def test_who_has_missed_the_objective_in_the_queue_is_sent_away() -> None:
    fleet = busy_fleet(ttft_objective_ms=1000.0)
    stream = fleet.submit()
    fleet.wait(1.2)
    error = await failure(stream)
    assert (error.code, error.status) == ("deadline_exceeded", 503) and error.retry_after_s is not None
    assert fleet.observer.rejected["late"] >= 1


async def test_a_long_prompt_is_sent_away_when_its_own_time_is_left_no_more() -> None:
    step_s = 0.01  # of 16 tokens: 320 take 0.2 s, of which 0.6 s are its limit
    samples = tuple(StepSample(step_s * tokens / 16, tokens, 0) for tokens in (4, 8, 16, 16))
    fleet = Fleet(config(expect_prefill=False, ttft_objective_ms=100.0))
    d = fleet.join("d-0", max_num_batched_tokens=16, num_blocks=256, samples=samples)
    for _ in range(2):
        fleet.submit(40)
    stream = fleet.submit(320)
    assert stream.request.status is RequestStatus.QUEUED
    fleet.wait(0.3, d, num_running=1, waiting_tokens=80)
    assert not stream.request.is_finished
    fleet.wait(0.2, d, num_running=1, waiting_tokens=80)
    assert (await failure(stream)).code == "deadline_exceeded"


def test_a_retry_is_not_sent_away_for_being_late() -> None:
    fleet = Fleet(config(expect_prefill=False, ttft_objective_ms=1000.0))
    d = fleet.join("d-0")
    stream = fleet.submit()
    fleet.clock.advance(0.9)
    fleet.dispatcher.worker_left(d, "killed")
    fleet.wait(0.5)
    assert stream.request.status is RequestStatus.QUEUED
    assert fleet.join("d-1").take(LocalTask).spec.attempt == 1


def test_a_background_request_is_not_refused_for_a_full_queue() -> None:
    fleet = Fleet(config(max_queue=1))
    fleet.submit()
    fleet.submit(is_background=True, priority=9)
    assert not fleet.observer.rejected and fleet.dispatcher.view().num_queued == 2


# --- what is learned -------------------------------------------------------------------------------------------------


def tracked(priority: int = 0, unloaded_s: float = 0.0) -> TrackedRequest:
    request = RouterRequest("r", [1, 2, 3], SamplingParams(), priority=priority)
    request.unloaded_s = unloaded_s
    return TrackedRequest(request, TokenStream(request, lambda: None, lambda choice: None), None)


def test_what_comes_is_load_whether_it_is_admitted_or_not() -> None:
    admission = Admission(RequestQueue(10), Recorder())
    for step in range(600):
        admission.check(tracked(unloaded_s=1.0).request, step / 10)
    assert admission.arrivals.longest_s(0, 60.0, 1.0) <= 1.0


def caution_after(attempt_number: int, *others: tuple[int, float]) -> float:
    """What is learned from a miss of a request of priority 1, admitted at 1 s, beside (priority, time) of others."""
    admission, one = Admission(RequestQueue(10), Recorder()), tracked(1)
    admission.on_admitted(one, 1.0)
    one.promise, one.request.attempt_number = Promise(1.0, 0.8, 1.0), attempt_number
    for priority, at_s in others:
        admission.on_admitted(tracked(priority), at_s)
    admission.on_first_token(one, 9.0)
    return admission.forecast.caution


def test_caution_is_learned_from_first_attempts_that_nobody_overtook() -> None:
    before = QueueForecast().caution
    assert caution_after(0) > before
    assert caution_after(0, (1, 2.0)) > before and caution_after(0, (0, 0.5)) > before
    assert caution_after(0, (0, 2.0)) == caution_after(1) == before


def test_clients_may_name_any_number_of_priorities() -> None:
    admission = Admission(RequestQueue(10), Recorder())
    for priority in range(1000):
        admission.on_admitted(tracked(priority), 0.0)
    assert len(admission._admitted_s) == 32


# --- priorities ------------------------------------------------------------------------------------------------------


async def test_a_full_queue_gives_way_to_a_more_urgent_request() -> None:
    fleet = Fleet(config(max_queue=3))
    streams = [fleet.submit(priority=priority) for priority in (5, 5, 1)]
    urgent = fleet.submit(priority=0)
    error = await failure(streams[1])  # the youngest of the least urgent
    assert (error.code, error.status) == ("rate_limit_exceeded", 429) and error.retry_after_s is not None
    assert urgent.request.status is RequestStatus.QUEUED and fleet.observer.rejected == {"displaced": 1}
    fleet.submit(priority=0)
    with pytest.raises(CapacityError):
        fleet.submit(priority=1)  # nobody is less urgent than itself


def test_a_stream_that_has_begun_is_never_displaced() -> None:
    fleet = Fleet(config(max_queue=1, expect_prefill=False))
    d = fleet.join("d-0")
    stream = fleet.submit(priority=9)
    fleet.step(d, d.take(LocalTask), tokens(0, 0, 1))
    fleet.dispatcher.worker_left(d, "killed")
    with pytest.raises(CapacityError):
        fleet.submit(priority=0)
    assert stream.request.status is RequestStatus.QUEUED


def test_an_urgent_request_waits_for_urgent_ones_only() -> None:
    fleet = busy_fleet(ttft_objective_ms=1000.0)
    with pytest.raises(CapacityError):
        for _ in range(20):
            fleet.submit(20)
    fleet.submit(20, priority=-1)


# --- the forecast ----------------------------------------------------------------------------------------------------


def measured(prompts_per_s: float) -> QueueForecast:
    forecast = QueueForecast()
    forecast.observe(0.0, somebody_waits=True)
    for index in range(1, 41):
        forecast.observe(index / prompts_per_s, somebody_waits=True)
        forecast.on_first_token(100, 0.2)
    return forecast


def test_nothing_is_expected_to_wait_before_anything_was_measured() -> None:
    assert QueueForecast().first_token_s(100, 10_000, 100) == 0.0


def test_the_rate_is_that_of_the_time_in_which_somebody_waited() -> None:
    forecast = measured(10.0)
    assert forecast.first_token_s(100, 1000, 10) == pytest.approx(1.2)
    forecast.observe(4.0, somebody_waits=False)
    forecast.observe(100.0, somebody_waits=True)  # an idle hour says nothing of capacity
    for index in range(1, 11):
        forecast.observe(100.0 + index / 10.0, somebody_waits=True)
        forecast.on_first_token(100, 0.2)
    assert forecast.first_token_s(100, 1000, 10) == pytest.approx(1.2)


def test_the_rate_is_that_of_the_last_seconds() -> None:
    forecast = QueueForecast()
    forecast.observe(0.0, somebody_waits=True)
    for second in range(1, 401):
        num_tokens = 100 if second <= 300 else 1000
        forecast.observe(float(second), somebody_waits=True)
        forecast.on_first_token(num_tokens, 0.2, unloaded_s=num_tokens / 1000)
    assert forecast.work_rate(1) == pytest.approx(1.0)
    assert forecast.first_token_s(100, 10_000, 1, unloaded_s=0.1) == pytest.approx(10.1)


def test_the_scarcer_of_tokens_and_slots_decides() -> None:
    forecast = measured(10.0)
    assert forecast.first_token_s(100, 2000, 10) == pytest.approx(2.2)
    assert forecast.first_token_s(100, 100, 30) == pytest.approx(3.2)


def test_a_longer_prompt_takes_longer_once_it_is_placed() -> None:
    forecast = measured(10.0)
    assert forecast.service_s(50) == forecast.service_s(100) == pytest.approx(0.2)
    assert forecast.service_s(400) == pytest.approx(0.8)


def test_caution_grows_with_what_came_later_than_expected_and_shrinks_slowly() -> None:
    forecast = QueueForecast()
    before = forecast.caution
    forecast.on_kept(Promise(0.0, 0.1, 1.0), 9.0)  # far from its limit: it says nothing of those near it
    forecast.on_kept(Promise(0.0, 0.8, None), 9.0)  # it had none
    assert forecast.caution == before
    forecast.on_kept(Promise(0.0, 0.8, 1.0), 0.9)  # later than expected, but not beyond what caution covers
    assert forecast.caution < before
    forecast.on_kept(Promise(0.0, 0.8, 1.0), 1.5)
    grown = forecast.caution
    assert grown > before
    for _ in range(1000):
        forecast.on_kept(Promise(0.0, 0.8, 1.0), 0.8)
    assert 1.0 <= forecast.caution < grown
    for _ in range(1000):
        forecast.on_kept(Promise(0.0, 0.8, 1.0), 100.0)
    assert forecast.caution <= 2.0  # half of the objective still fills the queue


def test_other_workers_mean_another_rate() -> None:
    forecast = measured(10.0)
    forecast.on_workers_changed()
    assert forecast.first_token_s(100, 1000, 10) == pytest.approx(1.2)  # believed until more is known
    for index in range(1, 11):
        forecast.observe(4.0 + index / 5, somebody_waits=True)
        forecast.on_first_token(100, 0.2)
    assert forecast.first_token_s(100, 1000, 10) == pytest.approx(2.2)


def seen_every(seconds: float, number: int, forecast: QueueForecast, at_s: float) -> float:
    """First tokens come at this pace while somebody waits; returns the time of the last one."""
    for _ in range(number):
        at_s += seconds
        forecast.observe(at_s, somebody_waits=True)
        forecast.on_first_token(100, 0.2, unloaded_s=0.1)
    return at_s


def test_a_rate_needs_a_few_first_tokens_and_slow_workers_have_one_too() -> None:
    forecast = QueueForecast()
    forecast.observe(0.0, somebody_waits=True)
    assert (forecast.work_rate(0), forecast.work_rate(3)) == (1.0, 3.0)
    at_s = seen_every(5.0, 7, forecast, 0.0)
    assert forecast.work_rate(3) == 3.0
    at_s = seen_every(5.0, 33, forecast, at_s)
    assert forecast.work_rate(3) == pytest.approx(0.02)
    seen_every(2.5, 40, forecast, at_s)  # fewer than a rate needs come in a window
    assert forecast.work_rate(3) == pytest.approx(0.04)


def test_the_work_of_other_workers_is_another_rate_too() -> None:
    forecast = QueueForecast()
    forecast.observe(0.0, somebody_waits=True)
    at_s = seen_every(0.1, 40, forecast, 0.0)
    forecast.on_workers_changed()
    seen_every(0.2, 10, forecast, at_s)
    assert forecast.work_rate(1) == pytest.approx(0.5)


def test_first_tokens_while_nobody_waits_say_nothing_of_the_rate() -> None:
    forecast = measured(10.0)
    forecast.observe(4.0, somebody_waits=False)
    for _ in range(20):
        forecast.on_first_token(1000, 0.2)
    assert forecast.first_token_s(100, 1000, 10, unloaded_s=0.2) == pytest.approx(1.2)


def test_the_refused_of_the_last_moment_are_expected_back() -> None:
    forecast = measured(10.0)
    assert forecast.retry_after_s(2.0, 4.0) == 2.0
    for _ in range(2):
        forecast.on_refused(4.0)
    assert forecast.retry_after_s(2.0, 4.0) == pytest.approx(2.2)
    forecast.on_refused(5.0)
    assert forecast.retry_after_s(2.0, 5.0) == pytest.approx(2.1 + 0.2 / math.e)


def test_the_fastest_first_token_is_forgotten_after_many_others() -> None:
    admission = Admission(RequestQueue(10), Recorder())
    one = tracked()
    for seconds in (0.1, *[0.5] * 63):
        one.request.timestamps["prefill_start"] = 10.0 - seconds
        admission.on_first_token(one, 10.0)
    assert admission.forecast.fastest_s == pytest.approx(0.1)
    admission.on_first_token(one, 10.0)
    assert admission.forecast.fastest_s == 0.5


@pytest.mark.parametrize(("fastest_s", "late_s"), [(0.25, 5.75), (0.9, 5.5)])
def test_a_request_is_too_late_when_the_fastest_first_token_would_miss_its_limit(
    fastest_s: float, late_s: float
) -> None:
    """And half of its limit is waited for in any case."""
    admission, one = Admission(RequestQueue(10), Recorder()), tracked()
    one.request.timestamps["queued"], one.request.objectives = 5.0, Objectives(ttft_s=1.0)
    one.deadline_s = 7.0
    admission.forecast.on_first_token(100, fastest_s)
    assert admission.late_s(one) == late_s
    assert admission.too_late(one, late_s - 0.01) is None and admission.too_late(one, late_s) is not None
    assert admission.too_late(one, 7.0) is None, "it has run out, which is another error"
    one.request.choices[0].tokens.append(SampledToken(1))
    assert admission.late_s(one) is None, "its client has got a first token"


def test_the_time_up_to_a_first_token_counts_as_waited() -> None:
    queue = RequestQueue(10)
    admission, one, other = Admission(queue, Recorder()), tracked(unloaded_s=0.1), tracked()
    other.request.timestamps["queued"] = 0.0
    queue.add(other)
    admission.observe(0.0)
    for number in range(1, 41):
        admission.on_first_token(one, 0.1 * number)
    assert admission.forecast.work_rate(9) == pytest.approx(1.0)
