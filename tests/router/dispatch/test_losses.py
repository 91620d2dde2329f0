"""Who is to blame when a worker is lost, who runs alone after that, and who is refused."""

from __future__ import annotations

import pytest

from kvferry.router.dispatch.deadlines import WORKER_WAIT_S
from kvferry.router.dispatch.isolation import PATIENCE_S
from kvferry.router.state.errors import StreamError
from kvferry.router.state.failures import CLEARED_BY_STEPS, NOTICE_S
from kvferry.router.state.request import RequestStatus
from kvferry.router.state.token_stream import TokenStream
from kvferry.wire.results import RequestTokens, StepTokens, TaskRefused, WorkerFailure
from kvferry.wire.tasks import Abort, LocalTask, PrefillTask, ReserveKV
from kvferry.wire.workers import Goodbye, LiveRequests, WorkerStatus

from ..fleet import Fleet, Link, config, hello, status, text, tokens

DEATH_S = 0.05  # from a task's sending to the loss: enough for it to have begun


async def failure(stream: TokenStream) -> StreamError:
    assert stream.request.status is RequestStatus.FAILED
    with pytest.raises(StreamError) as info:
        async for _ in stream:
            pass
    return info.value


def leave(fleet: Fleet, link: Link) -> None:
    """It ends by itself."""
    fleet.dispatcher.on_message(link, Goodbye())
    kill(fleet, link)


def kill(fleet: Fleet, link: Link) -> None:
    fleet.clock.advance(DEATH_S)
    fleet.dispatcher.worker_left(link, "killed")
    assert not fleet.dispatcher.breaches()


def strikes(fleet: Fleet, stream: TokenStream) -> int:
    tracked = fleet.dispatcher._in_flight.get(stream.request.request_id)
    assert tracked is not None
    return len(tracked.strikes)


# --- who was in the running step -------------------------------------------------------------------------------------


def test_a_request_that_was_decoding_gets_a_strike() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.decode(p, d)
    fleet.step(d, task, tokens(0, 0, 2))
    kill(fleet, d)
    assert strikes(fleet, stream) == 1


def test_a_request_whose_kv_has_arrived_and_that_waits_for_the_batch_gets_none() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    other, running = fleet.decode(p, d)
    fleet.step(d, running, tokens(0, 0, 1))
    fleet.clock.advance(0.01)
    stream, _ = fleet.decode(p, d)
    kill(fleet, d)
    assert (strikes(fleet, other), strikes(fleet, stream)) == (1, 0)


@pytest.mark.parametrize("alone", [False, True])
def test_once_the_step_of_its_arrival_is_over_it_has_joined_the_batch(alone: bool) -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    if not alone:
        _, running = fleet.decode(p, d)
    stream, _ = fleet.decode(p, d)
    fleet.clock.advance(0.01)
    if not alone:
        fleet.step(d, running, tokens(0, 0, 1))
    kill(fleet, d)
    assert strikes(fleet, stream) == 1


def test_a_resumed_request_that_feeds_its_tokens_again_gets_one() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.decode(p, d)
    fleet.step(d, task, tokens(0, 0, 2))
    kill(fleet, d)
    d = fleet.join("d-1")
    fleet.grant(d)
    fleet.arrived(d, p.take(PrefillTask))
    kill(fleet, d)
    assert strikes(fleet, stream) == 2


def test_a_preempted_request_is_not_in_the_running_step() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    first, task = fleet.decode(p, d)
    second, other = fleet.decode(p, d)
    fleet.step(d, task, tokens(0, 0, 2))
    fleet.step(d, other, tokens(0, 0, 2))
    for index in (2, 3):
        fleet.step(d, task, tokens(0, index, 1))  # the second one has lost its blocks
    kill(fleet, d)
    assert (strikes(fleet, first), strikes(fleet, second)) == (1, 0)


@pytest.mark.parametrize("stage", ["reserved", "prefilling", "transferring"])
def test_the_loss_of_the_decode_worker_before_the_kv_is_there_is_no_strike(stage: str) -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream = fleet.submit()
    if stage != "reserved":
        fleet.grant(d)
        task = p.take(PrefillTask)
        if stage == "transferring":
            fleet.first_token(p, task)
    kill(fleet, d)
    assert strikes(fleet, stream) == 0 and stream.request.attempt_number == 1


def test_the_prompt_that_a_prefill_worker_computed_gets_a_strike_and_those_behind_it_do_not() -> None:
    fleet = Fleet(config(local_prefill=False))
    p, d = fleet.join("p-0"), fleet.join("d-0")
    first, _ = fleet.start(p, d, num_prompt_tokens=100)
    fleet.clock.advance(0.1)
    fleet.beat(p, num_running=1, waiting_tokens=64, steps=1, step_tokens=64, step_s=0.1)
    second, _ = fleet.start(p, d, num_prompt_tokens=64)
    kill(fleet, p)
    for stream in (first, second):
        ask = d.take(Abort)
        assert ask.unless_arrived and ask.request_id == stream.request.request_id
    fleet.wait(3.6, d)
    assert (strikes(fleet, first), strikes(fleet, second)) == (1, 0)


def test_a_prompt_that_is_done_and_on_its_way_gets_none() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d)
    fleet.first_token(p, task)
    kill(fleet, p)
    fleet.failed(d, task, "peer")
    assert stream.request.attempt_number == 1 and strikes(fleet, stream) == 0


def test_a_prompt_that_the_decode_worker_computes_itself_gets_one() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d = fleet.join("d-0")
    stream = fleet.submit()
    d.take(LocalTask)
    kill(fleet, d)
    assert strikes(fleet, stream) == 1


def test_a_task_that_was_sent_to_a_corpse_is_nobodys_fault() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d = fleet.join("d-0")
    stream = fleet.submit()
    fleet.dispatcher.worker_left(d, "killed")
    assert strikes(fleet, stream) == 0


def test_what_was_sent_to_a_worker_after_it_had_fallen_silent_never_ran() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d = fleet.join("d-0")
    before = fleet.submit()
    fleet.clock.advance(0.1)
    fleet.beat(d, num_running=1)
    fleet.clock.advance(1.0)
    after = fleet.submit()
    fleet.wait(2.2)
    assert d.dropped and (strikes(fleet, before), strikes(fleet, after)) == (1, 0)


def test_a_peer_that_sees_the_death_first_does_not_hide_the_strike() -> None:
    fleet = Fleet()
    p0, p1, d = fleet.join("p-0"), fleet.join("p-1"), fleet.join("d-0")
    stream, task = fleet.start(p0, d)
    fleet.clock.advance(DEATH_S)
    fleet.failed(d, task, "peer")
    assert stream.request.attempt_number == 1 and strikes(fleet, stream) == 0
    kill(fleet, p0)
    assert strikes(fleet, stream) == 1
    assert p1.worker_id == stream.request.prefill_worker  # and nothing had to wait for that


@pytest.mark.parametrize(
    ("has_stepped", "notice_s", "num_strikes"), [(False, DEATH_S, 1), (True, DEATH_S, 0), (False, NOTICE_S + 0.1, 0)]
)
def test_the_step_in_which_an_attempt_is_taken_back_may_end_its_worker_yet(
    has_stepped: bool, notice_s: float, num_strikes: int
) -> None:
    fleet = Fleet()
    p0, _, d = fleet.join("p-0"), fleet.join("p-1"), fleet.join("d-0")
    stream, task = fleet.start(p0, d)
    fleet.clock.advance(DEATH_S)
    fleet.failed(d, task, "fenced")  # nobody failed, so no failure is counted
    if has_stepped:
        fleet.clock.advance(DEATH_S)
        fleet.beat(p0, steps=1)
    fleet.clock.advance(notice_s - DEATH_S)
    kill(fleet, p0)
    assert stream.request.attempt_number == 1 and stream.request.num_failures == 0
    assert strikes(fleet, stream) == num_strikes


def test_an_attempt_that_nobody_computed_does_not_hide_the_strike_of_the_one_before() -> None:
    fleet = Fleet()
    p0, p1, d = fleet.join("p-0"), fleet.join("p-1"), fleet.join("d-0")
    stream, task = fleet.start(p0, d)
    fleet.clock.advance(DEATH_S)
    fleet.failed(d, task, "peer")
    d.take(Abort)
    fleet.refuse(d, "stale")
    assert stream.request.attempt_number == 2 and stream.request.prefill_worker == p1.worker_id
    kill(fleet, p0)
    assert strikes(fleet, stream) == 1


def test_a_worker_that_comes_back_in_the_same_life_takes_its_strike_back() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d = fleet.join("d-0")
    stream = fleet.submit()
    kill(fleet, d)
    assert strikes(fleet, stream) == 1
    fleet.join("d-0")
    assert strikes(fleet, stream) == 0


def test_whoever_had_a_token_in_any_part_of_the_last_step_was_computed() -> None:
    """What is too large for a frame comes in parts."""
    fleet = Fleet(config(expect_prefill=False))
    d = fleet.join("d-0", max_num_seqs=8)
    streams, tasks = [], []
    for _ in range(5):
        streams.append(fleet.submit(max_tokens=8))
        tasks.append(d.take(LocalTask))
        fleet.step(d, tasks[-1], tokens(0, 0, 1))
    fleet.step(d, tasks[0], tokens(0, 1, 1))
    for place, task in enumerate(tasks[:4]):
        update = RequestTokens(task.spec.request_id, task.spec.attempt, (tokens(0, 2 if place == 0 else 1, 1),))
        fleet.dispatcher.on_message(d, StepTokens(updates=(update,), is_rest=place > 0))
    kill(fleet, d)
    assert [strikes(fleet, stream) for stream in streams] == [1, 1, 1, 1, 0]


# --- alone -----------------------------------------------------------------------------------------------------------


def suspect(fleet: Fleet, names: str = "ab", max_tokens: int = 8) -> TokenStream:
    """A request that two workers did not survive. Colocated."""
    (stream,) = suspects(fleet, 1, names, max_tokens)
    return stream


def suspects(fleet: Fleet, num_requests: int, names: str = "ab", max_tokens: int = 8) -> list[TokenStream]:
    """Requests that were on the same two workers."""
    streams = [fleet.submit(max_tokens=max_tokens) for _ in range(num_requests)]
    for name in names:
        d = fleet.join(f"d-{name}")
        for _ in streams:
            d.take(LocalTask)
        kill(fleet, d)
    return streams


def suspect_beside(fleet: Fleet, busy: Link) -> TokenStream:
    """The same while another worker has something to do."""
    for worker_id in ("d-a", "d-b"):
        d = fleet.join(worker_id)
        if worker_id == "d-a":
            stream = fleet.submit(max_tokens=8)
        d.take(LocalTask)
        fleet.beat(busy, num_running=1, steps=int(fleet.clock.now() * 100))
        kill(fleet, d)
    return stream


def test_after_two_strikes_the_request_waits_for_an_empty_worker() -> None:
    fleet = Fleet(config(expect_prefill=False))
    busy = fleet.join("d-0", max_num_seqs=1)
    fleet.submit()
    task = busy.take(LocalTask)
    fleet.step(busy, task, tokens(0, 0, 1))
    stream = suspect_beside(fleet, busy)
    late = fleet.submit()
    assert late.request.status is RequestStatus.QUEUED, "the worker is kept empty"
    fleet.step(busy, task, tokens(0, 1, 1, "stop"))
    alone = busy.take(LocalTask)
    assert alone.spec.request_id == stream.request.request_id and alone.spec.attempt == 2
    assert not busy.sent and not fleet.dispatcher.breaches()
    fleet.step(busy, alone, tokens(0, 0, 1, "stop"))
    assert stream.request.status is RequestStatus.FINISHED
    assert busy.take(LocalTask).spec.request_id == late.request.request_id


def test_a_worker_that_changes_its_role_is_not_kept_for_a_suspect() -> None:
    fleet = Fleet(config(expect_prefill=False))
    busy = fleet.join("d-0", max_num_seqs=1, can_change_role=True)
    fleet.submit()
    task = busy.take(LocalTask)
    fleet.step(busy, task, tokens(0, 0, 1))
    stream = suspect_beside(fleet, busy)
    fleet.dispatcher.on_message(busy, status(num_running=1, role="prefill"))
    fleet.step(busy, task, tokens(0, 1, 1, "stop"))
    assert not busy.sent and stream.request.status is RequestStatus.QUEUED, "it is empty, and prefills"
    other = fleet.join("d-1")
    assert other.take(LocalTask).spec.request_id == stream.request.request_id
    assert not busy.sent and not fleet.dispatcher.breaches()


def test_a_suspect_for_which_a_worker_is_being_emptied_is_not_given_up() -> None:
    fleet = Fleet(config(expect_prefill=False))
    busy = fleet.join("d-0", num_blocks=1, max_num_seqs=1)
    fleet.submit(4, max_tokens=4)
    busy.take(LocalTask)
    stream = suspect_beside(fleet, busy)

    def wait(seconds: float, *alive: Link) -> None:
        for _ in range(round(seconds)):
            fleet.wait(1.0, *alive, num_running=1, steps=int(fleet.clock.now() * 100))

    wait(WORKER_WAIT_S - 5.0, busy)  # it is too small for the suspect
    large = Link("d-1", 99)
    fleet.dispatcher.worker_joined(large, hello("d-1", "decode", max_num_seqs=1))
    wait(6.0, busy, large)  # it has work of another router
    assert stream.request.status is RequestStatus.QUEUED
    wait(PATIENCE_S, busy, large)
    assert large.take(LocalTask).spec.request_id == stream.request.request_id


async def test_a_third_worker_that_is_lost_with_the_request_alone_on_it_proves_it() -> None:
    fleet = Fleet(config(expect_prefill=False))
    stream = suspect(fleet, "abc")
    error = await failure(stream)
    assert (error.code, error.status) == ("poison_request", 500)
    assert "d-a, d-b, d-c" in str(error) and fleet.observer.num_poisoned == 1
    assert not fleet.dispatcher.breaches() and fleet.dispatcher.view().num_in_flight == 0


@pytest.mark.parametrize("num_steps", [CLEARED_BY_STEPS - 1, CLEARED_BY_STEPS])
async def test_a_request_that_went_on_past_the_place_of_its_losses_is_cleared(num_steps: int) -> None:
    """Three workers are killed from outside under one request that gets on in between."""
    fleet = Fleet(config(expect_prefill=False))
    stream = suspect(fleet, "ab", max_tokens=100)
    d = fleet.join("d-c")
    task = d.take(LocalTask)
    late = fleet.submit()
    for index in range(num_steps):
        assert late.request.status is RequestStatus.QUEUED, "the worker is its own"
        fleet.step(d, task, tokens(0, index, 1))
    is_cleared = num_steps == CLEARED_BY_STEPS
    assert (late.request.status is not RequestStatus.QUEUED) is is_cleared
    assert strikes(fleet, stream) == (0 if is_cleared else 2)
    kill(fleet, d)
    if is_cleared:
        assert strikes(fleet, stream) == 1 and stream.request.status is RequestStatus.QUEUED
    else:
        assert (await failure(stream)).code == "poison_request"
    assert not fleet.dispatcher.breaches()


def test_tokens_of_one_message_are_one_step() -> None:
    """Else a request of many choices, or of many drafted tokens, were cleared by its first step."""
    fleet = Fleet(config(expect_prefill=False))
    stream = suspect(fleet, "ab", max_tokens=100)
    d = fleet.join("d-c")
    fleet.step(d, d.take(LocalTask), tokens(0, 0, 2 * CLEARED_BY_STEPS))
    assert strikes(fleet, stream) == 2


def test_a_loss_that_is_not_the_requests_fault_does_not_end_its_trial() -> None:
    fleet = Fleet(config(expect_prefill=False))
    stream = suspect(fleet)
    d = fleet.join("d-0")
    d.take(LocalTask)
    fleet.dispatcher.worker_left(d, "killed")  # before it can have read the task
    assert stream.request.status is RequestStatus.QUEUED
    assert fleet.join("d-1").take(LocalTask).spec.attempt == 3


def test_others_go_on_at_once_on_the_workers_that_are_left() -> None:
    fleet = Fleet(config(expect_prefill=False))
    stream = suspect(fleet)
    d0, d1 = fleet.join("d-0"), fleet.join("d-1")
    d0.take(LocalTask)
    others = [fleet.submit() for _ in range(3)]
    assert [d1.take(LocalTask).spec.request_id for _ in others] == [other.request.request_id for other in others]
    assert not d0.sent and stream.request.decode_worker == "d-0"


def test_a_suspect_takes_one_worker_of_each_role_where_prompts_must_not_be_local() -> None:
    fleet = Fleet(config(local_prefill=False))
    p0, p1 = fleet.join("p-0"), fleet.join("p-1")
    stream = fleet.submit()
    for name in "ab":
        d = fleet.join(f"d-{name}")
        fleet.grant(d)
        p = p0 if stream.request.prefill_worker == "p-0" else p1
        task = p.take(PrefillTask)
        fleet.arrived(d, task)
        fleet.step(d, task, tokens(0, stream.request.num_output_tokens, 1))
        kill(fleet, d)
    d0, d1 = fleet.join("d-0"), fleet.join("d-1")
    alone = fleet.grant(d0)
    assert alone.spec.request_id == stream.request.request_id
    quiet = p0 if stream.request.prefill_worker == "p-0" else p1
    loud = p1 if quiet is p0 else p0
    quiet.take(PrefillTask)
    other = fleet.submit()
    fleet.grant(d1)
    assert loud.take(PrefillTask).spec.request_id == other.request.request_id
    assert not quiet.sent and not d0.sent and not fleet.dispatcher.breaches()


def suspect_of_handoffs(fleet: Fleet, p: Link) -> TokenStream:
    """A request whose prompt `p` has shipped to two decode workers that were lost with it."""
    stream = fleet.submit()
    for name in "ab":
        d = fleet.join(f"d-{name}")
        fleet.grant(d)
        task = p.take(PrefillTask)
        fleet.arrived(d, task)
        fleet.step(d, task, tokens(0, stream.request.num_output_tokens, 1))
        kill(fleet, d)
    return stream


def test_a_suspect_whose_pair_has_failed_runs_with_another_decode_worker() -> None:
    fleet = Fleet(config(local_prefill=False))
    p = fleet.join("p-0")
    stream = suspect_of_handoffs(fleet, p)
    d0, d1 = fleet.join("d-0"), fleet.join("d-1")
    fleet.grant(d0)
    fleet.failed(d0, p.take(PrefillTask))
    p.take(Abort)
    fleet.clock.advance(1.0)
    fleet.dispatcher.tick()
    assert fleet.grant(d1).spec.request_id == stream.request.request_id
    assert p.take(PrefillTask).spec.attempt == 3 and not fleet.dispatcher.breaches()


def test_with_a_prefill_pool_a_suspect_runs_whole_on_one_decode_worker() -> None:
    fleet = Fleet()
    p = fleet.join("p-0")
    suspect_of_handoffs(fleet, p)
    d = fleet.join("d-0")
    assert d.take(LocalTask).spec.output_token_ids(0) == [1000, 1001] and not p.sent
    assert not fleet.observer.fallbacks


def test_a_request_that_becomes_a_suspect_while_it_is_queued_is_placed_as_one() -> None:
    fleet = Fleet()
    p, lost, d = fleet.join("p-0"), fleet.join("d-a"), fleet.join("d-b")
    stream, task = fleet.decode(p, lost)
    fleet.step(lost, task, tokens(0, 0, 2))
    kill(fleet, lost)
    fleet.grant(d)
    fleet.clock.advance(DEATH_S)
    fleet.failed(d, p.take(PrefillTask), "expired", peer="")  # the prefill worker says nothing: it computes, or is dead
    d.take(Abort)
    fleet.refuse(d)
    assert stream.request.status is RequestStatus.QUEUED
    kill(fleet, p)
    assert strikes(fleet, stream) == 2
    fleet.wait(1.5, d)
    assert d.take(LocalTask).spec.request_id == stream.request.request_id


def test_suspects_one_after_the_other_leave_the_others_half_of_the_only_worker() -> None:
    fleet = Fleet(config(expect_prefill=False))
    suspects(fleet, 2)
    d = fleet.join("d-0")
    first = d.take(LocalTask)
    other = fleet.submit()
    fleet.wait(1.0, d, num_running=1)
    assert not d.sent
    fleet.step(d, first, tokens(0, 0, 1, "stop"))
    served = d.take(LocalTask)
    assert served.spec.request_id == other.request.request_id and not d.sent
    fleet.step(d, served, tokens(0, 0, 1))
    fleet.clock.advance(0.5)
    waiting = fleet.submit()
    assert d.take(LocalTask).spec.request_id == waiting.request.request_id, "the second suspect has to wait"
    fleet.clock.advance(1.2)
    fleet.beat(d, num_running=2, steps=1)
    late = fleet.submit()
    assert late.request.status is RequestStatus.QUEUED and not d.sent, "now the worker is claimed for it"


def test_suspects_have_half_of_the_workers_at_most() -> None:
    fleet = Fleet(config(expect_prefill=False))
    suspects(fleet, 2)
    links = []
    for number, num_running in enumerate((1, 1, 1, 2)):
        links.append(fleet.join(f"d-{number}"))
        fleet.wait(0.2, *links)
        assert sum(bool(link.sent) for link in links) == num_running
    assert not fleet.dispatcher.breaches()


@pytest.mark.parametrize("others_wait", [True, False])
def test_an_answer_on_the_only_worker_makes_way_for_a_suspect_if_others_wait(others_wait: bool) -> None:
    fleet = Fleet(config(expect_prefill=False))
    busy = fleet.join("d-0", max_num_seqs=1)
    answer = fleet.submit(max_tokens=100)
    task = busy.take(LocalTask)
    fleet.step(busy, task, tokens(0, 0, 1))
    stream = suspect_beside(fleet, busy)
    others = [fleet.submit()] if others_wait else []
    fleet.step(busy, task, tokens(0, 1, 1))
    fleet.wait(PATIENCE_S + 1.0, busy, num_running=1)
    if not others_wait:
        assert not busy.sent and stream.request.status is RequestStatus.QUEUED
        return
    assert busy.take(Abort).request_id == answer.request.request_id
    alone = busy.take(LocalTask)
    assert alone.spec.request_id == stream.request.request_id and not busy.sent
    fleet.step(busy, alone, tokens(0, 0, CLEARED_BY_STEPS - 1))
    assert answer.request.status is RequestStatus.QUEUED and answer.request.num_failures == 0
    fleet.step(busy, alone, tokens(0, CLEARED_BY_STEPS - 1, 1, "stop"))
    for request in (answer.request, others[0].request):
        task = busy.take(LocalTask)
        assert task.spec.request_id == request.request_id
        fleet.step(busy, task, tokens(0, request.num_output_tokens, 1, "stop"))
    assert answer.request.is_finished and answer.request.num_output_tokens == 3
    assert not fleet.dispatcher.breaches()


def test_a_suspect_whose_task_is_refused_is_sent_to_nobody_who_was_not_kept_for_it() -> None:
    fleet = Fleet(config(local_prefill=False))
    p = fleet.join("p-0")
    suspect_of_handoffs(fleet, p)
    d = fleet.join("d-0")
    other = fleet.join("p-1")
    spec = fleet.grant(d).spec
    p.take(PrefillTask)
    refusal = TaskRefused(request_id=spec.request_id, attempt=spec.attempt, reason="draining")
    fleet.dispatcher.on_message(p, refusal)
    assert d.take(Abort).attempt == spec.attempt and not other.sent
    assert not fleet.dispatcher.breaches()


def test_a_suspect_that_finds_no_room_asks_again_when_there_may_be_some() -> None:
    fleet = Fleet(config(local_prefill=False))
    p = fleet.join("p-0")
    suspect_of_handoffs(fleet, p)
    d = fleet.join("d-0")
    fleet.refuse(d)
    assert not d.sent
    fleet.clock.advance(0.1)
    fleet.beat(d)
    d.take(ReserveKV)


def test_a_suspect_for_whom_others_made_way_waits_for_the_end_of_their_step() -> None:
    """Whoever ends the worker before that, it is not alone there, and they had no part in what it does after."""
    fleet = Fleet(config(expect_prefill=False))
    busy = fleet.join("d-0", max_num_seqs=1)
    answer = fleet.submit(max_tokens=100)
    fleet.step(busy, busy.take(LocalTask), tokens(0, 0, 1))
    suspect_beside(fleet, busy)
    fleet.submit()
    for _ in range(round(PATIENCE_S * 10) + 5):
        if busy.sent:
            break
        fleet.wait(0.1, busy, num_running=1, busy_for_s=0.05)
    assert busy.take(Abort).request_id == answer.request.request_id and not busy.sent
    fleet.wait(0.1, busy, num_running=1, busy_for_s=0.15)
    assert not busy.sent, "it is in the step that has the interrupted answer"
    fleet.wait(0.2, busy)
    assert busy.take(LocalTask)
    kill(fleet, busy)
    assert strikes(fleet, answer) == 0


def test_a_claimed_worker_that_is_lost_frees_its_claim() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d = fleet.join("d-0", max_num_seqs=1)
    other = fleet.submit()
    d.take(LocalTask)
    stream = suspect_beside(fleet, d)
    assert stream.request.status is RequestStatus.QUEUED and not d.sent
    fleet.dispatcher.worker_left(d, "killed")
    assert not fleet.dispatcher._isolation.claims
    new = fleet.join("d-1")
    assert new.take(LocalTask).spec.request_id == stream.request.request_id
    assert other.request.status is RequestStatus.QUEUED and not fleet.dispatcher.breaches()


# --- suspects and the others ------------------------------------------------------------------------------------------


async def test_who_is_lost_with_a_suspect_is_not_to_blame() -> None:
    fleet = Fleet(config(expect_prefill=False))
    stream = suspect(fleet, "a")
    assert not fleet.blameless, "it may have been the worker's own fault"
    for name in "bc":
        d = fleet.join(f"d-{name}")
        d.take(LocalTask)
        kill(fleet, d)
    assert fleet.blameless == ["d-b", "d-c"] and stream.request.status is RequestStatus.FAILED


def test_who_is_lost_with_the_second_attempt_that_ran_there_is_not_lost_with_a_suspect() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d = fleet.join("d-0")
    stream = fleet.submit()
    fleet.clock.advance(DEATH_S)
    fleet.dispatcher.on_message(d, WorkerFailure(request_id=stream.request.request_id, attempt=0, reason="odd"))
    assert stream.request.attempt_number == 1
    kill(fleet, d)
    assert strikes(fleet, stream) == 1 and not fleet.blameless


def test_who_is_lost_beside_a_suspect_or_before_it_began_is_told_nothing() -> None:
    fleet = Fleet(config(expect_prefill=False))
    stream = suspect(fleet, "a")
    idle, d = fleet.join("d-0"), fleet.join("d-1")
    loaded = idle if idle.sent else d
    kill(fleet, d if loaded is idle else idle)
    fleet.dispatcher.worker_left(loaded, "killed")
    assert strikes(fleet, stream) == 2 and fleet.blameless == [loaded.worker_id]


@pytest.mark.parametrize("num_strikes", [1, 2])
def test_on_the_only_worker_suspects_wait_until_others_had_their_turn(num_strikes: int) -> None:
    fleet = Fleet(config(expect_prefill=False))
    stream = suspect(fleet, "ab"[:num_strikes])
    other = fleet.submit()
    d = fleet.join("d-0")
    served = d.take(LocalTask)
    assert served.spec.request_id == other.request.request_id and not d.sent
    fleet.wait(1.9, d, num_running=1)
    assert not d.sent and stream.request.status is RequestStatus.QUEUED
    fleet.step(d, served, tokens(0, 0, 1, "stop"))
    fleet.wait(0.2, d)
    assert d.take(LocalTask).spec.request_id == stream.request.request_id
    assert not fleet.dispatcher.breaches()


def test_suspects_wait_for_nobody_where_there_is_nobody() -> None:
    fleet = Fleet(config(expect_prefill=False))
    stream = suspect(fleet, "a")
    assert fleet.join("d-0").take(LocalTask).spec.request_id == stream.request.request_id


def test_suspects_do_not_wait_for_others_beside_a_worker_that_was_there_all_the_time() -> None:
    fleet = Fleet(config(expect_prefill=False))
    stream = fleet.submit()
    lost = fleet.join("d-a")
    lost.take(LocalTask)
    there = fleet.join("d-0", max_num_seqs=1)
    fleet.submit()
    there.take(LocalTask)
    kill(fleet, lost)
    assert stream.request.status is RequestStatus.QUEUED, "there is no room for it"
    assert fleet.join("d-1").take(LocalTask).spec.request_id == stream.request.request_id


# --- drain -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_runs_on_a_worker_that_drains_goes_on_elsewhere_and_nobody_has_failed() -> None:
    fleet = Fleet()
    p, d0 = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.decode(p, d0)
    fleet.step(d0, task, tokens(0, 0, 3))
    fleet.beat(d0, state="draining", num_running=1)
    fleet.beat(d0, state="draining", num_running=1)
    d1 = fleet.join("d-1")
    waiting = fleet.submit()
    assert d1.take(ReserveKV).spec.request_id == waiting.request.request_id and not d0.sent
    leave(fleet, d0)
    assert stream.request.num_failures == 0 and strikes(fleet, stream) == 0
    assert fleet.observer.retries == {("decode", "drained"): 1} and fleet.observer.num_drains == 1
    resumed = d1.take(ReserveKV)
    assert resumed.spec.output_token_ids(0) == [1000, 1001, 1002]
    d1.sent.insert(0, resumed)
    fleet.grant(d1)
    fleet.step(d1, p.take(PrefillTask), tokens(0, 3, 1, "stop"))
    assert text(stream) == [0, 1, 2, 3] and fleet.observer.resumed == {"ok": 1}


def test_drains_do_not_count_as_attempts_however_many_there_are() -> None:
    fleet = Fleet(config(expect_prefill=False, max_attempts=2))
    stream = fleet.submit()
    for index in range(6):
        d = fleet.join(f"d-{index}")
        task = d.take(LocalTask)
        fleet.step(d, task, tokens(0, index, 1))
        fleet.beat(d, state="draining", num_running=1)
        leave(fleet, d)
    assert stream.request.status is RequestStatus.QUEUED and stream.request.num_output_tokens == 6
    assert fleet.observer.num_drains == 6 and fleet.observer.num_exhausted == 0


def test_a_draining_prefill_worker_ends_without_blame_too() -> None:
    fleet = Fleet(config(local_prefill=False))
    p0, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p0, d)
    fleet.clock.advance(0.1)
    fleet.beat(p0, state="draining", num_running=1)
    p1 = fleet.join("p-1")
    leave(fleet, p0)
    assert d.take(Abort).unless_arrived
    fleet.failed(d, task, "peer")
    d.take(Abort)
    fleet.grant(d)
    assert p1.take(PrefillTask).spec.attempt == 1
    assert stream.request.num_failures == 0 and strikes(fleet, stream) == 0


def test_a_worker_that_ends_at_once_as_it_was_told_has_not_failed() -> None:
    """SIGINT: it drains nothing, and says goodbye."""
    fleet = Fleet(config(expect_prefill=False))
    d = fleet.join("d-0")
    stream = fleet.submit()
    d.take(LocalTask)
    leave(fleet, d)
    assert stream.request.num_failures == strikes(fleet, stream) == 0
    assert stream.request.status is RequestStatus.QUEUED


async def test_a_worker_that_is_killed_while_it_drains_is_lost_like_any_other() -> None:
    fleet = Fleet(config(expect_prefill=False))
    stream = fleet.submit()
    for number in range(3):
        d = fleet.join(f"d-{number}")
        d.take(LocalTask)
        fleet.beat(d, state="draining", num_running=1)
        kill(fleet, d)
        assert stream.request.num_failures == number + 1
    assert (await failure(stream)).code == "poison_request"
    assert fleet.blameless == ["d-1", "d-2"]


def test_a_charge_is_taken_back_but_no_strike_given_where_the_peer_said_goodbye() -> None:
    fleet = Fleet(config(local_prefill=False))
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d)
    fleet.clock.advance(0.1)
    fleet.failed(d, task, "peer")  # the decode worker sees its end first
    leave(fleet, p)
    assert strikes(fleet, stream) == 0


# --- a worker that hung and comes back -------------------------------------------------------------------------------


def test_late_messages_of_a_worker_that_hung_are_fenced_and_it_works_again() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d0, d1 = fleet.join("d-0"), fleet.join("d-1")
    stream = fleet.submit()
    task = d0.take(LocalTask)
    fleet.step(d0, task, tokens(0, 0, 1))
    fleet.wait(3.2, d1)
    assert d0.dropped
    again = d1.take(LocalTask)
    fleet.step(d0, task, tokens(0, 1, 3))  # over the old session
    back = Link("d-0", 99)
    fleet.dispatcher.worker_joined(back, hello("d-0", "decode"))
    assert back.take(LiveRequests).attempts == ()
    fleet.step(back, task, tokens(0, 1, 3))  # over the new one
    fleet.step(d1, again, tokens(0, 1, 1))
    fleet.step(back, task, tokens(0, 2, 2, "stop"))
    assert text(stream) == [0, 1]
    assert fleet.observer.dropped == {"old_session": 1, "stale_attempt": 2}
    fleet.dispatcher.on_message(back, status())
    fresh = fleet.submit()
    assert back.take(LocalTask).spec.request_id == fresh.request.request_id
    fleet.step(d1, again, tokens(0, 2, 1, "stop"))
    assert text(stream) == [2] and stream.request.status is RequestStatus.FINISHED


def test_a_prefill_worker_that_comes_back_has_no_part_in_the_attempt_that_it_left() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d)
    fleet.wait(3.2, d)
    assert p.dropped and d.take(Abort).unless_arrived
    back = fleet.join("p-0")
    assert back.take(LiveRequests).attempts == ()
    fleet.first_token(back, task)
    assert text(stream) == [] and fleet.observer.dropped == {"wrong_worker": 1}
    fleet.arrived(d, task)  # but its KV had arrived
    fleet.step(d, task, tokens(0, 0, 1, "stop"))
    assert text(stream) == [0]


def test_a_worker_of_a_new_life_is_told_nothing() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d = fleet.join("d-0")
    kill(fleet, d)
    assert not any(isinstance(m, LiveRequests) for m in fleet.join("d-0", incarnation=2).sent)


def test_a_worker_that_waits_for_blocks_computes_nothing() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d = fleet.join("d-0")
    stream = fleet.submit()
    fleet.clock.advance(0.1)
    waits: WorkerStatus = status(num_waiting=1, waiting_tokens=20)
    fleet.dispatcher.on_message(d, waits)
    kill(fleet, d)
    assert strikes(fleet, stream) == 0
