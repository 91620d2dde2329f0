"""What the router believes of a worker between two heartbeats, and when it takes it for hung."""

from __future__ import annotations

import pytest

from kvferry.router.state.pools import Pools
from kvferry.router.state.views import RequestLoad
from kvferry.router.state.worker import RouterWorker
from kvferry.wire.results import RequestTokens, StepTokens
from kvferry.wire.workers import CacheChange, StepSample

from ..fleet import Link, hello, status


def make(role: str = "prefill", **changes: object) -> RouterWorker:
    worker = Pools().join(Link(f"{role[0]}-0", 1), hello(f"{role[0]}-0", role, **changes), 0.0)
    worker.on_status(status(), 0.0)
    return worker


def test_a_worker_is_ready_from_its_first_ready_heartbeat_until_it_drains() -> None:
    worker = Pools().join(Link("p-0", 1), hello("p-0", "prefill"), 0.0)
    assert not worker.view(0.0).is_ready
    worker.on_status(status(state="starting"), 0.1)
    assert not worker.view(0.1).is_ready
    worker.on_status(status(), 0.2)
    assert worker.view(0.5).is_ready and worker.view(0.5).status_age_s == pytest.approx(0.3)
    worker.on_status(status(state="draining"), 0.3)
    assert not worker.view(0.5).is_ready


def test_tokens_bound_since_the_heartbeat_count_at_once() -> None:
    worker = make()
    worker.bind("a", RequestLoad(100, 1, 7, at_s=0.5))
    assert worker.view(0.5).ahead_tokens == worker.view(0.5).unstarted_tokens == 100
    worker.on_status(status(waiting_tokens=36, num_running=1), 1.0)
    assert worker.view(1.0).ahead_tokens == 36 and worker.view(1.0).unstarted_tokens == 0
    worker.bind("b", RequestLoad(50, 1, 4, at_s=1.05))
    assert worker.view(1.1).ahead_tokens == 86 and worker.view(1.1).unstarted_tokens == 50


def test_a_prompt_that_is_done_is_not_ahead_though_the_heartbeat_says_so() -> None:
    worker = make()
    worker.bind("a", RequestLoad(100, 1, 7, at_s=0.5))
    worker.on_status(status(waiting_tokens=100), 1.0)
    worker.release("a")
    worker.release("a")
    assert worker.view(1.0).ahead_tokens == 0 and worker.view(1.0).num_bound == 0


def test_another_routers_tokens_stay_ahead() -> None:
    worker = make()
    worker.bind("a", RequestLoad(100, 1, 7, at_s=0.5))
    worker.on_status(status(waiting_tokens=300, num_running=1), 1.0)
    assert worker.view(1.0).unstarted_tokens == 100  # what runs may be the other's
    worker.release("a")
    assert worker.view(1.0).ahead_tokens == 200


def test_a_prompt_that_was_computed_between_heartbeats_is_ahead_of_nobody() -> None:
    worker = make("decode")
    worker.bind("a", RequestLoad(100, 1, 7, at_s=0.5))
    worker.on_status(status(waiting_tokens=40), 1.0)
    worker.bind("b", RequestLoad(100, 1, 7, at_s=1.5))
    assert worker.view(1.5).ahead_tokens == 140
    worker.note_prefilled("b")
    assert worker.view(1.6).ahead_tokens == 40


def test_a_task_that_crossed_the_heartbeat_is_not_lost_from_the_count() -> None:
    worker = make()
    worker.bind("a", RequestLoad(100, 1, 7, at_s=0.99))
    worker.on_status(status(waiting_tokens=0), 1.0)
    assert worker.view(1.0).ahead_tokens == 100


def test_blocks_and_rows_follow_what_the_router_does() -> None:
    worker = make("decode")
    worker.on_status(status(num_free_blocks=10, num_running=2), 1.0)
    worker.bind("a", RequestLoad(0, 2, 4, at_s=1.5))
    assert (worker.view(1.5).num_free_blocks, worker.view(1.5).num_running) == (6, 4)
    worker.on_status(status(num_free_blocks=6, num_running=4), 2.0)
    assert (worker.view(2.0).num_free_blocks, worker.view(2.0).num_running) == (6, 4)
    worker.release("a")
    assert (worker.view(2.0).num_free_blocks, worker.view(2.0).num_running) == (10, 2)
    worker.on_status(status(num_free_blocks=10, num_running=2), 3.0)
    assert (worker.view(3.0).num_free_blocks, worker.view(3.0).num_running) == (10, 2)


def test_free_blocks_stay_within_the_pool() -> None:
    worker = make("decode", num_blocks=8)
    worker.on_status(status(num_free_blocks=3), 1.0)
    worker.bind("a", RequestLoad(0, 1, 5, at_s=2.0))
    assert worker.view(2.0).num_free_blocks == 0
    worker.on_status(status(num_free_blocks=7), 3.0)
    worker.release("a")
    assert worker.view(3.0).num_free_blocks == 8


def test_of_the_free_blocks_a_router_takes_its_share() -> None:
    worker = make("decode")
    worker.on_status(status(num_free_blocks=10, share=0.5), 1.0)
    assert worker.view(1.0).num_free_blocks == 5


def test_a_request_is_alone_on_a_worker_where_other_routers_have_none_either() -> None:
    worker = make("decode")
    worker.bind("a", RequestLoad(0, 1, 4, at_s=0.5))
    worker.on_status(status(num_running=1), 1.0)
    assert worker.has_only("a") and not worker.has_only("b")
    worker.on_status(status(num_running=2), 2.0)
    assert not worker.has_only("a")


@pytest.mark.parametrize("held", ["num_running", "num_waiting", "num_granted_blocks"])
def test_a_worker_that_holds_anything_is_not_idle(held: str) -> None:
    worker = make("decode")
    assert worker.is_idle
    worker.on_status(status(**{held: 1}), 1.0)
    assert not worker.is_idle


def test_the_context_of_a_request_goes_with_it() -> None:
    worker = make("decode")
    worker.bind("a", RequestLoad(0, 1, 4, at_s=1.5, context=100))
    worker.bind("b", RequestLoad(0, 1, 4, at_s=1.5, context=20))
    assert worker.view(1.5).context == 120
    worker.release("a")
    assert worker.view(1.5).context == 20
    worker.note_prefilled("b")
    worker.on_status(status(decode_context=25), 2.0)
    assert worker.view(2.0).context == 25


def test_a_request_that_comes_again_is_on_its_way_again() -> None:
    worker = make("decode")
    load = RequestLoad(0, 1, 4, at_s=1.5, context=100)
    worker.bind("a", load)
    worker.note_prefilled("a")
    worker.release("a")
    worker.bind("a", load)
    worker.on_status(status(), 2.0)
    assert worker.view(2.0).context == 100


def test_a_request_that_came_and_went_between_heartbeats_frees_nothing() -> None:
    worker = make("decode")
    worker.on_status(status(num_free_blocks=10), 1.0)
    worker.bind("a", RequestLoad(0, 1, 4, at_s=1.5))
    worker.release("a")
    assert worker.view(1.5).num_free_blocks == 10


def test_a_step_whose_parts_never_end_has_no_more_requests_than_the_worker() -> None:
    worker = make("decode")
    worker.bind("a", RequestLoad(0, 1, 4, at_s=0.0))
    for number in range(8):
        updates = (RequestTokens("a", 0, ()), RequestTokens(f"odd-{number}", 0, ()))
        worker.note_step(StepTokens(updates=updates, is_rest=number > 0), 1.0)
    assert worker.decodes("a") and not any(worker.decodes(f"odd-{number}") for number in range(8))


def test_silence_is_a_hang() -> None:
    worker = make()
    assert worker.hang(3.0) is None
    assert "no heartbeat" in str(worker.hang(3.1))


def test_a_worker_that_never_reported_hangs_too() -> None:
    worker = Pools().join(Link("p-0", 1), hello("p-0", "prefill"), 10.0)
    assert worker.hang(12.0) is None and worker.hang(13.5) is not None


def test_silence_and_a_late_step_count_from_where_they_are_forgiven() -> None:
    worker = make()
    worker.on_status(status(steps=5, num_running=1, step_tokens=64, step_s=0.1), 1.0)
    worker.forgive_silence(20.0)
    assert worker.hang(22.9) is None and worker.silent_s(22.0) == 21.0
    assert "no heartbeat for 22.1 s" in str(worker.hang(23.1))
    worker.on_status(status(steps=5, num_running=1, step_tokens=64, step_s=0.1), 23.2)
    assert "no step has finished for 3.2 s" in str(worker.hang(23.2))


def test_a_step_may_take_five_times_a_full_steps_time() -> None:
    worker = make()  # 64 tokens a step
    worker.on_status(status(steps=1, step_tokens=32, step_s=1.0), 1.0)
    worker.on_status(status(steps=1, num_running=1, step_tokens=32, step_s=1.0, busy_for_s=9.0), 2.0)
    assert worker.hang(2.0) is None
    worker.on_status(status(steps=1, num_running=1, step_tokens=32, step_s=1.0, busy_for_s=10.5), 3.0)
    assert "step runs for 10.5 s, the limit is 10.0 s" in str(worker.hang(3.0))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param((64, 2.0), (1, 0.01), id="small steps do not make it shorter than a large one needs"),
        pytest.param((64, 0.1), (64, 2.0), id="of steps of one size the latest sets it"),
    ],
)
def test_two_steps_set_the_limit(first: tuple[int, float], second: tuple[int, float]) -> None:
    worker = make()
    for number, (num_tokens, step_s) in enumerate((first, second), 1):
        worker.on_status(status(steps=number, step_tokens=num_tokens, step_s=step_s), float(number))
    worker.on_status(status(steps=2, num_running=1, busy_for_s=9.0), 3.0)
    assert worker.hang(3.0) is None


def test_a_step_that_waited_for_something_else_counts_from_its_own_beginning() -> None:
    worker = make()
    worker.on_status(status(steps=5, step_tokens=64, step_s=0.1), 1.0)
    for second in range(2, 11):
        worker.on_status(status(steps=5, num_waiting=1), float(second))
    worker.on_status(status(steps=5, num_running=1, busy_for_s=0.5), 11.0)
    assert worker.hang(11.0) is None


def test_the_first_step_may_take_long() -> None:
    worker = make()
    for second in range(1, 60):
        worker.on_status(status(num_running=1, busy_for_s=float(second)), float(second))
        assert worker.hang(float(second)) is None
    worker.on_status(status(num_running=1, busy_for_s=61.0), 61.0)
    assert worker.hang(61.0) is not None


def test_running_work_without_finished_steps_is_a_hang() -> None:
    worker = make()
    worker.on_status(status(steps=5, step_tokens=64, step_s=0.1), 1.0)
    for tenth in range(1, 31):
        worker.on_status(status(steps=5, num_running=1), 1.0 + tenth / 10)
        assert worker.hang(1.0 + tenth / 10) is None
    worker.on_status(status(steps=5, num_running=1), 4.1)
    assert "no step has finished" in str(worker.hang(4.1))


def test_work_that_only_waits_may_wait_for_a_fence() -> None:
    worker = make()
    worker.on_status(status(steps=5, step_tokens=64, step_s=0.1), 1.0)
    for second in range(2, 17):
        worker.on_status(status(steps=5, num_waiting=1), float(second))
        assert worker.hang(float(second)) is None
    worker.on_status(status(steps=5, num_waiting=1), 17.0)
    assert worker.hang(17.0) is not None


def test_work_may_wait_for_an_adapter_for_as_long_as_its_worker_loads_it() -> None:
    worker = make()
    worker.on_status(status(steps=5, step_tokens=64, step_s=0.1), 1.0)
    for second in range(2, 60):
        worker.on_status(status(steps=5, num_waiting=1, loading_adapters=1), float(second))
        assert worker.hang(float(second)) is None
    for second in range(60, 75):  # loaded: what waits has to begin now
        worker.on_status(status(steps=5, num_waiting=1), float(second))
    assert "no step has finished" in str(worker.hang(74.5))


def test_running_work_that_stands_still_beside_a_load_is_a_hang() -> None:
    worker = make()
    for second in range(1, 6):
        worker.on_status(status(steps=5, num_running=1, loading_adapters=1, step_s=0.1, step_tokens=64), float(second))
    assert "no step has finished" in str(worker.hang(5.0))


def test_an_idle_worker_does_not_hang_however_long_it_idles() -> None:
    worker = make()
    for second in range(1, 100):
        worker.on_status(status(steps=5), float(second))
    worker.on_status(status(steps=5, num_running=1), 100.0)
    assert worker.hang(101.0) is None


def test_a_failed_pair_is_avoided_longer_each_time_and_forgiven_on_success() -> None:
    pools = Pools()
    p = pools.join(Link("p-0", 1), hello("p-0", "prefill"), 0.0)
    d = pools.join(Link("d-0", 2), hello("d-0", "decode"), 0.0)
    pools.on_handoff(p, d, 0.0, failed=True)
    assert pools.view(0.9).avoided_pairs == {(1, 2)} and not pools.view(1.1).avoided_pairs
    pools.on_handoff(p, d, 2.0, failed=True)
    assert pools.view(3.9).avoided_pairs and not pools.view(4.1).avoided_pairs
    pools.on_handoff(p, d, 5.0, failed=False)
    pools.on_handoff(p, d, 5.0, failed=True)
    assert not pools.view(6.1).avoided_pairs


def test_a_lost_worker_is_the_least_of_nobody() -> None:
    pools = Pools()
    small = Link("d-0", 1)
    pools.join(small, hello("d-0", "decode", num_blocks=8, max_model_len=100), 0.0)
    pools.join(Link("d-1", 2), hello("d-1", "decode"), 0.0)
    assert (pools.least_blocks, pools.least_model_len) == (8, 100)
    pools.leave(small)
    assert (pools.least_blocks, pools.least_model_len) == (64, 1024)


def test_the_end_of_an_older_session_leaves_the_newer_one_its_name() -> None:
    pools = Pools()
    older = Link("d-0", 1)
    pools.join(older, hello("d-0", "decode"), 0.0)
    newer = pools.join(Link("d-0", 2), hello("d-0", "decode"), 1.0)
    pools.leave(older)
    assert pools.named("d-0") is newer


def test_what_was_predicted_of_a_session_ends_with_it() -> None:
    pools, link = Pools(), Link("p-0", 1)
    pools.join(link, hello("p-0", "prefill", samples=(StepSample(0.01, 64, 2048),)), 0.0)
    assert pools.predictor.is_known(1)
    pools.leave(link)
    assert not pools.predictor.is_known(1)


def test_what_a_session_held_is_forgotten_with_it() -> None:
    pools, link = Pools(), Link("d-0", 1)
    pools.join(link, hello("d-0", "decode"), 0.0)
    pools.prefix_index.on_change(1, CacheChange(0, stored=bytes(16)))
    assert pools.prefix_index.num_blocks(1) == 1
    pools.leave(link)
    assert pools.prefix_index.num_blocks(1) == 0


def test_a_pair_that_fails_again_and_again_is_tried_every_half_minute() -> None:
    pools = Pools()
    p = pools.join(Link("p-0", 1), hello("p-0", "prefill"), 0.0)
    d = pools.join(Link("d-0", 2), hello("d-0", "decode"), 0.0)
    for _ in range(20):
        pools.on_handoff(p, d, 0.0, failed=True)
    assert pools.view(29.0).avoided_pairs and not pools.view(30.0).avoided_pairs


def test_what_is_known_of_a_pair_ends_with_a_session() -> None:
    pools = Pools()
    p = pools.join(Link("p-0", 1), hello("p-0", "prefill"), 0.0)
    d = pools.join(Link("d-0", 2), hello("d-0", "decode"), 0.0)
    pools.on_handoff(p, d, 0.0, failed=True)
    assert pools.view(0.1).avoided_pairs
    assert pools.leave(p.link) is p and pools.leave(p.link) is None
    assert not pools.view(0.1).avoided_pairs
    pools.on_handoff(p, d, 0.0, failed=True)
    assert not pools.view(0.1).avoided_pairs
