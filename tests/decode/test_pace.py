"""Prompts beside running answers: how much of them a step takes along."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.batch import Batch, BatchRow, RowOutput, StepOutput
from kvferry.common.pacing import MIN_CHUNK_TOKENS, RunningAnswers, WaitingPrompts, longest_step_s
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.decode.pace import Pace
from kvferry.decode.scheduler import DecodeScheduler
from kvferry.kvcache.blocks import BlockPool

from .bench import BLOCK, SPEC

ROW_S, TOKEN_S = 0.01, 0.0005  # of the machine that is played


def taught(pace: Pace) -> Pace:
    for _ in range(30):
        pace.learn(ROW_S, num_chunk_tokens=0, num_rows=4)
        pace.learn(ROW_S + 100 * TOKEN_S, num_chunk_tokens=100, num_rows=4)
    return pace


def test_with_an_objective_a_step_stays_within_four_fifths_of_it() -> None:
    pace = taught(Pace(objective_s=0.05))
    assert abs(ROW_S + pace.chunk_tokens(4, [500]) * TOKEN_S - 0.8 * 0.05) < 0.002


def slow_pace() -> Pace:
    """Steps of four rows take 100 ms."""
    pace = Pace()
    for _ in range(30):
        pace.learn(0.1, num_chunk_tokens=0, num_rows=4)
        pace.learn(0.1 + 100 * TOKEN_S, num_chunk_tokens=100, num_rows=4)
    return pace


def test_without_one_a_step_takes_so_many_milliseconds_or_half_a_decode_step_more() -> None:
    for tokens_behind, step_s in ((0, 0.035), (None, 2.5 * ROW_S)):
        pace = taught(Pace(tokens_behind=tokens_behind))
        assert abs(ROW_S + pace.chunk_tokens(4, [100]) * TOKEN_S - step_s) < 0.002
    assert abs(0.1 + slow_pace().chunk_tokens(4, [500]) * TOKEN_S - 0.15) < 0.01


@given(
    waiting_s=st.floats(0, 1000),
    decode_s=st.floats(1e-4, 1.0),
    num_answers=st.integers(0, 300),
    num_waiting=st.floats(0, 1000),
)
def test_the_more_waits_and_the_fewer_read_the_longer_a_step_may_take(
    waiting_s: float, decode_s: float, num_answers: int, num_waiting: float
) -> None:
    def longest_s(number: int, seconds: float, num_waiting: float) -> float:
        answers = RunningAnswers(number, decode_s, decode_s)
        return longest_step_s(None, answers, WaitingPrompts(seconds, num_waiting))

    seconds = longest_s(num_answers, waiting_s, num_waiting)
    beside_more = longest_s(num_answers + 1, waiting_s, num_waiting)
    least = 1 + 1.25 * min(1.0, (num_answers + 1) / 8)  # more of it beside more answers: prompts come more often
    assert beside_more <= max(seconds, least * decode_s * (1 + 1e-9))
    assert seconds <= longest_s(num_answers, 2 * waiting_s, num_waiting)
    assert seconds <= longest_s(num_answers, waiting_s, 2 * num_waiting)
    assert decode_s <= seconds <= max(0.05, 12 * decode_s), "answers never stand still"
    if num_answers >= 8:
        assert 2.25 * decode_s <= seconds, "prompts move on"


@given(step_s=st.floats(1e-4, 1.0), lone_share=st.floats(0.05, 1.0))
def test_who_only_helps_keeps_answers_near_the_pace_of_a_lone_one(step_s: float, lone_share: float) -> None:
    lone_s = lone_share * step_s
    seconds = longest_step_s(None, RunningAnswers(4, step_s, lone_s), None)
    assert seconds <= max(1.5 * step_s, 2.5 * lone_s) and seconds <= max(1.5 * step_s, 0.03)
    assert seconds >= 1.5 * step_s, "prompts move on"


def test_what_waits_is_spread_over_a_number_of_steps_the_routers_queue_too() -> None:
    pace, each = slow_pace(), round(24 * 0.2 / TOKEN_S)
    pace.tokens_behind = 0
    assert abs(pace.room_s(4, [each]) - 0.2) < 0.01
    assert abs(pace.room_s(4, [each, each]) - 3 * 0.2) < 0.01, "the second waits for the first too"
    pace.tokens_behind = each
    assert abs(pace.room_s(4, [each]) - 3 * 0.2) < 0.01, "wherever it waits"
    pace.tokens_behind = None
    assert abs(pace.room_s(4, [each]) - 0.05) < 0.01, "others compute prompts, streams come first"


def test_a_prompt_moves_on_however_tight_the_objective() -> None:
    assert taught(Pace(objective_s=0.001)).chunk_tokens(4, [500]) == MIN_CHUNK_TOKENS


def test_one_slow_step_is_no_new_speed_and_a_new_speed_is_learned() -> None:
    pace = taught(Pace())
    before = pace.chunk_tokens(4, [500])
    pace.learn(5.0, num_chunk_tokens=100, num_rows=4)
    pace.learn(5.0, num_chunk_tokens=0, num_rows=4)
    assert pace.chunk_tokens(4, [500]) > before / 2 and pace.decode_s(4) < 2 * ROW_S
    for _ in range(30):
        pace.learn(5 * ROW_S, num_chunk_tokens=0, num_rows=16)
    assert abs(pace.decode_s(16) - 5 * ROW_S) < 0.001


def test_what_rows_take_is_known_though_prompts_come_with_every_step() -> None:
    pace = Pace()
    for num_rows, step_s in ((1, 0.02), (4, 0.03), (16, 0.07)):  # the calibration
        pace.learn(step_s, num_chunk_tokens=0, num_rows=num_rows)
    for _ in range(30):
        pace.learn(0.07 + 50 * TOKEN_S, num_chunk_tokens=50, num_rows=16)
    assert abs(0.07 + pace.chunk_tokens(16, [500]) * TOKEN_S - 1.5 * 0.07) < 0.002
    assert abs(pace.decode_s(10) - 0.05) < 0.001 and abs(pace.decode_s(31) - 0.12) < 0.001
    assert pace.decode_s(0) == pace.decode_s(1) == 0.02
    for _ in range(30):
        pace.learn(0.04, num_chunk_tokens=0, num_rows=1)
    assert abs(pace.decode_s(1) - 0.04) < 0.001 and pace.decode_s(16) == 0.07


def _sequence(name: str, num_tokens: int, priority: int = 0) -> Sequence:
    params = SamplingParams(temperature=0.0)
    return Sequence(
        RequestId(name), 0, 0, list(range(num_tokens)), num_tokens, params, name.encode(), priority=priority
    )


def _sizes(batch: Batch | None) -> dict[str, int]:
    assert batch is not None
    return {row.seq.request_id: row.num_scheduled_tokens for row in batch.rows}


def test_more_rows_than_were_seen_are_held_for_no_quicker_than_those() -> None:
    pace = Pace()
    pace.learn(0.02, num_chunk_tokens=0, num_rows=2)
    pace.learn(0.01, num_chunk_tokens=0, num_rows=8)
    assert pace.decode_s(5) == pytest.approx(0.015) and pace.decode_s(100) == 0.01


def test_what_a_step_copies_is_no_time_of_its_rows() -> None:
    pace = Pace()
    seq = Sequence(RequestId("a"), 0, 0, [1, 2], 1, SamplingParams(), num_computed_tokens=1)
    pace.observe(Batch([BatchRow(seq, 1)]), StepOutput([RowOutput(())], 0.5, 1, swap_s=0.49))
    assert pace.decode_s(1) == pace.decode_s(0) == pytest.approx(0.01)


def test_a_few_tokens_say_less_of_the_speed_than_many() -> None:
    few, many = Pace(), Pace()
    for pace, num_tokens in ((few, 4), (many, 64)):
        pace.learn(0.0002 * num_tokens, num_chunk_tokens=num_tokens, num_rows=1)
    assert 0.0005 < many.token_s < few.token_s < 0.001


def test_a_step_that_verifies_drafts_tells_nothing_of_others() -> None:
    pace = Pace()
    seq = Sequence(RequestId("a"), 0, 0, [1, 2], 1, SamplingParams(), num_computed_tokens=1)
    batch = Batch([BatchRow(seq, 3, draft=(5, 6))])
    pace.observe(batch, StepOutput([RowOutput(())], 0.5, batch.num_tokens))
    assert pace == Pace()


def test_chunks_are_cut_beside_running_answers_alone() -> None:
    scheduler = DecodeScheduler(
        BlockPool(1024, BLOCK), SPEC, max_num_batched_tokens=512, max_num_seqs=8, tpot_objective_s=0.05
    )
    taught(scheduler.pace)
    scheduler.add(_sequence("alone", 600))
    batch = scheduler.schedule()
    assert _sizes(batch) == {"alone": 512}, "nobody waits: the whole budget"
    assert batch is not None
    scheduler.complete(batch)
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.complete(batch)
    scheduler.queues.running[0].token_ids.append(7)
    scheduler.add(_sequence("late", 600))
    assert _sizes(scheduler.schedule()) == {"alone": 1, "late": scheduler.pace.chunk_tokens(1, [600])}


def test_chunks_use_the_room_that_rows_leave_though_these_take_most_of_a_step() -> None:
    pace, row_s, token_s = Pace(0.05), 0.036, 5e-5
    pace.learn(row_s, num_chunk_tokens=0, num_rows=8)
    sizes = []
    for _ in range(200):
        sizes.append(pace.chunk_tokens(8, [1000]))
        pace.learn(row_s + sizes[-1] * token_s, num_chunk_tokens=sizes[-1], num_rows=8)
    assert sizes[-1] * token_s == pytest.approx(0.85 * 0.05 - row_s, abs=1e-3)


def test_rows_that_got_quicker_leave_chunks_a_bounded_size() -> None:
    pace, row_s, token_s = Pace(0.05), 0.010, 5e-5  # rows are thought to take three times as long
    pace.learn(0.030, num_chunk_tokens=0, num_rows=8)
    for _ in range(200):
        size = min(512, pace.chunk_tokens(8, [1000]))
        pace.learn(row_s + size * token_s, num_chunk_tokens=size, num_rows=8)
    assert row_s + size * token_s <= 0.05
