"""Placement as a pure function of a view."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from kvferry.router.placement.least_loaded import LeastLoaded
from kvferry.router.state.demand import Demand, Lack, Placement, Reason, Wait
from kvferry.router.state.views import PoolView, WorkerView, has_gained

from ..fleet import SPEC, hello, status

DEMAND = Demand(num_prompt_tokens=20, num_tokens=20, max_num_tokens=40, num_choices=1)


def worker(worker_id: str, session: int, **changes: object) -> WorkerView:
    role = "prefill" if worker_id.startswith("p") else "decode"
    view = WorkerView(
        worker_id=worker_id,
        role=role,
        session=session,
        hello=hello(worker_id, role),
        status=status(),
        status_age_s=0.0,
        is_ready=True,
        num_bound=0,
        ahead_tokens=0,
        unstarted_tokens=0,
        num_running=0,
        num_free_blocks=64,
        s_per_token=0.0,
        step_s=0.0,
    )
    return replace(view, **changes)  # type: ignore[arg-type]


def view(*workers: WorkerView, avoided: tuple[tuple[int, int], ...] = ()) -> PoolView:
    return PoolView(workers=workers, avoided_pairs=frozenset(avoided))


P0, P1, D0, D1 = worker("p-0", 1), worker("p-1", 2), worker("d-0", 3), worker("d-1", 4)


def test_the_least_loaded_of_each_pool_is_taken() -> None:
    busy_p = replace(P0, ahead_tokens=30, num_bound=1)
    busy_d = replace(D0, num_running=1)
    assert LeastLoaded().place(view(busy_p, P1, busy_d, D1), DEMAND) == Placement("p-1", "d-1", Reason.HANDOFF)


def test_a_prefill_worker_that_cannot_hold_the_prompt_is_not_taken_though_it_is_idle() -> None:
    small = replace(P0, hello=msgspec.structs.replace(P0.hello, num_blocks=1))
    busy = replace(P1, ahead_tokens=30, num_bound=1)
    assert LeastLoaded().place(view(small, busy, D0), DEMAND) == Placement("p-1", "d-0", Reason.HANDOFF)


def test_who_has_waited_is_sent_to_a_worker_that_others_fill() -> None:
    own = replace(D0, num_running=8, num_bound=8)
    others = replace(own, num_others=6, num_bound=2)
    patient = replace(DEMAND, queue_if_full=True)
    assert LeastLoaded().place(view(P0, others), patient) == Placement("p-0", "d-0", Reason.HANDOFF)
    assert isinstance(LeastLoaded().place(view(P0, own), patient), Wait)
    assert isinstance(LeastLoaded().place(view(P0, others), DEMAND), Wait)
    assert has_gained(own, others)  # so that it is asked when they come


def test_workers_that_are_looked_at_besides_are_ready_and_of_the_role() -> None:
    draining = replace(worker("d-2", 5), is_ready=False)
    pool = view(P0, D0, D1, draining, worker("d-3", 6))
    assert [one.worker_id for one in pool.nearest("decode", 1, [5, 1, 99, 6, 3])] == ["d-0", "d-3"]


def test_free_blocks_decide_between_equally_busy_decode_workers() -> None:
    pool = view(P0, replace(D0, num_running=1, num_free_blocks=30), replace(D1, num_running=1, num_free_blocks=40))
    assert LeastLoaded().place(pool, DEMAND) == Placement("p-0", "d-1", Reason.HANDOFF)


def test_workers_that_are_not_ready_get_nothing() -> None:
    pool = view(replace(P0, is_ready=False), P1, replace(D0, is_ready=False))
    assert LeastLoaded().place(pool, DEMAND) == Wait(Lack.DECODE_WORKER)


def test_a_decode_worker_without_room_is_claimed_for_the_request() -> None:
    pool = view(P0, replace(D0, num_running=8), replace(D1, num_running=1, num_free_blocks=2))
    assert LeastLoaded().place(pool, DEMAND) == Wait(Lack.DECODE_ROOM, claim=3)


def test_room_means_a_row_for_each_choice_and_blocks_to_spare() -> None:
    two = replace(DEMAND, num_choices=2)
    nearly_full = replace(D0, num_running=6)
    assert isinstance(LeastLoaded().place(view(P0, nearly_full), two), Placement)
    assert isinstance(LeastLoaded().place(view(P0, replace(nearly_full, num_running=7)), two), Wait)
    # 2 blocks for the prompt, 1 for the second choice, 6 to grow
    assert isinstance(LeastLoaded().place(view(P0, replace(nearly_full, num_free_blocks=9)), two), Placement)
    assert isinstance(LeastLoaded().place(view(P0, replace(nearly_full, num_free_blocks=8)), two), Wait)


def test_few_long_blocks_are_kept_for_many_that_run() -> None:
    spec = msgspec.structs.replace(D0.hello.spec, block_size=2048)
    long = replace(D0, hello=msgspec.structs.replace(D0.hello, spec=spec), num_running=6)
    assert isinstance(LeastLoaded().place(view(P0, replace(long, num_free_blocks=2)), DEMAND), Placement)
    assert isinstance(LeastLoaded().place(view(P0, replace(long, num_free_blocks=1)), DEMAND), Wait)


def test_late_binding_waits_while_more_than_a_step_is_ahead() -> None:
    behind = replace(P0, ahead_tokens=65, unstarted_tokens=65, num_bound=1)
    assert LeastLoaded().place(view(behind, D0), DEMAND) == Wait(Lack.PREFILL_ROOM)
    assert isinstance(LeastLoaded().place(view(replace(behind, ahead_tokens=64), D0), DEMAND), Placement)


def test_a_short_prompt_may_overtake_a_long_one_that_runs() -> None:
    running = replace(P0, ahead_tokens=500, unstarted_tokens=40, num_bound=3)
    assert isinstance(LeastLoaded().place(view(running, D0), DEMAND), Placement)
    longer = replace(DEMAND, num_prompt_tokens=25)
    assert LeastLoaded().place(view(running, D0), longer) == Wait(Lack.PREFILL_ROOM)


def test_nothing_is_bound_behind_a_step_that_outlasts_the_grant() -> None:
    slow = replace(P0, ahead_tokens=60, num_bound=1, s_per_token=0.03)
    assert LeastLoaded().place(view(slow, D0), DEMAND) == Wait(Lack.PREFILL_ROOM)
    assert isinstance(LeastLoaded().place(view(replace(slow, s_per_token=0.02), D0), DEMAND), Placement)
    hurried = LeastLoaded(ttft_objective_s=1.0)
    assert hurried.place(view(replace(slow, s_per_token=0.02), D0), DEMAND) == Wait(Lack.PREFILL_ROOM)


def test_short_prompts_stay_local_unless_that_is_forbidden() -> None:
    local = LeastLoaded(max_local_prefill_tokens=20)
    assert local.place(view(P0, D0), DEMAND) == Placement(None, "d-0", Reason.SHORT_PROMPT)
    never = LeastLoaded(local_prefill=False, max_local_prefill_tokens=20)
    assert never.place(view(P0, D0), DEMAND) == Placement("p-0", "d-0", Reason.HANDOFF)


def test_a_colocated_cluster_needs_no_fallback() -> None:
    placement = LeastLoaded(local_prefill=False, expect_prefill=False).place(view(D0), DEMAND)
    assert placement == Placement(None, "d-0", Reason.COLOCATED) and not placement.reason.is_fallback


def test_local_prompts_are_bound_late_too() -> None:
    behind = replace(D0, ahead_tokens=65, num_running=1)
    policy, long = LeastLoaded(expect_prefill=False), replace(DEMAND, num_prompt_tokens=65)
    assert policy.place(view(behind), long) == Wait(Lack.DECODE_ROOM, claim=3)
    assert isinstance(policy.place(view(behind), DEMAND), Placement)  # a short one overtakes


def test_no_prefill_worker_is_a_fallback_or_a_wait() -> None:
    placement = LeastLoaded().place(view(D0), DEMAND)
    assert placement == Placement(None, "d-0", Reason.NO_PREFILL_WORKER) and placement.reason.is_fallback
    assert LeastLoaded(local_prefill=False).place(view(D0), DEMAND) == Wait(Lack.PREFILL_WORKER)


def test_a_prompt_that_fits_no_prefill_worker_is_computed_by_the_decode_worker() -> None:
    tiny = replace(P0, hello=hello("p-0", "prefill", num_blocks=1))
    placement = LeastLoaded().place(view(tiny, D0), DEMAND)
    assert placement == Placement(None, "d-0", Reason.NO_PREFILL_WORKER)
    assert LeastLoaded(local_prefill=False).place(view(tiny, D0), DEMAND) == Wait(Lack.FIT)


def test_a_request_that_fits_nowhere_says_so() -> None:
    tiny = replace(D0, hello=hello("d-0", "decode", num_blocks=2))
    assert LeastLoaded().place(view(P0, tiny), DEMAND) == Wait(Lack.FIT)
    assert LeastLoaded().place(view(P0, D0), replace(DEMAND, unfit=frozenset({3}))) == Wait(Lack.FIT)


def test_a_failed_pair_is_not_tried_again_by_the_request() -> None:
    failed = replace(DEMAND, failed_pairs=frozenset({(1, 3)}))
    assert LeastLoaded().place(view(P0, P1, D0), failed) == Placement("p-1", "d-0", Reason.HANDOFF)
    assert LeastLoaded().place(view(P0, D0), failed) == Placement(None, "d-0", Reason.FAILED_HANDOFF)
    assert LeastLoaded(local_prefill=False).place(view(P0, D0), failed) == Wait(Lack.PAIR)


def test_a_pair_that_failed_for_others_is_taken_last() -> None:
    busy = replace(P1, ahead_tokens=10, num_bound=1)
    assert LeastLoaded().place(view(P0, busy, D0, avoided=((1, 3),)), DEMAND) == Placement("p-1", "d-0", Reason.HANDOFF)
    assert LeastLoaded().place(view(P0, D0, avoided=((1, 3),)), DEMAND) == Placement("p-0", "d-0", Reason.HANDOFF)


def test_workers_that_said_no_are_left_until_they_may_have_room() -> None:
    busy = replace(DEMAND, busy=frozenset({3}))
    assert LeastLoaded().place(view(P0, D0, D1), busy) == Placement("p-0", "d-1", Reason.HANDOFF)
    assert LeastLoaded().place(view(P0, D0), busy) == Wait(Lack.DECODE_ROOM, claim=3)


def test_another_prefill_worker_for_a_grant_must_have_room_and_no_failed_handoff() -> None:
    policy = LeastLoaded()
    assert policy.prefill_for(view(replace(P0, ahead_tokens=9), P1, D0), DEMAND, 3) == P1
    failed = replace(DEMAND, failed_pairs=frozenset({(2, 3)}), busy=frozenset({1}))
    assert policy.prefill_for(view(P0, P1, D0), failed, 3) is None


def test_blocks_to_the_end_count_shared_prompt_blocks_once() -> None:
    demand = Demand(num_prompt_tokens=40, num_tokens=40, max_num_tokens=70, num_choices=3)
    assert demand.blocks_to_end(SPEC) == 2 + 3 * 3
    assert demand.blocks_now(SPEC) == 3 + 2


def test_what_a_handoff_brings_thin_counts_for_the_memory_that_it_takes() -> None:
    spec = msgspec.structs.replace(SPEC, num_layers=4, windows=(0, 20, 20, 20))
    long = Demand(num_prompt_tokens=1000, num_tokens=1000, max_num_tokens=1100, num_choices=1, has_prefill_pool=True)
    num_blocks, num_thin = spec.num_blocks_for(1000), spec.num_left_out(1000)
    assert long.blocks_now(spec) == num_blocks - num_thin + -(-num_thin // 4) < num_blocks // 3
    assert replace(long, has_prefill_pool=False).blocks_now(spec) == num_blocks, "it is computed there"
    assert long.blocks_to_end(spec) == spec.num_blocks_for(1100), "should it have to be computed again"
