"""Reservations, adoption, local prompts and aborts, as the router sees them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec
import pytest

from kvferry.common.batch import RowOutput, StepOutput
from kvferry.common.request import SampledToken, SamplingParams
from kvferry.decode import running
from kvferry.wire.results import Grant, HandoffDone, HandoffFailed, NoCapacity, StepTokens, TaskRefused, WorkerFailure
from kvferry.wire.tasks import Abort, LocalTask, ReserveKV
from kvferry.wire.workers import LiveRequests

from .bench import BLOCK, EOS, SPEC, Bench, first_token


def test_an_arrived_prompt_decodes_from_the_first_token_which_is_repeated() -> None:
    bench = Bench()
    bench.hand_over(bench.spec("a", 6), (first_token(0, 5),))
    assert isinstance(bench.last(HandoffDone), HandoffDone)
    bench.run()
    assert bench.tokens("a") == {0: [(0, 5), (1, 9), (2, 9), (3, 9)]}
    assert bench.pool.num_owned_blocks == 0 and bench.role.num_unfinished == 0


def test_the_router_hears_from_either_worker_how_much_of_a_prompt_was_cached() -> None:
    bench = Bench()
    bench.hand_over(bench.spec("a", 6), (first_token(0, 5, "length"),), num_cached=4)
    bench.run()
    told = [update for message in bench.sent if isinstance(message, StepTokens) for update in message.updates]
    assert [(update.request_id, update.num_cached_tokens) for update in told] == [("a", 4)]
    bench.send(LocalTask(spec=bench.spec("b", 9)))
    bench.step()
    message = bench.sent[-1]
    assert isinstance(message, StepTokens) and [update.num_cached_tokens for update in message.updates] == [4]


def test_a_router_hears_of_an_adoption_before_the_step_that_may_be_the_workers_last() -> None:
    bench = Bench()
    left: list[int] = []
    bench.role = bench.make_role(leaving=lambda: lambda: left.append(len(bench.sent)))
    bench.hand_over(bench.spec("a", 8, outputs=([5, 6],)), ())  # it brings no token of its own
    batch = bench.role.schedule()
    assert batch is not None and not left
    told = bench.sent[-1]
    assert isinstance(told, StepTokens) and [(u.request_id, u.choices) for u in told.updates] == [("a", ())]
    bench.role.begin_step(batch)
    assert left == [len(bench.sent)], "all of it was sent before"
    bench.complete(batch)
    batch = bench.role.schedule()
    assert batch is not None
    bench.role.begin_step(batch)
    assert len(left) == 1, "the next steps wait for nobody"


def test_choices_share_the_prompt_and_each_has_its_own_copy_of_the_partial_block() -> None:
    bench = Bench()
    bench.hand_over(bench.spec("a", 6, n=3), tuple(first_token(choice, 5 + choice) for choice in range(3)))
    batch = bench.role.schedule()
    assert batch is not None and len(batch.block_copies) == 2
    tables = [row.seq.block_table for row in batch.rows]
    assert len({table[0] for table in tables}) == 1 and len({table[1] for table in tables}) == 3
    rows = [RowOutput(((SampledToken(9),),)) for _ in batch.rows]
    bench.role.complete(batch, StepOutput(rows, 0.01, 3))
    bench.run()
    assert [pairs[0] for pairs in bench.tokens("a").values()] == [(0, 5), (0, 6), (0, 7)]
    assert bench.pool.num_owned_blocks == 0
    bench.pool.check()


def test_a_run_of_tokens_is_taken_up_to_where_its_choice_ends() -> None:
    bench = Bench()
    bench.hand_over(bench.spec("a", 5, n=2), tuple(first_token(choice, 5) for choice in range(2)))
    batch = bench.role.schedule()
    assert batch is not None
    short, long = (tuple(SampledToken(token) for token in tokens) for tokens in ((9, 8), (9, EOS, 7)))
    bench.role.complete(batch, StepOutput([RowOutput((short,)), RowOutput((long,))], 0.01, 2))
    assert bench.tokens("a") == {0: [(0, 5), (1, 9), (2, 8)], 1: [(0, 5), (1, 9), (2, EOS)]}, "nothing after the end"
    bench.check()
    batch = bench.step(7)
    assert batch is not None and [(row.seq.choice, row.seq.token_ids[-1]) for row in batch.rows] == [(0, 7)]
    assert bench.tokens("a")[0] == [(0, 5), (1, 9), (2, 8), (3, 7)], "it went on behind its run"
    assert bench.role.is_quiet and bench.pool.num_owned_blocks == 0


@pytest.mark.parametrize("min_tokens", [0, 3])
@pytest.mark.parametrize(
    "tokens", [(9,), (9, 8, 7), (9, 8, 7, 6, 5, 4), (9, 8, EOS, 7), (EOS, 9), (9, 3, 8, 7), (9, EOS, 3, 8, 7)]
)
def test_a_run_ends_where_its_tokens_would_have_ended_one_by_one(tokens: tuple[int, ...], min_tokens: int) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=6, min_tokens=min_tokens, stop_token_ids=(3,))
    at_once, singly = Bench(), Bench()
    for bench in (at_once, singly):
        bench.hand_over(msgspec.structs.replace(bench.spec("a", 5), sampling=sampling), (first_token(0, 5),))
    batch = at_once.role.schedule()
    assert batch is not None
    at_once.role.scheduler.blocks.grow(batch.rows[0].seq)
    run = tuple(map(SampledToken, tokens))
    at_once.role.complete(batch, StepOutput([RowOutput((run,))], 0.01, 1))
    for token in tokens:
        singly.step(token)
    assert at_once.tokens("a") == singly.tokens("a")
    assert at_once.role.is_quiet == singly.role.is_quiet
    at_once.check()


def test_a_run_ends_with_the_models_length() -> None:
    bench = Bench()
    bench.role = bench.make_role(max_model_len=9)
    bench.hand_over(bench.spec("a", 6), (first_token(0, 5),))
    batch = bench.role.schedule()
    assert batch is not None
    run = tuple(SampledToken(token) for token in (6, 7, 8))
    bench.role.complete(batch, StepOutput([RowOutput((run,))], 0.01, 1))
    assert bench.tokens("a") == {0: [(0, 5), (1, 6), (2, 7)]} and bench.role.is_quiet


def test_a_choice_that_ended_with_its_first_token_takes_no_row() -> None:
    bench = Bench()
    bench.hand_over(bench.spec("a", 6, n=2), (first_token(0, EOS, "stop"), first_token(1, 5)))
    batch = bench.step()
    assert batch is not None and [row.seq.choice for row in batch.rows] == [1]
    bench.run()
    assert bench.tokens("a")[0] == [(0, EOS)] and bench.pool.num_owned_blocks == 0


def test_a_local_prompt_is_computed_here_and_forked_for_its_choices() -> None:
    bench = Bench()
    bench.send(LocalTask(spec=bench.spec("a", 20, n=2)))
    bench.run()
    expected = [(0, 9), (1, 9), (2, 9), (3, 9)]
    assert bench.tokens("a") == {0: expected, 1: expected}
    assert bench.pool.num_owned_blocks == 0
    bench.pool.check()


def test_an_end_token_ends_a_choice() -> None:
    bench = Bench()
    bench.send(LocalTask(spec=bench.spec("a", 5)))
    bench.run(token=EOS)
    message = bench.last(StepTokens)
    assert isinstance(message, StepTokens)
    assert message.updates[0].choices[0].finish == "stop" and bench.tokens("a") == {0: [(0, EOS)]}


def test_a_resume_goes_on_after_the_accepted_tokens() -> None:
    bench = Bench()
    bench.send(LocalTask(spec=bench.spec("a", 6, n=2, outputs=([5, 6], [7]))))
    bench.run()
    assert bench.tokens("a") == {0: [(2, 9), (3, 9)], 1: [(1, 9), (2, 9), (3, 9)]}


def test_a_resume_over_a_handoff_feeds_the_accepted_tokens_again() -> None:
    bench = Bench()
    bench.hand_over(bench.spec("a", 8, n=2, outputs=([5, 6], [])), ())
    bench.run()
    assert bench.tokens("a") == {0: [(2, 9), (3, 9)], 1: [(0, 9), (1, 9), (2, 9), (3, 9)]}
    assert bench.pool.num_owned_blocks == 0
    bench.pool.check()


def test_a_choice_alone_of_several_goes_on_from_its_own_tokens_after_a_handoff() -> None:
    bench = Bench()
    spec = msgspec.structs.replace(bench.spec("a", 8, outputs=([5, 6],)), choices=(1,))
    bench.hand_over(spec, ())
    batch = bench.step()
    assert batch is not None and batch.rows[0].seq.token_ids[8:] == [5, 6, 9]
    bench.run()
    assert bench.tokens("a") == {1: [(2, 9), (3, 9)]}


def test_a_prompt_that_came_without_a_token_counts_as_computed_but_for_what_is_fed_once_more() -> None:
    bench = Bench()
    bench.hand_over(bench.spec("a", 8), ())
    batch = bench.step()
    assert batch is not None and batch.num_tokens == BLOCK and batch.rows[0].seq.num_cached_tokens == BLOCK
    assert bench.role.counters().prefix_queries == 8, "it was looked for once, with its reservation"


def test_what_was_left_out_of_a_handoff_stays_known_while_its_answer_is_preempted() -> None:
    kv = msgspec.structs.replace(SPEC, num_layers=2, windows=(0, 3))
    bench = Bench(num_swap_blocks=8, kv=kv)
    num_thin = kv.num_left_out(6 * BLOCK)
    bench.hand_over(bench.spec("a", 6 * BLOCK), (first_token(0, 5),))
    bench.step()
    [seq] = bench.role.scheduler.queues.running
    blocks = bench.role.scheduler.blocks
    for _ in range(2):
        assert seq.num_thin_blocks == num_thin > 0
        assert [bench.pool.is_thin(block) for block in seq.block_table[:6]] == [n < num_thin for n in range(6)]
        blocks.evict(seq)
        blocks.begin([])
        blocks.end()
        assert blocks.restore(seq, 0)
    bench.run()
    assert bench.role.is_quiet


@pytest.mark.parametrize("retains_prefix", [True, False])
def test_blocks_that_another_worker_keeps_are_the_first_to_go(retains_prefix: bool) -> None:
    bench = Bench()
    spec = bench.spec("a", 2 * BLOCK - 1)
    bench.send(ReserveKV(spec=spec, retains_prefix=retains_prefix))
    grant = bench.last(Grant)
    assert isinstance(grant, Grant)
    bench.open(spec, grant.grant)
    bench.arrive(spec, grant.grant, (first_token(0, 5),))
    bench.run()
    [prompt, answer] = [bench.pool.block_of(name) for name in bench.pool.published()]
    assert prompt is not None and answer is not None
    assert [bench.pool.is_spare(block) for block in (prompt, answer)] == [not retains_prefix] * 2


def test_a_prompt_that_is_held_already_is_not_worth_a_handoff() -> None:
    bench = Bench()
    bench.send(LocalTask(spec=bench.spec("a", 8)))
    bench.run()
    bench.send(ReserveKV(spec=bench.spec("b", 8)))
    answer = bench.last(NoCapacity)
    assert isinstance(answer, NoCapacity) and (answer.reason, answer.num_cached_tokens) == ("held", 8)


def test_an_abort_frees_everything_at_any_stage() -> None:
    def granted(bench: Bench) -> None:
        bench.send(ReserveKV(spec=bench.spec("a", 6)))

    def arrived(bench: Bench) -> None:
        bench.hand_over(bench.spec("a", 6), (first_token(0, 5),))

    def running(bench: Bench) -> None:
        arrived(bench)
        bench.step()

    def waiting(bench: Bench) -> None:
        bench.send(LocalTask(spec=bench.spec("a", 40)))

    def computing(bench: Bench) -> None:
        waiting(bench)
        bench.step()

    for stage in (granted, arrived, running, waiting, computing):
        bench = Bench()
        stage(bench)
        bench.send(Abort(request_id="a", attempt=0))
        bench.run()
        assert bench.pool.num_owned_blocks == 0, stage.__name__
        assert bench.role.num_unfinished == 0 and bench.receiver.num_live == 0
        bench.pool.check()


def test_an_abort_of_one_choice_leaves_the_others() -> None:
    bench = Bench()
    bench.hand_over(bench.spec("a", 6, n=2), (first_token(0, 5), first_token(1, 6)))
    bench.step()
    bench.send(Abort(request_id="a", attempt=0, choices=(0,)))
    bench.run()
    assert len(bench.tokens("a")[0]) < 4 and len(bench.tokens("a")[1]) == 4
    assert bench.pool.num_owned_blocks == 0


def test_an_abort_may_name_choices_that_have_ended() -> None:
    bench = Bench()
    bench.hand_over(bench.spec("a", 6, n=2), (first_token(0, 5, "stop"), first_token(1, 6)))
    bench.step()
    bench.send(Abort(request_id="a", attempt=0, choices=(1, 0)))
    bench.run()
    assert bench.role.is_quiet and len(bench.tokens("a")[1]) == 2


def test_a_choice_that_is_aborted_before_its_prompt_is_here_never_decodes() -> None:
    bench = Bench()
    bench.send(LocalTask(spec=bench.spec("a", 20, n=2)))
    bench.step()
    bench.send(Abort(request_id="a", attempt=0, choices=(0,)))
    bench.run()
    assert set(bench.tokens("a")) == {1} and bench.pool.num_owned_blocks == 0
    handed = Bench()
    spec = handed.spec("b", 6, n=2)
    handed.send(ReserveKV(spec=spec))
    handed.send(Abort(request_id="b", attempt=0, choices=(0,)))
    handed.role.tick()
    handed.hand_over(spec, (first_token(0, 5), first_token(1, 6)))
    handed.run()
    assert len(handed.tokens("b").get(0, [])) <= 1 and len(handed.tokens("b")[1]) == 4
    assert handed.pool.num_owned_blocks == 0


def test_a_choice_is_forgotten_with_the_handoff_that_it_was_dropped_from() -> None:
    bench = Bench()
    bench.send(ReserveKV(spec=bench.spec("a", 6, n=2)))
    bench.send(Abort(request_id="a", attempt=0, choices=(0,)))
    bench.role.tick()
    assert not bench.role.is_quiet
    bench.clock.advance(60.0)  # nobody has opened it
    bench.role.tick()
    assert bench.role.is_quiet


def test_an_abort_ends_the_attempts_before_the_one_that_it_names() -> None:
    bench = Bench()
    bench.send(LocalTask(spec=bench.spec("a", 6)))
    bench.send(Abort(request_id="a", attempt=1))
    bench.run()
    assert bench.role.num_unfinished == 0 and not bench.tokens("a")


def test_an_attempt_whose_abort_has_overtaken_it_is_not_begun() -> None:
    bench = Bench()
    bench.send(Abort(request_id="a", attempt=0))
    bench.send(LocalTask(spec=bench.spec("a", 6)))
    bench.send(ReserveKV(spec=bench.spec("a", 6)))
    assert [message.reason for message in bench.sent] == ["stale", "stale"]  # type: ignore[attr-defined]
    assert bench.role.is_quiet


def test_an_abort_that_comes_late_lets_no_attempt_begin_again_that_ended_after_its_own() -> None:
    bench = Bench()
    for attempt in (1, 0):
        bench.send(Abort(request_id="a", attempt=attempt))
    bench.send(LocalTask(spec=msgspec.structs.replace(bench.spec("a", 6), attempt=1)))
    refused = bench.last(TaskRefused)
    assert isinstance(refused, TaskRefused) and refused.reason == "stale" and bench.role.is_quiet


def test_tokens_that_wait_are_those_without_kv_but_for_the_next_of_each_answer() -> None:
    bench = Bench(max_num_seqs=1)
    for name in "ab":
        bench.hand_over(bench.spec(name, 6), (first_token(0, 5),))
    bench.step()
    assert bench.role.counters().num_waiting == 1 and bench.role.counters().waiting_tokens == 0
    bench.send(LocalTask(spec=bench.spec("c", 7)))
    assert bench.role.counters().waiting_tokens == 7


def test_of_an_answer_that_goes_on_here_all_tokens_but_the_last_wait_for_its_row() -> None:
    bench = Bench(max_num_seqs=1)
    bench.hand_over(bench.spec("a", 6), (first_token(0, 5),))
    bench.hand_over(bench.spec("b", 6, outputs=([5, 6, 7],), arrival=1), ())
    bench.step()
    assert bench.role.counters().num_waiting == 1 and bench.role.counters().waiting_tokens == 2


def test_unless_arrived_keeps_a_request_that_has_arrived() -> None:
    bench = Bench()
    bench.hand_over(bench.spec("a", 6), (first_token(0, 5),))
    bench.step()
    bench.send(Abort(request_id="a", attempt=0, unless_arrived=True))
    bench.run()
    assert len(bench.tokens("a")[0]) == 4


def test_a_prompt_larger_than_the_pool_is_refused_with_the_numbers() -> None:
    bench = Bench(num_blocks=2)
    bench.send(LocalTask(spec=bench.spec("a", 18)))
    refused = bench.last(TaskRefused)
    assert isinstance(refused, TaskRefused) and refused.reason == "never_fits" and "pool has 2" in refused.detail


def test_an_answer_of_which_one_choice_never_fits_leaves_nothing() -> None:
    bench = Bench(num_blocks=3)
    bench.send(LocalTask(spec=bench.spec("a", 6, n=2, outputs=([5], [5] * 10))))
    assert isinstance(bench.last(TaskRefused), TaskRefused) and bench.role.is_quiet


def test_a_task_says_how_long_the_prompts_are_that_wait_behind_it() -> None:
    bench = Bench()
    bench.send(LocalTask(spec=bench.spec("a", 6), tokens_behind=700))
    assert bench.role.scheduler.pace.tokens_behind == 700


def test_a_draining_worker_takes_nothing_new() -> None:
    bench = Bench()
    bench.role.draining = True
    bench.send(LocalTask(spec=bench.spec("a", 4)))
    bench.send(ReserveKV(spec=bench.spec("b", 4)))
    refused, full = bench.last(TaskRefused), bench.last(NoCapacity)
    assert isinstance(refused, TaskRefused) and isinstance(full, NoCapacity)
    assert refused.reason == full.reason == "draining"


def test_reservations_count_as_work_until_they_end_but_quarantine_does_not() -> None:
    bench = Bench()
    spec = bench.spec("a", 6)
    bench.send(ReserveKV(spec=spec))
    grant = bench.last(Grant)
    assert isinstance(grant, Grant) and bench.role.num_unfinished == 1
    bench.open(spec, grant.grant)
    bench.role.draining = True
    assert bench.role.num_unfinished == 1, "what was opened before goes on"
    bench.arrive(spec, grant.grant, (first_token(0, 5),))
    assert bench.role.num_unfinished == 1
    bench.run()
    assert bench.role.num_unfinished == 0 and len(bench.tokens("a")[0]) == 4
    bench.role.draining = False
    other = bench.spec("b", 6, cache_salt=b"x")
    bench.send(ReserveKV(spec=other))
    second = bench.last(Grant)
    assert isinstance(second, Grant)
    bench.open(other, second.grant, open_id=8)
    bench.send(Abort(request_id="b", attempt=0))
    assert bench.pool.num_quarantined_blocks == 2
    assert bench.role.num_unfinished == 0 and not bench.role.is_quiet


def test_draining_gives_up_what_was_granted_and_not_opened() -> None:
    bench = Bench()
    bench.send(ReserveKV(spec=bench.spec("a", 6)))
    bench.role.draining = True
    failed = bench.last(HandoffFailed)
    assert isinstance(failed, HandoffFailed) and failed.blame == "draining"
    assert bench.role.num_unfinished == 0 and bench.pool.num_owned_blocks == 0


def test_what_has_expired_is_not_begun() -> None:
    bench = Bench()
    bench.send(LocalTask(spec=bench.spec("a", 6, remaining_s=0.0)))
    bench.send(ReserveKV(spec=bench.spec("b", 6, remaining_s=0.0)))
    refused, full = bench.last(TaskRefused), bench.last(NoCapacity)
    assert isinstance(refused, TaskRefused) and isinstance(full, NoCapacity)
    assert refused.reason == full.reason == "expired"


def test_a_prompt_that_waits_beyond_its_deadline_is_dropped() -> None:
    bench = Bench(num_blocks=6)
    bench.send(LocalTask(spec=bench.spec("first", 16, remaining_s=1.0)))
    bench.step()
    bench.send(LocalTask(spec=bench.spec("late", 16, remaining_s=1.0, arrival=1, cache_salt=b"x")))
    bench.step()
    bench.clock.advance(1.0)
    bench.run()
    refused = bench.last(TaskRefused)
    assert isinstance(refused, TaskRefused) and (refused.request_id, refused.reason) == ("late", "expired")
    assert len(bench.tokens("first")[0]) == 4, "what has begun is its router's to end"
    assert not bench.tokens("late") and sum(isinstance(message, TaskRefused) for message in bench.sent) == 1
    assert bench.role.is_quiet


@pytest.mark.parametrize("late", [LocalTask, partial(ReserveKV, queue_if_full=True)])
@pytest.mark.parametrize("is_full", [False, True])
def test_an_attempt_is_not_begun_once_room_was_asked_for_the_next(
    is_full: bool, late: Callable[..., LocalTask | ReserveKV]
) -> None:
    bench = Bench(num_blocks=16)
    if is_full:
        bench.send(ReserveKV(spec=bench.spec("full", 32)))
    newer, tokens = msgspec.structs.replace(bench.spec("a", 20), attempt=1), (first_token(0, 5),)
    bench.send(ReserveKV(spec=newer, queue_if_full=True))
    bench.send(late(spec=bench.spec("a", 20)))
    refused = bench.sent[-1]
    assert isinstance(refused, TaskRefused | NoCapacity) and (refused.attempt, refused.reason) == (0, "stale")
    assert bench.step() is None and bench.role.counters().stale_messages == 1
    bench.send(Abort(request_id="full", attempt=0))
    bench.role.tick()
    grant = bench.last(Grant)
    assert isinstance(grant, Grant) and grant.attempt == 1
    bench.open(newer, grant.grant)
    bench.arrive(newer, grant.grant, tokens)
    bench.run()
    assert bench.tokens("a") == {0: [(0, 5), (1, 9), (2, 9), (3, 9)]}
    bench.check()


def test_an_attempt_that_has_ended_is_not_begun_again() -> None:
    bench = Bench()
    spec = bench.spec("a", 6)
    bench.send(LocalTask(spec=spec))
    bench.run()
    bench.send(LocalTask(spec=spec))
    bench.send(ReserveKV(spec=spec))
    refused, full = bench.last(TaskRefused), bench.last(NoCapacity)
    assert isinstance(refused, TaskRefused) and isinstance(full, NoCapacity)
    assert refused.reason == full.reason == "stale" and bench.role.is_quiet
    assert bench.role.counters().stale_messages == 2


def test_of_requests_that_have_ended_those_are_forgotten_that_nothing_was_heard_of_for_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(running, "_MAX_REMEMBERED", 2)
    bench, ended = Bench(), running.EndedAttempts()
    for name in ("a", "b", "a", "c"):
        ended.add(name, 0)
    assert [name for name in "abc" if ended.has(bench.spec(name, 6))] == ["a", "c"]


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_step_that_was_stopped_tells_nothing_of_what_one_takes(is_stopped: bool) -> None:
    bench = Bench()
    bench.hand_over(bench.spec("a", 6), (first_token(0, 5),))
    batch = bench.role.schedule()
    assert batch is not None
    output = bench.output(batch, 9)
    output.is_stopped = is_stopped
    bench.role.complete(batch, output)
    assert bool(bench.role.scheduler.pace.decode_s(1)) != is_stopped


def test_an_attempt_that_runs_is_not_begun_a_second_time() -> None:
    bench = Bench()
    for _ in range(2):
        bench.send(LocalTask(spec=bench.spec("a", 6)))
    assert not bench.sent and bench.role.counters().stale_messages == 1
    bench.run()
    assert bench.tokens("a") == {0: [(index, 9) for index in range(4)]} and bench.role.is_quiet


def test_a_router_that_is_back_keeps_what_it_lists_by_attempt_and_other_routers_keep_theirs() -> None:
    bench = Bench()
    for name in ("kept", "older"):
        bench.send(LocalTask(spec=bench.spec(name, 6)))
    bench.role.on_router_message("another", LocalTask(spec=bench.spec("others", 6)))
    bench.send(LiveRequests(attempts=(("kept", 0), ("older", 1))))
    bench.run()
    assert [name for name in ("kept", "older", "others") if bench.tokens(name)] == ["kept", "others"]


def test_a_sequence_that_outgrows_the_pool_is_told_as_a_failure() -> None:
    bench = Bench(num_blocks=2)
    bench.send(LocalTask(spec=bench.spec("a", 6)))
    bench.run()
    failure = bench.last(WorkerFailure)
    assert isinstance(failure, WorkerFailure) and "9 tokens of choice 0 do not fit into 2 blocks" in failure.reason
    assert bench.role.is_quiet and bench.pool.num_owned_blocks == 0


def test_a_copy_for_a_choice_that_starts_anew_never_lands_in_a_block_of_another() -> None:
    bench = Bench()
    bench.hand_over(bench.spec("a", 6, n=2, outputs=([5, 6], [])), ())
    batch = bench.role.schedule()
    assert batch is not None
    for _, target in batch.block_copies:
        assert any(target in row.seq.block_table for row in batch.rows)
    bench.complete(batch)
    bench.run()
    assert bench.tokens("a") == {0: [(2, 9), (3, 9)], 1: [(0, 9), (1, 9), (2, 9), (3, 9)]}


def test_blocks_that_are_copied_to_come_back_after_the_step_though_their_sequence_has_no_row_in_it() -> None:
    """Eight resumed choices with more to feed than a step takes."""
    bench = Bench()
    bench.hand_over(bench.spec("a", 6, n=8, outputs=tuple([5] * 3 for _ in range(8))), ())
    batch = bench.role.schedule()
    assert batch is not None and len(batch.block_copies) == 7
    fed = {id(row.seq) for row in batch.rows}
    assert len(fed) < 8
    bench.send(Abort(request_id="a", attempt=0))
    assert all(bench.pool.ref_count(target) == 1 for _, target in batch.block_copies)
    bench.complete(batch)
    assert bench.pool.num_owned_blocks == 0 and bench.role.is_quiet


def test_logits_that_are_no_distribution_end_their_request_alone() -> None:
    """Both choices of it, with one answer; nobody finds its blocks, and all of them are free."""
    bench = Bench()
    for name in ("a", "b"):
        bench.hand_over(bench.spec(name, 8, n=2), tuple(first_token(choice, 5) for choice in range(2)))
    batch = bench.role.schedule()
    assert batch is not None and [row.seq.request_id for row in batch.rows] == ["a", "a", "b", "b"]
    assert bench.pool.num_owned_blocks and list(bench.pool.published())
    rows = [RowOutput((), is_finite=False), *[RowOutput(((SampledToken(9),),))] * 3]
    bench.role.complete(batch, StepOutput(rows, 0.01, 4))
    [failure] = [message for message in bench.sent if isinstance(message, WorkerFailure)]
    assert (failure.request_id, failure.attempt, failure.code) == ("a", 0, "nonfinite_logits")
    assert "token 9" in failure.reason
    bench.check()
    bench.run()
    assert bench.tokens("a") == {0: [(0, 5)], 1: [(0, 5)]}, "nothing of the step"
    assert bench.tokens("b") == {choice: [(0, 5), (1, 9), (2, 9), (3, 9)] for choice in (0, 1)}
    assert bench.pool.num_owned_blocks == 0 and bench.role.counters().nonfinite_rows == 1
    assert bench.role.is_quiet and not isinstance(bench.sent[-1], WorkerFailure)


def test_blocks_of_every_choice_without_a_distribution_are_not_found_again() -> None:
    bench = Bench()
    bench.hand_over(bench.spec("a", 6, n=2), (first_token(0, 5), first_token(1, 6)))
    for _ in range(2):
        bench.step()
    batch = bench.role.schedule()
    assert batch is not None and len(list(bench.pool.published())) == 3, "each choice has a full block of its own"
    bench.role.complete(batch, StepOutput([RowOutput((), is_finite=False)] * 2, 0.01, 2))
    assert bench.pool.num_cached_blocks == bench.pool.num_owned_blocks == 0


def test_blocks_of_a_request_without_a_distribution_are_not_found_again() -> None:
    bench = Bench()
    bench.send(LocalTask(spec=bench.spec("a", 9)))
    batch = bench.role.schedule()
    assert batch is not None
    bench.role.complete(batch, StepOutput([RowOutput((), is_finite=False)], 0.01, 9))
    assert bench.last(WorkerFailure) and bench.pool.num_cached_blocks == bench.pool.num_owned_blocks == 0
    bench.check()
    bench.send(LocalTask(spec=bench.spec("b", 9)))
    batch = bench.role.schedule()
    assert batch is not None and batch.num_tokens == 9
