"""One worker, two roles: the active role changes at once, what was started ends where it is, and no block is lost."""

from __future__ import annotations

import random

import pytest

from kvferry.common.batch import Batch, stopped_output
from kvferry.prefill.scheduler import MAX_STEP_S
from kvferry.wire.results import ChoiceTokens, FirstToken, Grant, HandoffDone, NoCapacity, TaskRefused
from kvferry.wire.tasks import Abort, LocalTask, ReserveKV
from kvferry.wire.workers import LiveRequests, StepSample

from ..decode.bench import BLOCK, first_token
from .bench import BothBench

WHOLE = {0: [(0, 9), (1, 9), (2, 9), (3, 9)]}


def refusal(bench: BothBench) -> tuple[type[object], str, str]:
    message = bench.sent[-1]
    assert isinstance(message, NoCapacity | TaskRefused)
    return type(message), message.request_id, message.reason


def start(bench: BothBench) -> None:
    """A worker that decodes, with work of every kind: an answer, a local prompt, a grant, an open one."""
    bench.send(LocalTask(spec=bench.spec("running", 6)))
    bench.step()
    bench.send(LocalTask(spec=bench.spec("prompt", 50)))
    for number, name in enumerate(("granted", "opened"), 1):
        bench.send(ReserveKV(spec=bench.spec(name, 6 + number)))
    grant = bench.last(Grant)
    assert isinstance(grant, Grant)
    bench.open(bench.spec("opened", 8), grant.grant)


def test_started_answers_end_where_they_are_while_prompts_are_taken() -> None:
    bench = BothBench()
    start(bench)
    grants = [message.grant for message in bench.sent if isinstance(message, Grant)]
    bench.both.set_role("prefill")
    bench.send(bench.task(bench.spec("new", 40)))
    bench.step()
    for name, tokens, grant, open_id in (("granted", 7, grants[0], 8), ("opened", 8, grants[1], 7)):
        bench.open(bench.spec(name, tokens), grant, open_id)  # a grant of before is opened as if nothing had happened
        bench.arrive(bench.spec(name, tokens), grant, (first_token(0, 9),), open_id)
    bench.run()
    assert all(bench.tokens(name) == WHOLE for name in ("running", "prompt", "granted", "opened"))
    assert [m.request_id for m in bench.sent if isinstance(m, HandoffDone)] == ["granted", "opened"]
    assert bench.shipping.shipped == {"new": (first_token(0, 9),)}
    assert bench.both.is_quiet and bench.pool.num_owned_blocks == 0


def test_started_prompts_are_shipped_while_answers_are_taken() -> None:
    bench = BothBench("prefill")
    bench.send(bench.task(bench.spec("begun", 40)))
    bench.step()
    bench.send(bench.task(bench.spec("queued", 30)))
    bench.both.set_role("decode")
    bench.send(LocalTask(spec=bench.spec("local", 6)))
    bench.hand_over(bench.spec("reserved", 6), (first_token(0, 9),))
    bench.run()
    assert set(bench.shipping.shipped) == {"begun", "queued"} and not bench.shipping.cancelled
    assert {m.request_id for m in bench.sent if isinstance(m, FirstToken)} == {"begun", "queued"}
    assert bench.tokens("local") == bench.tokens("reserved") == WHOLE
    assert bench.both.is_quiet and bench.pool.num_owned_blocks == 0


def test_work_of_the_other_role_is_refused_in_words() -> None:
    bench = BothBench("prefill")
    bench.send(ReserveKV(spec=bench.spec("a", 6)))
    assert refusal(bench) == (NoCapacity, "a", "wrong_role")
    bench.send(LocalTask(spec=bench.spec("b", 6)))
    assert refusal(bench) == (TaskRefused, "b", "wrong_role")
    bench.both.set_role("decode")
    bench.send(bench.task(bench.spec("c", 6)))
    assert refusal(bench) == (TaskRefused, "c", "wrong_role")
    assert bench.both.is_quiet


def test_a_reservation_that_waits_for_room_does_not_wait_any_longer() -> None:
    bench = BothBench(num_blocks=8)
    bench.send(LocalTask(spec=bench.spec("a", 20)))
    bench.step()
    bench.send(ReserveKV(spec=bench.spec("b", 16, cache_salt=b"b"), queue_if_full=True))
    assert not any(isinstance(message, NoCapacity) for message in bench.sent)
    bench.both.set_role("prefill")
    assert refusal(bench) == (NoCapacity, "b", "wrong_role")


def test_a_grant_that_is_asked_for_again_is_given_again_whatever_the_role_is_now() -> None:
    bench = BothBench()
    bench.send(ReserveKV(spec=bench.spec("a", 6)))
    first = bench.last(Grant)
    bench.both.set_role("prefill")
    bench.send(ReserveKV(spec=bench.spec("a", 6)))
    assert bench.sent[-1] == first


def test_a_worker_hands_nothing_off_to_itself() -> None:
    bench = BothBench()
    bench.send(ReserveKV(spec=bench.spec("a", 6)))
    bench.both.set_role("prefill")
    bench.send(bench.task(bench.spec("a", 6), granted_by="d"))
    assert refusal(bench) == (TaskRefused, "a", "wrong_role")
    assert bench.prefill.num_unfinished == 0


@pytest.mark.parametrize("active_role", ["prefill", "decode"])
def test_both_get_their_turns_and_answers_the_first_one(active_role: str) -> None:
    bench = BothBench("prefill")
    bench.send(bench.task(bench.spec("prompt", 60)))
    bench.both.set_role("decode")
    bench.send(LocalTask(spec=bench.spec("answer", 6)))
    bench.both.set_role("prefill" if active_role == "prefill" else "decode")
    bench.run()
    assert bench.kinds == ["decode", "prefill"] * 4


def test_steps_of_prompts_are_short_while_answers_run() -> None:
    bench = BothBench("prefill")
    samples = [StepSample(0.01, decode_rows=2)] * 20 + [StepSample(0.2, prefill_tokens=200)] * 20
    bench.both.learn(samples)
    bench.send(bench.task(bench.spec("prompt", 60)))
    bench.step()
    assert bench.prefill.scheduler.max_step_s == MAX_STEP_S
    bench.both.set_role("decode")
    bench.send(LocalTask(spec=bench.spec("answer", 6)))
    bench.step()
    bench.step()
    assert bench.prefill.scheduler.max_step_s == bench.role.scheduler.pace.room_s(1, [60]) < 0.1
    bench.role.scheduler.pace.objective_s = 10 * MAX_STEP_S
    bench.step()
    assert bench.prefill.scheduler.max_step_s == MAX_STEP_S, "however long its answers may wait"


def test_a_step_of_copies_alone_is_the_decode_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = BothBench("prefill")
    bench.send(bench.task(bench.spec("prompt", 6)))
    bench.run()
    assert bench.both.stepping == "prefill"
    monkeypatch.setattr(bench.role.scheduler.blocks.cache, "idle", lambda: Batch([]))
    assert bench.both.schedule() is not None and bench.both.stepping == "decode"


def test_what_a_prompt_takes_is_learned_of_large_steps_without_answers() -> None:
    bench = BothBench()
    learned = []
    for sample in (
        StepSample(9.0, prefill_tokens=640, decode_rows=2),
        StepSample(9.0, prefill_tokens=63),
        StepSample(6.4, prefill_tokens=64),
    ):
        bench.both.learn([sample])
        learned.append(bench.prefill.scheduler._s_per_token)
    assert learned[0] == learned[1] != learned[2] == 0.1


def test_answers_begin_after_the_worker_was_idle() -> None:
    bench = BothBench()
    bench.send(LocalTask(spec=bench.spec("before", 6)))
    bench.run()
    bench.both.set_role("prefill")
    bench.send(bench.task(bench.spec("prompt", 60)))
    assert not bench.both.is_quiet
    bench.both.set_role("decode")
    bench.send(LocalTask(spec=bench.spec("answer", 6)))
    bench.kinds.clear()
    bench.run()
    assert bench.kinds == ["decode", "prefill"] * 4


def test_either_role_has_routers_and_is_busy_by_itself() -> None:
    bench = BothBench()
    bench.send(LocalTask(spec=bench.spec("answer", 6)))
    assert bench.both.routers == {"R"} and not bench.both.is_quiet
    bench.both.set_role("prefill")
    bench.both.on_router_message("Q", bench.task(bench.spec("prompt", 6)))
    assert bench.both.routers == {"R", "Q"}
    bench.send(Abort(request_id="answer", attempt=0))
    assert bench.both.routers == {"Q"} and not bench.both.is_quiet
    bench.run()
    assert bench.both.is_quiet


def test_a_prompt_does_not_take_the_blocks_that_an_answer_waits_for() -> None:
    bench = BothBench(num_blocks=16)
    bench.send(LocalTask(spec=bench.spec("a", 30)))
    bench.send(LocalTask(spec=bench.spec("b", 40, cache_salt=b"b")))
    bench.step()
    assert bench.role.scheduler.num_waiting == 1
    bench.both.set_role("prefill")
    bench.send(bench.task(bench.spec("new", 20, cache_salt=b"c")))
    while bench.role.scheduler.num_waiting:
        free = bench.pool.num_free_blocks
        assert free >= 5 and (free >= 40 / BLOCK or not bench.prefill.scheduler.num_running)
        bench.step()
    bench.run()
    assert bench.tokens("a") == bench.tokens("b") == WHOLE and "new" in bench.shipping.shipped


def test_what_routers_are_told_is_the_sum_of_both() -> None:
    bench = BothBench()
    start(bench)
    bench.both.set_role("prefill")
    bench.send(bench.task(bench.spec("new", 40)))
    bench.step()
    both, prefill, decode = bench.both, bench.prefill, bench.role
    told = both.counters()
    assert both.num_unfinished == prefill.num_unfinished + 4 and told.num_waiting + told.num_running == 3
    assert told.waiting_tokens == prefill.scheduler.waiting_tokens + decode.scheduler.waiting_tokens > 40
    assert told.num_granted_blocks == decode.receiver.reservations.num_granted_blocks > 0
    assert both.routers == {"R"}


def test_a_drain_ends_what_both_would_begin() -> None:
    bench = BothBench()
    start(bench)
    bench.both.draining = True
    for role in ("prefill", "decode"):
        bench.both.set_role("prefill" if role == "prefill" else "decode")
        bench.send(bench.task(bench.spec(f"t-{role}", 6)))
        bench.send(LocalTask(spec=bench.spec(f"l-{role}", 6)))
    refused = [message.reason for message in bench.sent if isinstance(message, TaskRefused)]
    assert refused == ["draining", "draining", "wrong_role", "draining"]


def test_aborts_and_lost_routers_reach_both() -> None:
    for end in ("abort", "live", "lost"):
        bench = BothBench()
        start(bench)
        bench.both.set_role("prefill")
        bench.send(bench.task(bench.spec("new", 40)))
        bench.step()
        names = ("running", "prompt", "granted", "opened", "new")
        if end == "abort":
            for name in names:
                bench.send(Abort(request_id=name, attempt=0))
        elif end == "live":
            bench.send(LiveRequests(attempts=()))
        else:
            bench.both.on_router_lost("R")
        bench.run()
        assert not bench.both.num_unfinished and set(bench.shipping.cancelled) == {"new"}, end
        assert bench.pool.num_owned_blocks == 0 and bench.pool.num_quarantined_blocks == 1


@pytest.mark.parametrize("seed", range(8))
def test_whatever_changes_when_every_answer_is_whole_and_every_block_comes_back(seed: int) -> None:
    chance = random.Random(seed)
    bench = BothBench(num_blocks=40, max_num_seqs=3)
    lengths: dict[str, int] = {}
    for number in range(120):
        name, length = f"r{number}", chance.randrange(1, 60)
        spec = bench.spec(name, length)
        kind = chance.choice(("task", "local", "reserve", "flip", "step", "step"))
        before = len(bench.sent)
        if kind == "flip":
            bench.both.set_role(chance.choice(("prefill", "decode")))
        elif kind == "task":
            bench.send(bench.task(spec))
        elif kind == "local":
            bench.send(LocalTask(spec=spec))
        elif kind == "reserve":
            bench.send(ReserveKV(spec=spec))
            grants = [message for message in bench.sent[before:] if isinstance(message, Grant)]
            if grants:
                bench.open(spec, grants[0].grant, open_id=1000 + number)
                if chance.random() < 0.5:
                    bench.both.set_role("prefill")
                bench.step()
                bench.arrive(spec, grants[0].grant, (ChoiceTokens(0, 0, first_token(0, 9).tokens),), 1000 + number)
        else:
            bench.step()
        was_refused = any(isinstance(message, NoCapacity | TaskRefused) for message in bench.sent[before:])
        if kind in ("task", "local", "reserve") and not was_refused:
            lengths[name] = length
        bench.both.check()
    for _ in range(2000):
        if bench.step() is None:
            break
    answered = {name for name in lengths if bench.tokens(name) == WHOLE}
    assert answered | set(bench.shipping.shipped) == set(lengths) and len(lengths) > 20
    assert bench.both.is_quiet and bench.pool.num_owned_blocks == 0
    assert max(lengths.values()) > BLOCK


def test_a_step_is_vain_when_all_of_its_answers_have_ended() -> None:
    bench = BothBench()
    for name in ("a", "b", "c"):
        bench.send(LocalTask(spec=bench.spec(name, 6)))
    batch = bench.both.schedule()
    assert batch is not None and len(batch.rows) == 3
    is_vain = []
    for message in (*(Abort(request_id=name, attempt=0) for name in "abc"), LocalTask(spec=bench.spec("d", 6))):
        bench.send(message)
        is_vain.append(bench.both.is_step_vain)
    bench.both.complete(batch, stopped_output(batch, 0.001))
    assert [*is_vain, bench.both.is_step_vain] == [False, False, True, True, False]
    bench.run()
    assert bench.tokens("d") == WHOLE and bench.both.is_quiet and bench.pool.num_owned_blocks == 0
