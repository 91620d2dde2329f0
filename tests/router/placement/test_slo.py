"""The joint decision: which pair, or which decode worker alone, and when to wait."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.router.placement.slo import SloPolicy
from kvferry.router.state.demand import Demand, Lack, Placement, Reason, Wait
from kvferry.router.state.objectives import Objectives
from kvferry.router.state.predictor import Predictor, Way
from kvferry.router.state.views import PoolView, WorkerView
from kvferry.wire.workers import StepSample

from ..fleet import hello, status, transferred
from ..state.test_predictor import BASE_S, CALIBRATION, ROW_S, TOKEN_S

LENGTH = 200
DEMAND = Demand(
    num_prompt_tokens=LENGTH, num_tokens=LENGTH, max_num_tokens=LENGTH + 20, num_choices=1, expected_output=10
)
PROMPT_S = LENGTH * TOKEN_S


def worker(worker_id: str, session: int, **changes: object) -> WorkerView:
    role = "prefill" if worker_id.startswith("p") else "decode"
    known = hello(worker_id, role, samples=CALIBRATION, num_blocks=4096, max_num_seqs=256, max_num_batched_tokens=512)
    view = WorkerView(
        worker_id=worker_id,
        role=role,
        session=session,
        hello=known,
        status=status(),
        status_age_s=0.0,
        is_ready=True,
        num_bound=0,
        ahead_tokens=0,
        unstarted_tokens=0,
        num_running=0,
        num_free_blocks=4096,
        s_per_token=TOKEN_S,
        step_s=0.05,
    )
    return replace(view, **changes)  # type: ignore[arg-type]


P0, P1, D0, D1 = worker("p-0", 1), worker("p-1", 2), worker("d-0", 3), worker("d-1", 4)
STREAMING = replace(D0, num_running=4, num_bound=4, context=400)
BEHIND = replace(P0, ahead_tokens=400, unstarted_tokens=400, num_bound=2, backlog_s=0.4)


def policy(**options: object) -> SloPolicy:
    predictor = Predictor()
    for view in (P0, P1, D0, D1):
        predictor.on_hello(view.session, view.hello)
    return SloPolicy(predictor, **options)  # type: ignore[arg-type]


def place(demand: Demand, *workers: WorkerView, **options: object) -> Placement | Wait:
    return policy(**options).place(PoolView(workers), demand)


def test_an_idle_decode_worker_computes_the_prompt_itself() -> None:
    assert place(DEMAND, P0, D0) == Placement(None, "d-0", Reason.SOONER)


@pytest.mark.parametrize("is_embedding", [False, True])
def test_a_prefill_worker_that_is_large_enough_is_found_behind_all_that_are_not(is_embedding: bool) -> None:
    small = [
        replace(P0, session=10 + number, hello=msgspec.structs.replace(P0.hello, num_blocks=4)) for number in range(7)
    ]
    large = replace(P1, session=30, ahead_tokens=10, num_bound=1, backlog_s=0.01)
    demand = replace(DEMAND, is_embedding=is_embedding)
    placement = place(demand, *small, large, D0, local_prefill=False)
    assert isinstance(placement, Placement) and placement.computing_worker == "p-1"


@pytest.mark.parametrize("local_prefill", [False, True])
def test_where_each_handoff_nearby_has_failed_workers_further_away_are_tried(local_prefill: bool) -> None:
    """Of the nearest prefill workers one alone holds the prompt, and no decode worker nearby can be granted to."""
    small = [
        replace(P0, session=10 + number, hello=msgspec.structs.replace(P0.hello, num_blocks=4)) for number in range(6)
    ]
    failed = replace(DEMAND, failed_pairs=frozenset({(P0.session, STREAMING.session)}))
    far = replace(P1, ahead_tokens=10, num_bound=1, backlog_s=0.01)
    placement = place(failed, P0, *small, far, STREAMING, local_prefill=local_prefill)
    assert placement == Placement("p-1", "d-0", Reason.HANDOFF)
    busier = [replace(STREAMING, session=40 + number) for number in range(6)]
    ungranted = replace(DEMAND, ungranted=frozenset(one.session for one in busier))
    free = replace(D1, num_running=5, num_bound=5, context=500)
    placement = place(ungranted, P0, *busier, free, local_prefill=local_prefill)
    assert placement == Placement("p-0", "d-1", Reason.HANDOFF)


@pytest.mark.parametrize("is_embedding", [False, True])
def test_room_is_found_behind_all_that_hold_one_long_context_each(is_embedding: bool) -> None:
    full = [replace(D0, session=40 + number, num_running=1, num_bound=1, num_free_blocks=4) for number in range(9)]
    roomy = replace(D1, num_running=5, num_bound=5, num_free_blocks=400, context=500)
    demand = replace(DEMAND, is_embedding=is_embedding)
    placement = place(demand, *full, roomy)
    assert isinstance(placement, Placement) and placement.computing_worker == "d-1"
    for without in (replace(roomy, num_free_blocks=4), replace(roomy, num_running=256)):
        wait = place(demand, *full, without)
        assert isinstance(wait, Wait) and wait.lack is (Lack.PREFILL_ROOM if is_embedding else Lack.DECODE_ROOM)


@pytest.mark.parametrize(("share", "prefill"), [(0.02, None), (0.2, "p-0")])
def test_a_hair_does_not_move_a_prompt_away_from_an_idle_decode_worker(share: float, prefill: str | None) -> None:
    slo, view = policy(), PoolView((P0, D0))
    slo._estimates._predictor.biases[Way.LOCAL].seconds = share * slo.explain(view, DEMAND)[0].prefill_s
    placement = slo.place(view, DEMAND)
    assert isinstance(placement, Placement) and placement.prefill_worker == prefill


@pytest.mark.parametrize("way", list(Way))
def test_no_way_looks_free_whatever_was_learned_of_longer_prompts(way: Way) -> None:
    slo = policy()
    slo._estimates._predictor.biases[way].seconds = -10.0
    found = slo.explain(PoolView((P0, D0)), DEMAND)
    assert len(found) == 2
    for one in found:
        assert one.ttft_s >= one.bare_s / 4 > 0


def test_streams_are_not_disturbed_while_a_prefill_worker_is_idle() -> None:
    assert place(DEMAND, P0, STREAMING) == Placement("p-0", "d-0", Reason.HANDOFF)


def test_what_the_streams_leave_of_their_objective_is_used_when_prefill_workers_are_behind() -> None:
    with_room = replace(DEMAND, objectives=Objectives(ttft_s=1.0, tpot_s=0.05))
    assert place(with_room, BEHIND, STREAMING) == Placement(None, "d-0", Reason.SOONER)
    tight = replace(DEMAND, objectives=Objectives(ttft_s=1.0, tpot_s=BASE_S + 10 * ROW_S))
    assert place(tight, BEHIND, STREAMING) == Placement("p-0", "d-0", Reason.HANDOFF)


def test_two_steps_of_prompts_at_most_are_bound_to_a_worker_that_has_streams() -> None:
    demand = replace(DEMAND, objectives=Objectives(ttft_s=1.0, tpot_s=0.02))
    room = round((0.85 * 0.02 - BASE_S - 4 * ROW_S) / TOKEN_S)  # prompt tokens in one of its steps
    few, many = (replace(STREAMING, ahead_tokens=n, unstarted_tokens=n) for n in (2 * room - 10, 2 * room + 10))
    assert place(demand, few, expect_prefill=False) == Placement(None, "d-0", Reason.COLOCATED)
    assert isinstance(place(demand, many, expect_prefill=False), Wait)
    # Of a class without one, or with a looser one, no larger steps: workers cut them for the strictest.
    for loose in (DEMAND, replace(DEMAND, objectives=Objectives(ttft_s=1.0, tpot_s=0.05))):
        assert isinstance(place(loose, few, expect_prefill=False, tpot_objective_s=0.02), Placement)
        assert isinstance(place(loose, many, expect_prefill=False, tpot_objective_s=0.02), Wait)
        assert isinstance(place(loose, many, expect_prefill=False), Placement)
    # Alone with prompts it computes them in whole steps.
    assert isinstance(place(demand, replace(many, num_running=0), expect_prefill=False), Placement)


def test_a_request_waits_for_a_prefill_worker_rather_than_coming_late_beside_streams() -> None:
    demand = replace(DEMAND, objectives=Objectives(ttft_s=0.1, tpot_s=0.02), ttft_limit_s=0.1)
    full = replace(P0, ahead_tokens=600, unstarted_tokens=600, num_bound=3, backlog_s=0.06)
    assert place(demand, full, STREAMING) == Placement(None, "d-0", Reason.SOONER)
    late = replace(demand, waited_s=0.08)
    assert place(late, full, STREAMING) == Wait(Lack.PREFILL_ROOM)
    assert isinstance(place(late, STREAMING), Placement)  # there is none to wait for
    assert isinstance(place(replace(late, may_miss=True), full, STREAMING), Placement)  # it is too late anyway


@pytest.mark.parametrize(
    ("waiting", "answer"), [(0, Wait(Lack.PREFILL_ROOM)), (40, Placement(None, "d-0", Reason.SOONER))]
)
def test_without_objectives_streams_are_disturbed_where_that_is_sooner_than_ones_turn_at_a_prefill_worker(
    waiting: int, answer: Placement | Wait
) -> None:
    """Nobody is served there before what is bound, and then those that wait as well."""
    full = replace(P0, ahead_tokens=600, unstarted_tokens=600, num_bound=3, backlog_s=0.0)
    assert place(replace(DEMAND, tokens_behind=waiting * LENGTH), full, STREAMING) == answer


def knowing(step_s: float, row_s: float, token_s: float, **options: object) -> SloPolicy:
    """Knows workers on which a step takes so long, with so much more for each stream and for each prompt token."""
    steps = [(tokens, rows) for tokens in (0, 16, 32, 64) for rows in (0, 1, 4, 8) if tokens or rows]
    samples = tuple(
        StepSample(step_s + row_s * rows + token_s * tokens, tokens, 0, rows, rows * 100) for tokens, rows in steps
    )
    predictor = Predictor()
    for view in (P0, D0):
        predictor.on_hello(view.session, msgspec.structs.replace(view.hello, samples=samples))
    return SloPolicy(predictor, **options)  # type: ignore[arg-type]


def slow(**options: object) -> SloPolicy:
    return knowing(0.012, 0.001, 0.004, **options)


@pytest.mark.parametrize(("queued_s", "prefill"), [(0.2, "p-0"), (30.0, None)])
def test_where_a_step_has_room_for_less_than_the_smallest_chunk_harm_decides(
    queued_s: float, prefill: str | None
) -> None:
    queued = replace(P0, ahead_tokens=round(queued_s / 0.004), num_bound=2, backlog_s=queued_s)
    waiting = replace(DEMAND, has_prefill_pool=True)
    pool = PoolView((queued, STREAMING))
    placement = slow().place(pool, waiting)
    assert isinstance(placement, Placement) and placement.prefill_worker == prefill
    [local] = [found for found in slow().explain(pool, waiting) if found.prefill is None]
    assert local.harm_s == pytest.approx(4 * LENGTH * 0.004, rel=0.15)  # each of four waits for the whole prompt
    # An objective is kept.
    paced = replace(waiting, objectives=Objectives(tpot_s=0.02))
    assert all(found.prefill is not None for found in slow().explain(pool, paced))


@pytest.mark.parametrize("objective_s", [0.005, 0.02, 0.05])
@pytest.mark.parametrize("streaming", [1, 4])
def test_an_objective_that_no_stream_keeps_beside_the_smallest_chunk_holds_no_prompt_up(
    objective_s: float, streaming: int
) -> None:
    """Else each prompt would wait until its worker has no stream at all, whoever waits behind it."""
    decode = replace(STREAMING, num_running=streaming, context=100 * streaming, paces=((0, objective_s),))
    demand = replace(DEMAND, objectives=Objectives(tpot_s=objective_s))
    colocated = slow(expect_prefill=False, tpot_objective_s=objective_s)
    assert colocated.place(PoolView((decode,)), demand) == Placement(None, "d-0", Reason.COLOCATED)
    # Nor where the prefill workers are lost.
    assert slow(tpot_objective_s=objective_s).place(PoolView((decode,)), demand) == Placement(
        None, "d-0", Reason.NO_PREFILL_WORKER
    )


def test_an_objective_that_one_stream_keeps_beside_the_smallest_chunk_is_broken_after_a_while() -> None:
    objective_s = 0.0465  # such a step takes 45 ms beside one stream, 48 beside four
    decode = replace(STREAMING, paces=((0, objective_s),))
    demand = replace(DEMAND, objectives=Objectives(tpot_s=objective_s))
    policy = slow(expect_prefill=False, tpot_objective_s=objective_s)
    assert policy.place(PoolView((decode,)), demand) == Wait(Lack.DECODE_ROOM)
    assert isinstance(policy.place(PoolView((decode,)), replace(demand, waited_s=11.0)), Placement)
    alone = replace(decode, num_running=1, context=100)
    assert isinstance(policy.place(PoolView((alone,)), demand), Placement)
    looser = replace(demand, objectives=Objectives(tpot_s=0.05))  # which it keeps, though it fills it
    decode = replace(decode, paces=((0, 0.05),))
    policy = slow(expect_prefill=False, tpot_objective_s=0.05)
    assert isinstance(policy.place(PoolView((decode,)), looser), Placement)


def test_local_prompts_can_be_forbidden() -> None:
    assert place(DEMAND, P0, D0, local_prefill=False) == Placement("p-0", "d-0", Reason.HANDOFF)
    assert place(DEMAND, D0, local_prefill=False) == Wait(Lack.PREFILL_WORKER)


def test_a_request_waits_rather_than_breaking_the_pace_of_others_but_not_for_ever() -> None:
    objectives = Objectives(ttft_s=1.0, tpot_s=BASE_S + 4.5 * ROW_S)
    demand = replace(DEMAND, objectives=objectives, ttft_limit_s=1.0)
    others = replace(STREAMING, num_others=1)  # of another router: their pace is not known here
    for full in (replace(STREAMING, paces=((0, BASE_S + 4.5 * ROW_S),)), others):
        assert place(demand, P0, full) == Wait(Lack.DECODE_ROOM)
        assert isinstance(place(replace(demand, waited_s=3.5), P0, full), Placement)
        assert isinstance(place(demand, P0, full, D1), Placement)  # the other one is idle


def test_a_short_prompt_stays_on_the_decode_worker_unless_it_would_wait_for_the_streams_pace_there() -> None:
    pace_s = 0.0465  # a step with the smallest chunk takes 45 ms beside one stream, 48 beside four
    kept = replace(STREAMING, paces=((0, pace_s),))
    full = replace(STREAMING, num_free_blocks=0)
    short = slow(tpot_objective_s=pace_s, max_local_prefill_tokens=LENGTH)
    stays = Placement(None, "d-0", Reason.SHORT_PROMPT)
    assert short.place(PoolView((P0, STREAMING)), DEMAND) == stays
    assert short.place(PoolView((P0, kept)), DEMAND) == Placement("p-0", "d-0", Reason.HANDOFF)
    assert short.place(PoolView((P0, full)), DEMAND) == Wait(Lack.DECODE_ROOM, claim=D0.session)
    # It waits for whichever is there first, and not for ever.
    behind = replace(P0, ahead_tokens=600, unstarted_tokens=600, num_bound=3, backlog_s=2.4)
    for prefills, lack in (((), Lack.DECODE_ROOM), ((behind,), Lack.PREFILL_ROOM)):
        assert short.place(PoolView((*prefills, kept)), DEMAND) == Wait(lack)
        assert short.place(PoolView((*prefills, kept)), replace(DEMAND, waited_s=11.0)) == stays


def test_a_request_does_not_wait_for_its_own_pace_where_looser_ones_would_go_before_it() -> None:
    demand = replace(DEMAND, objectives=Objectives(ttft_s=1.0, tpot_s=BASE_S + 4.5 * ROW_S), ttft_limit_s=1.0)
    for paces in ((), ((0, 1.0),), ((10, BASE_S + 4.5 * ROW_S),)):  # none, a looser one, one of less urgent streams
        loose = replace(STREAMING, paces=paces)
        assert place(demand, P0, loose) == Placement("p-0", "d-0", Reason.HANDOFF)
        # Where it breaks its own pace alone, it breaks nobody's.
        kept = replace(D1, num_running=4, num_bound=4, context=400, paces=((0, BASE_S + 4.5 * ROW_S),))
        busier = replace(loose, num_running=6, num_bound=6)
        assert place(demand, P0, busier, kept) == Placement("p-0", "d-0", Reason.HANDOFF)


def test_a_pace_that_not_even_a_lone_answer_keeps_makes_nobody_wait() -> None:
    hopeless = replace(DEMAND, objectives=Objectives(ttft_s=1.0, tpot_s=BASE_S / 2), ttft_limit_s=1.0)
    for full in (replace(STREAMING, paces=((0, BASE_S / 2),)), replace(STREAMING, num_others=4)):
        assert isinstance(place(hopeless, P0, full), Placement)


def test_the_pace_of_streams_as_urgent_as_a_request_binds_one_without_an_objective_too() -> None:
    full = replace(STREAMING, paces=((0, BASE_S + 4.5 * ROW_S),))
    for priority in (0, 10):
        behind = replace(DEMAND, priority=priority)
        assert place(behind, P0, full) == Wait(Lack.DECODE_ROOM)
        assert place(behind, P0, full, D1) == Placement(None, "d-1", Reason.SOONER)
    assert isinstance(place(replace(DEMAND, priority=-1), P0, full), Placement)
    roomy = replace(STREAMING, paces=((0, BASE_S + 9 * ROW_S),))
    assert isinstance(place(DEMAND, P0, roomy), Placement)
    hopeless = replace(STREAMING, paces=((0, BASE_S / 2),))  # no stream keeps it, whoever waits
    assert isinstance(place(DEMAND, P0, hopeless), Placement)


def test_the_pair_is_chosen_for_both_objectives() -> None:
    fuller = replace(STREAMING, num_running=200, num_bound=200)
    demand = replace(DEMAND, objectives=Objectives(ttft_s=1.0, tpot_s=0.01))
    assert place(demand, P0, fuller, replace(D1, num_running=8, num_bound=8)) == Placement("p-0", "d-1", Reason.HANDOFF)
    assert place(demand, BEHIND, P1, STREAMING) == Placement("p-1", "d-0", Reason.HANDOFF)


def test_a_prompt_goes_where_its_beginning_lies() -> None:
    demand = replace(DEMAND, cached={2: 180})
    assert place(demand, P0, P1, STREAMING) == Placement("p-1", "d-0", Reason.HANDOFF)
    # unless the wait there costs more than computing it
    busy = replace(P1, backlog_s=2 * PROMPT_S, ahead_tokens=100, num_bound=1)
    assert place(demand, P0, busy, STREAMING) == Placement("p-0", "d-0", Reason.HANDOFF)


def test_a_beginning_is_fetched_where_that_beats_computing_it() -> None:
    demand = replace(DEMAND, num_prompt_tokens=2000, num_tokens=2000, max_num_tokens=2020, cached={3: 1900})
    chooser = policy(fetches=True, local_prefill=False)
    view = PoolView((P0, STREAMING))
    assert chooser.place(view, demand) == Placement("p-0", "d-0", Reason.HANDOFF)  # nothing is known of the path
    report = transferred(transfer_s=0.1, exposed_s=0)
    chooser._estimates._predictor.on_transfer(report, "apart", 1)
    assert chooser.place(view, demand) == Placement("p-0", "d-0", Reason.HANDOFF, fetch_from="d-0")


@pytest.mark.parametrize(("num_output", "share"), [(1, 0.0), (2, 1.0), (11, 0.1)])
def test_what_is_left_of_a_transfer_delays_the_tokens_behind_the_first_alone(num_output: int, share: float) -> None:
    chooser, demand = policy(), replace(DEMAND, expected_output=num_output)
    view = PoolView((P0, STREAMING))
    before = next(one for one in chooser.explain(view, demand) if one.prefill is not None)
    report = transferred(transfer_s=2.0, exposed_s=1.0)
    chooser._estimates._predictor.on_transfer(report, "apart", 1)
    after = next(one for one in chooser.explain(view, demand) if one.prefill is not None)
    assert after.exposed_s > 0 and after.tpot_s - before.tpot_s == pytest.approx(share * after.exposed_s)


def test_where_nothing_is_known_the_least_loaded_is_taken() -> None:
    busy_p, busy_d = replace(P0, ahead_tokens=30, num_bound=1), replace(D0, num_running=1, num_bound=1)
    chooser = SloPolicy(Predictor())
    assert chooser.place(PoolView((busy_p, P1, busy_d, D1)), DEMAND) == Placement("p-1", "d-1", Reason.HANDOFF)


def test_failed_and_avoided_pairs_are_respected() -> None:
    failed = replace(DEMAND, failed_pairs=frozenset({(1, 3)}))
    assert place(failed, P0, P1, STREAMING) == Placement("p-1", "d-0", Reason.HANDOFF)
    view = PoolView((P0, P1, STREAMING), avoided_pairs=frozenset({(1, 3)}))
    assert policy().place(view, DEMAND) == Placement("p-1", "d-0", Reason.HANDOFF)
    alone = policy().place(PoolView((P0, STREAMING)), failed)
    assert isinstance(alone, Placement) and alone.reason is Reason.FAILED_HANDOFF


def test_a_prediction_says_what_it_is_made_of() -> None:
    placement = place(DEMAND, P0, STREAMING)
    assert isinstance(placement, Placement) and placement.prediction is not None
    assert placement.prediction.prefill_s == pytest.approx(BASE_S + PROMPT_S, rel=0.1)
    assert placement.prediction.ttft_s == pytest.approx(placement.prediction.prefill_s + placement.prediction.wait_s)


def test_every_candidate_can_be_shown_the_chosen_one_first() -> None:
    chooser, view = policy(), PoolView((BEHIND, P1, STREAMING, D1))
    candidates = chooser.explain(view, DEMAND)
    placement = chooser.place(view, DEMAND)
    assert isinstance(placement, Placement) and len(candidates) > 2
    best = candidates[0]
    assert placement.decode_worker == best.decode.worker_id
    assert placement.prefill_worker == (best.prefill.worker_id if best.prefill is not None else None)


loads = st.builds(
    lambda ready, tokens, running, free, context, backlog: {
        "is_ready": ready,
        "ahead_tokens": tokens,
        "num_bound": min(running, 9) + (tokens > 0),
        "num_running": running,
        "num_free_blocks": free,
        "context": context,
        "backlog_s": backlog,
    },
    st.booleans(),
    st.integers(0, 2000),
    st.integers(0, 256),
    st.integers(0, 4096),
    st.integers(0, 10**6),
    st.floats(0, 5),
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.lists(loads, min_size=1, max_size=20),
    st.lists(loads, min_size=1, max_size=20),
    st.integers(1, 4000),
    st.floats(0, 20),
    st.one_of(st.none(), st.floats(0.001, 0.2)),
)
def test_whatever_the_load_workers_are_ready_and_have_room(
    prefills: list[dict[str, object]],
    decodes: list[dict[str, object]],
    length: int,
    waited_s: float,
    tpot_s: float | None,
) -> None:
    views = [worker(f"p-{n}", n, **load) for n, load in enumerate(prefills)]
    views += [worker(f"d-{n}", 100 + n, **load) for n, load in enumerate(decodes)]
    predictor = Predictor()
    for view in views:
        predictor.on_hello(view.session, view.hello)
    demand = replace(
        DEMAND,
        num_prompt_tokens=length,
        num_tokens=length,
        max_num_tokens=length + 50,
        waited_s=waited_s,
        objectives=Objectives(ttft_s=1.0, tpot_s=tpot_s),
    )
    answer = SloPolicy(predictor).place(PoolView(views), demand)
    by_name = {view.worker_id: view for view in views}
    if isinstance(answer, Placement):
        chosen = by_name[answer.decode_worker]
        assert chosen.is_ready and (not chosen.num_running or chosen.num_free_blocks >= chosen.num_running)
        if answer.prefill_worker is not None:
            assert by_name[answer.prefill_worker].is_ready
    elif not any(view.is_ready for view in views if view.role == "decode"):
        assert answer == Wait(Lack.DECODE_WORKER)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.floats(1e-4, 0.1), st.floats(1e-5, 0.02), st.floats(1e-5, 0.05)),
    st.integers(0, 64),
    st.integers(1, 4000),
    st.one_of(st.none(), st.floats(0.001, 0.5)),
    st.one_of(st.none(), st.floats(0.001, 0.5)),
    st.one_of(st.none(), st.floats(0.05, 5.0)),
    st.booleans(),
)
def test_nobody_waits_for_ever_for_a_worker_that_has_room(
    times: tuple[float, float, float],
    running: int,
    length: int,
    own_s: float | None,
    others_s: float | None,
    ttft_s: float | None,
    expect_prefill: bool,
) -> None:
    """However slow it is, and whatever pace its streams or the request ask for; no prefill worker is there."""
    decode = replace(D0, num_running=running, num_bound=running, context=100 * running)
    decode = replace(decode, paces=((0, others_s),) if others_s is not None and running else ())
    demand = replace(
        DEMAND,
        num_prompt_tokens=length,
        num_tokens=length,
        max_num_tokens=length + 20,
        objectives=Objectives(ttft_s=ttft_s, tpot_s=own_s),
        ttft_limit_s=ttft_s,
        waited_s=max(10.0, 3 * (ttft_s or 0.0)),
    )
    policy = knowing(*times, expect_prefill=expect_prefill, tpot_objective_s=own_s)
    assert isinstance(policy.place(PoolView((decode,)), demand), Placement)
