"""Why a request went where it went, and what became of it: what an operator is told, and that it stays bounded."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from kvferry.common.request import SamplingParams
from kvferry.common.router_config import PolicyName
from kvferry.router.dispatch.placer import ISOLATION
from kvferry.router.metrics.metrics import RouterMetrics
from kvferry.router.state.decisions import MAX_DECISIONS, Decision, note
from kvferry.router.state.demand import Reason
from kvferry.router.state.history import MAX_FAILED, MAX_RECENT, MAX_SLOWEST, RequestHistory
from kvferry.router.state.objectives import Objectives
from kvferry.router.state.outcome import FAILED, TPOT_STAGES, TTFT_STAGES, judge
from kvferry.router.state.predictor import Way
from kvferry.router.state.request import RequestStatus, RouterRequest
from kvferry.router.state.views import PoolView
from kvferry.wire.tasks import LocalTask, PrefillTask
from kvferry.wire.workers import StepSample

from ..fleet import Fleet, Link, config, tokens

# Prompts take 1 ms a token, decode steps 10 ms.
SAMPLES = tuple(StepSample(0.001 * n, prefill_tokens=n, prefill_pairs=n * n // 2) for n in (16, 32, 48, 64)) + tuple(
    StepSample(0.01, decode_rows=rows, decode_context=64 * rows) for rows in (1, 2, 4, 8)
)


def told(fleet: Fleet, request_id: str = "r-0") -> dict[str, Any]:
    known = fleet.dispatcher.request(request_id)
    assert known is not None
    return known


def candidates(fleet: Fleet, request_id: str = "r-0") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = told(fleet, request_id)["decisions"][0]["candidates"]
    return found


# --- the decision ----------------------------------------------------------------------------------------------------


def test_a_decision_names_its_policy_its_pair_and_its_rule() -> None:
    fleet = Fleet()
    fleet.join("p-0")
    fleet.join("d-0")
    fleet.submit()
    [decision] = told(fleet)["decisions"]
    assert (decision["policy"], decision["reason"], decision["attempt"]) == ("least_loaded", "handoff", 0)
    assert (decision["prefill_worker"], decision["decode_worker"]) == ("p-0", "d-0")
    assert fleet.observer.placed == {("least_loaded", "handoff"): 1}


def test_what_a_request_waits_for_is_told_while_it_waits_and_afterwards() -> None:
    fleet = Fleet(config(expect_prefill=False))
    fleet.submit()
    assert (told(fleet)["status"], told(fleet)["waiting_for"]) == ("queued", "decode_worker")
    fleet.clock.advance(2.0)
    fleet.join("d-0")
    known = told(fleet)
    assert known["waiting_for"] is None and known["decisions"][0]["waited_for"] == "decode_worker"
    assert known["phases_ms"]["queue"] == 2000.0


def test_every_pair_is_listed_and_who_could_not_take_it_with_the_reason() -> None:
    fleet = Fleet(config(explain=True))
    for name in ("p-0", "p-1", "d-0"):
        fleet.join(name)
    fleet.join("d-small", num_blocks=1)
    fleet.join("p-starting")
    fleet.beat(fleet_link(fleet, "p-starting"), state="starting")
    fleet.submit(40)
    found = {(one["prefill_worker"], one["decode_worker"]): one["rejected"] for one in candidates(fleet)}
    assert found == {
        ("p-0", "d-0"): "",
        ("p-1", "d-0"): "",
        (None, "d-small"): "too_small",
        ("p-starting", None): "not_ready",
    }


def fleet_link(fleet: Fleet, worker_id: str) -> Link:
    worker = fleet.dispatcher._pools.named(worker_id)
    assert worker is not None and isinstance(worker.link, Link)
    return worker.link


def test_a_policy_that_predicts_shows_what_it_expects_of_each_way() -> None:
    fleet = Fleet(config(explain=True, policy="slo"))
    p = fleet.join("p-0", samples=SAMPLES)
    d = fleet.join("d-0", samples=SAMPLES)
    stream = fleet.submit(64)
    known = candidates(fleet)
    assert {(one["prefill_worker"], one["decode_worker"]) for one in known} == {("p-0", "d-0"), (None, "d-0")}
    assert all(one["ttft_ms"] > 0 and one["tpot_ms"] > 0 and one["score"] is not None for one in known)
    assert [one["score"] for one in known] == sorted(one["score"] for one in known)
    decision = told(fleet)["decisions"][0]
    assert decision["ttft_ms"] == known[0]["ttft_ms"]
    task = (p if decision["prefill_worker"] else d).sent[-1]
    assert isinstance(task, LocalTask)  # an idle decode worker: nothing has to be shipped
    fleet.clock.advance(0.1)
    fleet.step(d, task, tokens(0, 0, 1))
    bias = fleet.predictor.biases[Way.LOCAL]  # it has learned from that
    assert bias.num_seen == 1
    assert bias.seconds == pytest.approx(0.1 - decision["ttft_ms"] / 1e3, rel=1e-3)
    fleet.clock.advance(0.07)
    fleet.step(d, task, tokens(0, 1, 7, "length"))
    assert stream.request.is_finished
    ended = told(fleet)
    assert ended["ttft_ms"] == pytest.approx(100.0) and ended["tpot_ms"] == pytest.approx(10.0)
    assert ended["predicted_ttft_ms"] == decision["ttft_ms"]
    [outcome] = fleet.observer.outcomes
    assert outcome.ttft_error == pytest.approx(100.0 / decision["ttft_ms"], rel=1e-3)
    assert outcome.tpot_error is not None and outcome.is_good


def test_without_the_switch_one_request_in_sixteen_is_explained() -> None:
    fleet = Fleet(config(expect_prefill=False))
    d = fleet.join("d-0", max_num_seqs=64, num_blocks=640, max_num_batched_tokens=4096)
    fleet.beat(d, num_free_blocks=640, num_blocks=640)
    for _ in range(48):
        fleet.submit(4)
    explained = [name for name in range(48) if candidates(fleet, f"r-{name}")]
    assert len(explained) == 3


def test_no_prompt_is_told() -> None:
    fleet = Fleet(config(expect_prefill=False, explain=True))
    fleet.join("d-0")
    fleet.submit(20, cache_salt=b"secret-salt", tenant="f" * 32)
    text = str(told(fleet))
    assert str(list(range(20)))[1:-1] not in text and "secret-salt" not in text and "f" * 32 not in text


def test_of_a_request_that_is_placed_again_and_again_the_latest_is_kept() -> None:
    decisions: list[Decision] = []
    for number in range(100):
        note(decisions, Decision(number, float(number), "slo", None, "d-0", "colocated"))
    assert len(decisions) == MAX_DECISIONS and (decisions[0].attempt, decisions[-1].attempt) == (0, 99)


def test_every_reason_and_every_policy_has_a_series_of_its_own() -> None:
    text = RouterMetrics("m").scrape([("m", PoolView())], num_in_flight=0)()[0].decode()
    for policy in (*get_args(PolicyName), ISOLATION):
        for reason in Reason:
            assert f'kvferry_placements_total{{policy="{policy}",reason="{reason.value}"}}' in text
    for stage in (*TTFT_STAGES, *TPOT_STAGES, FAILED):
        assert f'kvferry_slo_misses_total{{class="default",stage="{stage}"}}' in text


# --- which stage spent the time --------------------------------------------------------------------------------------


def request_with(
    stamps: dict[str, float],
    *decisions: Decision,
    objectives: Objectives,
    status: RequestStatus = RequestStatus.FINISHED,
    prefill_s: float = 0.0,
    prefill_wait_s: float = 0.0,
    unloaded_s: float = 0.0,
) -> RouterRequest:
    request = RouterRequest("r-0", [1, 2], SamplingParams(max_tokens=11), objectives=objectives)
    request.choices[0].accept(tokens(0, 0, 11))
    request.timestamps |= stamps
    request.decisions.extend(decisions)
    request.status, request.unloaded_s = status, unloaded_s
    request.prefill_s, request.prefill_wait_s = prefill_s, prefill_wait_s
    return request


def handoff(at_s: float, attempt: int = 0, ttft_s: float | None = None, tpot_s: float | None = None) -> Decision:
    return Decision(attempt, at_s, "slo", "p-0", "d-0", "handoff", ttft_s=ttft_s, tpot_s=tpot_s)


STAMPS = {
    "queued": 10.0, "reserved": 11.0, "prefill_start": 11.5, "first_token": 14.0, "arrived": 14.3,
    "first_decode": 14.4, "last_token": 15.0, "finished": 15.1,
}  # fmt: skip


def test_the_phases_are_those_of_the_attempt_that_yielded_the_first_token() -> None:
    request = request_with(STAMPS, handoff(11.0), objectives=Objectives(), prefill_s=1.9, prefill_wait_s=0.5)
    phases = judge(request).phases_s
    assert {name: round(seconds, 6) for name, seconds in phases.items()} == {
        "queue": 1.0, "reserve": 0.5, "prefill_wait": 0.5, "prefill": 1.9, "reply": 0.1,
        "transfer": 0.3, "first_decode": 0.1, "decode": 1.0,
    }  # fmt: skip
    assert sum(phases[name] for name in ("queue", "reserve", "prefill_wait", "prefill", "reply")) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("stage", "stamps", "values"),
    [
        ("queue", {"reserved": 13.0, "prefill_start": 13.1}, {"prefill_s": 0.5, "prefill_wait_s": 0.1}),
        ("reserve", {"prefill_start": 13.4}, {"prefill_s": 0.2, "prefill_wait_s": 0.1}),
        ("prefill_wait", {}, {"prefill_s": 0.5, "prefill_wait_s": 1.9}),
        ("prefill", {}, {"prefill_s": 2.4, "prefill_wait_s": 0.1}),
        ("queue", {}, {"prefill_s": 2.4, "prefill_wait_s": 0.1, "unloaded_s": 2.0}),  # that long it had to take
        ("reply", {}, {"prefill_s": 0.5, "prefill_wait_s": 0.1}),
    ],
)
def test_a_late_first_token_is_the_stages_that_spent_most_in_excess(
    stage: str, stamps: dict[str, float], values: dict[str, Any]
) -> None:
    stamps = STAMPS | stamps
    objectives = Objectives(ttft_s=2.0, ttft_stretch=1.5)
    outcome = judge(request_with(stamps, handoff(stamps["reserved"]), objectives=objectives, **values))
    assert (outcome.is_good, outcome.missed_stage) == (False, stage)


def test_what_failed_attempts_took_is_a_stage_of_its_own() -> None:
    request = request_with(
        STAMPS | {"reserved": 13.5, "prefill_start": 13.6},
        handoff(10.1),
        handoff(13.5, attempt=1),
        objectives=Objectives(ttft_s=1.0),
    )
    assert judge(request).missed_stage == "retry"


def test_slow_tokens_are_the_transfers_fault_or_the_decode_workers() -> None:
    objectives = Objectives(tpot_s=0.08)
    assert judge(request_with(STAMPS, handoff(11.0), objectives=objectives)).missed_stage == "transfer"
    slow = STAMPS | {"last_token": 19.0}
    assert judge(request_with(slow, handoff(11.0), objectives=objectives)).missed_stage == "decode"
    assert judge(request_with(STAMPS, handoff(11.0), objectives=Objectives(tpot_s=0.1))).is_good


def test_failed_requests_are_missed_and_left_ones_are_nothing() -> None:
    objectives = Objectives(ttft_s=99.0)
    failed = judge(request_with(STAMPS, objectives=objectives, status=RequestStatus.FAILED))
    assert (failed.is_good, failed.missed_stage) == (False, "failed")
    assert judge(request_with(STAMPS, objectives=objectives, status=RequestStatus.ABORTED)).is_good is None
    assert judge(request_with(STAMPS, objectives=Objectives())).is_good


def test_predictions_are_compared_with_what_came_from_the_placement_on() -> None:
    outcome = judge(request_with(STAMPS, handoff(11.0, ttft_s=2.0, tpot_s=0.05), objectives=Objectives()))
    assert outcome.predicted_ttft_s == 3.0 and outcome.ttft_s == 4.0
    assert outcome.ttft_error == 1.5 and outcome.tpot_error == pytest.approx(2.0)


def test_a_handoffs_wait_and_prefill_are_the_workers_own_measures() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    stream, task = fleet.start(p, d)
    fleet.clock.advance(0.5)
    fleet.first_token(p, task, "stop")  # its prefill took 0.1 s
    assert stream.request.is_finished
    phases = told(fleet)["phases_ms"]
    assert (phases["prefill_wait"], phases["prefill"], phases["reply"]) == (0.0, 100.0, 400.0)


# --- the records -----------------------------------------------------------------------------------------------------


def ended(name: str, ttft_s: float = 1.0, *, at_s: float = 0.0, failed: bool = False, class_: str = "default") -> Any:
    status = RequestStatus.FAILED if failed else RequestStatus.FINISHED
    request = RouterRequest(name, [1], SamplingParams(max_tokens=2), request_class=class_, status=status)
    request.timestamps |= {"queued": at_s, "first_token": at_s + ttft_s, "finished": at_s + ttft_s}
    return request


def ids(history: RequestHistory, *asked: Any) -> list[str]:
    return [record.request_id for record in history.list(*asked)]


def test_the_last_ones_the_slowest_and_the_failed_are_kept_in_bounds() -> None:
    history = RequestHistory()
    for number in range(2 * MAX_RECENT):
        history.add(ended(f"r-{number}", ttft_s=float(number % 100), failed=number % 4 == 0))
    assert len(ids(history, "recent", None, 10**6)) == MAX_RECENT
    assert len(ids(history, "failed", None, 10**6)) == MAX_FAILED
    slowest = history.list("slowest", None, 10**6)
    assert len(slowest) == MAX_SLOWEST
    assert [one.outcome.ttft_s for one in slowest] == [99.0] * 20 + [98.0] * 20 + [97.0] * 10
    assert ids(history, "recent", None, 2) == [f"r-{2 * MAX_RECENT - 1}", f"r-{2 * MAX_RECENT - 2}"]


def test_what_was_slow_an_hour_ago_makes_room() -> None:
    history = RequestHistory()
    history.add(ended("old", ttft_s=50.0))
    history.add(ended("new", ttft_s=1.0, at_s=5000.0))
    assert ids(history, "slowest") == ["new"]


def test_what_was_slow_an_hour_ago_makes_room_for_what_is_quicker_and_for_nothing() -> None:
    history = RequestHistory()
    for number in range(MAX_SLOWEST):
        history.add(ended(f"old-{number}", ttft_s=50.0))
    history.add(ended("new", ttft_s=1.0, at_s=5000.0))
    assert ids(history, "slowest") == ["new"]
    assert history.list("slowest", now_s=5000.0 + 3602.0) == []


def test_records_are_found_by_class_and_by_the_id_that_a_client_has() -> None:
    history = RequestHistory()
    history.add(ended("a1b2-0", class_="batch"))
    history.add(ended("a1b2-1"))
    assert ids(history, "recent", "batch") == ["a1b2-0"]
    for name in ("a1b2-0", "a1b2", "cmpl-a1b2", "chatcmpl-a1b2", "msg_a1b2", "resp_a1b2", "batch_req_a1b2"):
        found = history.find(name)
        assert found is not None and found.request_id == "a1b2-0"
    assert history.find("a1b") is None
    history.add(ended("a1b3-0+f00d"))
    for name in ("a1b3-0+f00d", "a1b3-0", "a1b3", "resp_a1b3"):
        assert (found := history.find(name)) is not None and found.request_id == "a1b3-0+f00d"
    assert history.find("a1b3-0+beef") is None


def test_an_error_is_told_by_its_code() -> None:
    fleet = Fleet(config(expect_prefill=False))
    fleet.submit(timeout_s=0.05)
    fleet.wait(0.2)
    assert (told(fleet)["status"], told(fleet)["error"]) == ("failed", "deadline_exceeded")
    [failed] = fleet.dispatcher.requests("failed", None, 10)
    assert failed["request_id"] == "r-0" and failed["missed_stage"] == "failed"
    assert fleet.dispatcher.request("r-9") is None


def test_a_request_whose_grant_is_on_the_way_is_told_too() -> None:
    fleet = Fleet()
    p, d = fleet.join("p-0"), fleet.join("d-0")
    fleet.submit()
    assert told(fleet)["status"] == "reserved"
    fleet.grant(d)
    assert isinstance(p.sent[-1], PrefillTask) and told(fleet)["status"] == "prefilling"
