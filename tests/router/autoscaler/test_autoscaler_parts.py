"""The autoscaler's parts: forecast, sizing, sample of lengths, schedule."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.errors import ConfigError
from kvferry.common.request import Pooling, SampledToken, SamplingParams
from kvferry.router.autoscaler.forecast import DayProfile, RateForecast
from kvferry.router.autoscaler.inputs import TypicalLimits, TypicalTimes
from kvferry.router.autoscaler.lengths import LengthSample
from kvferry.router.autoscaler.load_record import LoadRecord, SeenLoad
from kvferry.router.autoscaler.scale_types import DAY_S, AnswerLengths, Bounds, WorkerLimits
from kvferry.router.autoscaler.schedule import Schedule
from kvferry.router.autoscaler.sizing import DecodeLoad, PrefillLoad, erlang_c, needed_of_both
from kvferry.router.state.objectives import NO_OBJECTIVES, Objectives, filled_step_s
from kvferry.router.state.predictor import Predictor
from kvferry.router.state.request import RouterRequest
from kvferry.wire.workers import StepSample

from ..fleet import SPEC, Fleet
from .scale_world import LIMITS, LinearTimes

OBJECTIVES = Objectives(ttft_s=1.0, tpot_s=0.03)
FULL_STEPS = WorkerLimits(LIMITS.kv_tokens, LIMITS.max_num_seqs, max_num_batched_tokens=1)  # prompts one by one


def lognormal(count: int, seed: int = 0) -> list[AnswerLengths]:
    dice = random.Random(seed)
    return [
        AnswerLengths(int(dice.lognormvariate(6.5, 1.0)) + 1, 0, int(dice.lognormvariate(5.0, 0.8)) + 1)
        for _ in range(count)
    ]


# --- step times -------------------------------------------------------------------------------------------------


class FittedTimes(Predictor):
    """Step times of every worker, as a fit has found them."""

    def __init__(self, prefill_s: float, decode_s: float) -> None:
        super().__init__()
        self._of_prompts, self._of_tokens = prefill_s, decode_s

    def is_known(self, session: int) -> bool:
        return True

    def prefill_s(self, session: int, new_tokens: int, context: int) -> float:
        return self._of_prompts * new_tokens

    def decode_step_s(self, session: int, rows: int, context: int) -> float:
        return self._of_tokens


@pytest.mark.parametrize(("prefill_s", "decode_s"), [(0.0, 0.01), (0.001, 0.0), (0.001, 0.01)])
def test_a_fleet_is_sized_by_steps_that_take_time(prefill_s: float, decode_s: float) -> None:
    fleet = Fleet()
    fleet.join("p-0")
    times = TypicalTimes(FittedTimes(prefill_s, decode_s))
    assert times.choose(fleet.dispatcher.view().workers) is (prefill_s > 0 and decode_s > 0)


def test_pools_are_sized_by_their_own_workers_step_times() -> None:
    """Prefill workers of four ranks are four times as fast as the decode workers of one."""
    fleet = Fleet()
    for name, tp_size, factor in (("p-0", 4, 1.0), ("p-1", 4, 1.0), ("d-0", 1, 4.0), ("d-1", 1, 4.0), ("d-2", 1, 4.0)):
        samples = [StepSample(factor * 1e-4 * n, prefill_tokens=n, prefill_pairs=0) for n in (16, 64, 256, 512) * 4]
        samples += [StepSample(factor * 1e-2, decode_rows=n, decode_context=100 * n) for n in (1, 4, 16) * 4]
        fleet.join(name, tp_size=tp_size, samples=tuple(samples))
    workers = fleet.dispatcher.view().workers
    times = TypicalTimes(fleet.predictor)
    assert times.choose(workers)
    prefill_s = fleet.predictor.prefill_s(workers[0].session, 512, 0)
    decode_s = fleet.predictor.decode_step_s(workers[2].session, 4, 400)
    assert times.prefill_s(512, 0) == prefill_s == pytest.approx(0.0512, rel=0.05)
    assert times.decode_step_s(4, 400) == decode_s == pytest.approx(0.04, rel=0.05)
    assert times.choose([worker for worker in workers if worker.role == "decode"])  # they are all that there is
    assert times.prefill_s(512, 0) > 3 * prefill_s
    assert not times.choose([])


def test_a_pools_workers_say_what_they_hold_as_long_as_they_are_there_and_after() -> None:
    fleet = Fleet()
    fleet.join("p-0", max_num_seqs=2, num_blocks=32, max_num_batched_tokens=512)
    fleet.join("d-0", max_num_seqs=64, num_blocks=4096, max_num_batched_tokens=64)
    workers = fleet.dispatcher.view().workers
    limits = TypicalLimits()
    assert limits.of([]) is None
    own = limits.of(workers)
    assert own == WorkerLimits(4096 * SPEC.block_size, 64, 512, SPEC)
    assert limits.of([worker for worker in workers if worker.role == "prefill"]) == own  # d-0 comes back
    assert limits.of([]) == replace(own, spec=None)
    alone = TypicalLimits().of([worker for worker in workers if worker.role == "decode"])
    assert alone == WorkerLimits(4096 * SPEC.block_size, 64, 64, None)


# --- forecast ---------------------------------------------------------------------------------------------------


def test_noise_moves_a_forecast_little() -> None:
    dice, forecast = random.Random(1), RateForecast()
    levels = []
    for index in range(720):
        forecast.observe([1.0] * round(dice.gauss(200, 200**0.5)), 5.0, index * 5.0)
        levels.append(forecast.at(60.0))
    assert all(36.0 < level < 44.0 for level in levels[60:])


@pytest.mark.parametrize("after", [400.0, 4.0])
def test_a_jump_is_believed_at_once(after: float) -> None:
    forecast = RateForecast()
    for _ in range(100):
        forecast.observe([1.0] * 200, 5.0, 0.0)
    forecast.observe([1.0] * round(after * 5), 5.0, 0.0)
    assert forecast.at(60.0) == pytest.approx(after)


def test_one_long_prompt_among_many_short_ones_is_no_jump() -> None:
    dice, forecast = random.Random(2), RateForecast()
    for _ in range(400):
        forecast.observe([100_000.0 if dice.random() < 0.002 else 500.0 for _ in range(50)], 5.0, 0.0)
    level = forecast.level
    forecast.observe([500.0] * 49 + [100_000.0], 5.0, 0.0)
    assert forecast.level < 1.5 * level


def test_a_forecast_that_began_in_silence_takes_noise_for_noise() -> None:
    """Sixteen prompts after ten are chance, whether or not the first interval was empty."""
    for counts in ((10, 16), (0, 10, 16)):
        forecast = RateForecast()
        for parts in ([500.0] * count for count in counts):
            forecast.observe(parts, 5.0, 0.0)
        assert 1000.0 < forecast.level < 1100.0


def test_a_trend_is_looked_ahead() -> None:
    forecast = RateForecast()
    for index in range(400):
        forecast.observe([1.0] * (200 + index), 5.0, 0.0)
    assert 1.5 < forecast.at(60.0) - forecast.level < 2.4  # 0.04 more each second


def test_the_day_before_bends_the_forecast() -> None:
    profile = DayProfile()
    assert profile.bend(8.9 * 3600, 1800.0) == 1.0
    for index in range(int(DAY_S / 60)):
        profile.observe(index * 60.0, 100.0 if 9 <= index / 60 < 17 else 20.0, 60.0)
    profile.observe(0.0, 20.0, 60.0)
    assert profile.bend(8.5 * 3600, 3600.0) == 2.0  # five times, bounded
    assert profile.bend(12 * 3600, 3600.0) == pytest.approx(1.0)
    assert profile.bend(16.5 * 3600, 3600.0) == 0.5


@given(st.lists(st.integers(0, 1000), max_size=60), st.floats(0, 3600))
def test_a_forecast_is_never_negative(counts: list[int], ahead_s: float) -> None:
    forecast = RateForecast()
    for index, count in enumerate(counts):
        forecast.observe([1.0] * count, 5.0, index * 5.0)
    assert forecast.at(ahead_s) >= 0.0


# --- sizing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("servers", "offered", "chance"), [(1, 0.5, 0.5), (2, 1.0, 1 / 3), (10, 8.0, 0.4092)])
def test_erlangs_c_is_the_textbooks(servers: int, offered: float, chance: float) -> None:
    assert erlang_c(servers, offered) == pytest.approx(chance, abs=1e-3)


def simulated(answers: list[AnswerLengths], rate: float, num_workers: int, seed: int = 3, count: int = 20_000) -> float:
    """The share of prompts in time in a queue with so many servers."""
    dice, times = random.Random(seed), LinearTimes()
    free, now, kept = [0.0] * num_workers, 0.0, 0
    for _ in range(count):
        now += dice.expovariate(rate)
        service_s = times.prefill_s(dice.choice(answers).num_prompt_tokens, 0)
        start_s = max(now, heapq.heappop(free))
        heapq.heappush(free, start_s + service_s)
        kept += start_s + service_s - now <= max(1.0, 3 * service_s)
    return kept / count


@pytest.mark.parametrize("rate", [5.0, 40.0, 150.0])
def test_prefill_workers_by_formula_are_those_of_a_simulated_queue(rate: float) -> None:
    answers = lognormal(400)
    load = PrefillLoad.from_answers(answers, LinearTimes(), FULL_STEPS, OBJECTIVES)
    count = load.needed(rate, 0.99)
    assert simulated(answers, rate, count) >= 0.98
    assert simulated(answers, rate, count - max(1, count // 3)) < 0.985


@given(st.floats(0.1, 500), st.floats(1.0, 2.0), st.floats(0.8, 0.995))
def test_more_load_or_a_higher_target_never_needs_fewer(rate: float, more: float, target: float) -> None:
    answers = lognormal(50)
    prefill = PrefillLoad.from_answers(answers, LinearTimes(), LIMITS, OBJECTIVES)
    decode = DecodeLoad.from_answers(answers, LinearTimes(), LIMITS, OBJECTIVES)
    assert prefill.needed(rate * more, target) >= prefill.needed(rate, target)
    assert decode.needed(rate * more, target) >= decode.needed(rate, target)
    assert prefill.needed(rate, 0.999) >= prefill.needed(rate, target)


def test_the_least_decode_workers_keep_the_objective_and_one_less_does_not() -> None:
    load = DecodeLoad.from_answers(lognormal(400), LinearTimes(), LIMITS, OBJECTIVES)
    count = load.needed(80.0, 0.99)
    assert load.fits(80.0, count, 0.99)
    assert not load.fits(80.0, count - 1, 0.99)


def test_long_contexts_need_decode_workers_for_their_memory() -> None:
    short = DecodeLoad.from_answers([AnswerLengths(100, 0, 200)] * 50, LinearTimes(), LIMITS, OBJECTIVES)
    long = DecodeLoad.from_answers([AnswerLengths(50_000, 0, 200)] * 50, LinearTimes(), LIMITS, OBJECTIVES)
    assert long.needed(10.0, 0.99) > 3 * short.needed(10.0, 0.99)


def test_choices_of_an_answer_run_side_by_side_behind_one_prompt() -> None:
    """Four choices of 100 tokens are four rows for 100 steps, and no row for 400."""
    split, whole = (
        DecodeLoad.from_answers([answer] * 50, LinearTimes(), LIMITS, OBJECTIVES)
        for answer in (AnswerLengths(1000, 0, 400, num_choices=4), AnswerLengths(1000, 0, 400))
    )
    assert split.mean_output == whole.mean_output == 400
    assert (split.mean_held, whole.mean_held) == (400 * (1000 + 50), 400 * (1000 + 200))
    assert (split.mean_kept, whole.mean_kept) == (100 * (1000 + 4 * 50), whole.mean_held)
    assert split.mean_square_output == 4 * whole.mean_square_output  # its rows come and go together
    steps = [4 * (1000 + step + 0.5) for step in range(100)]
    assert split.mean_square_held == pytest.approx(sum(held * held for held in steps), rel=1e-3)
    long = [AnswerLengths(50_000, 0, 800, num_choices=choices) for choices in (8, 1)]
    of_8, of_1 = (DecodeLoad.from_answers([answer] * 50, LinearTimes(), LIMITS, OBJECTIVES) for answer in long)
    assert of_8.needed(1.0, 0.99) < of_1.needed(1.0, 0.99)


def test_handed_over_contexts_need_the_memory_of_what_is_brought_alone() -> None:
    """Of five in six layers a window: six prompts' blocks lie in one's memory, and steps read all the same."""
    windowed = msgspec.structs.replace(SPEC, num_layers=6, windows=(0, 64, 64, 64, 64, 64))
    answers = [AnswerLengths(50_000, 0, 200)] * 50
    whole, thin = (
        DecodeLoad.from_answers(answers, LinearTimes(), replace(LIMITS, spec=spec), OBJECTIVES)
        for spec in (SPEC, windowed)
    )
    assert (thin.mean_held, thin.mean_output) == (whole.mean_held, whole.mean_output)
    assert 0.16 < thin.mean_kept / whole.mean_kept < 0.18 and whole.mean_kept == whole.mean_held
    assert thin.mean_square_kept < whole.mean_square_kept == whole.mean_square_held
    assert thin.needed(10.0, 0.99) < whole.needed(10.0, 0.99)
    short = [AnswerLengths(30, 0, 200)] * 50  # less than a block and a window: all of it is kept
    load = DecodeLoad.from_answers(short, LinearTimes(), replace(LIMITS, spec=windowed), OBJECTIVES)
    assert load.mean_kept == load.mean_held


def test_limits_know_of_handoffs_where_there_is_a_worker_that_makes_them() -> None:
    fleet = Fleet()
    for name in ("p-0", "d-0"):
        fleet.join(name)
    ready = fleet.dispatcher.view().workers
    specs = []
    for workers in (ready, [view for view in ready if view.role == "decode"]):
        limits = TypicalLimits().of(workers)
        assert limits is not None
        specs.append(limits.spec)
    assert specs == [SPEC, None]


def test_an_objective_that_no_fleet_can_keep_asks_for_no_fleet_without_end() -> None:
    hopeless = Objectives(ttft_s=0.001, ttft_stretch=1.0, tpot_s=0.001)
    answers = lognormal(100)
    assert DecodeLoad.from_answers(answers, LinearTimes(), LIMITS, hopeless).needed(20.0, 0.99) < 40
    assert PrefillLoad.from_answers(answers, LinearTimes(), LIMITS, hopeless).needed(20.0, 0.99) < 40


def both(answers: list[AnswerLengths], rate: float, objectives: Objectives = OBJECTIVES) -> int:
    """How many workers are needed that do everything."""
    prompts = PrefillLoad.from_answers(answers, LinearTimes(), LIMITS, objectives)
    return needed_of_both(
        prompts, DecodeLoad.from_answers(answers, LinearTimes(), LIMITS, objectives), rate, rate, 0.99
    )


def test_workers_that_do_everything_are_as_many_as_prompts_and_rows_need_together() -> None:
    long_prompts, long_answers = [AnswerLengths(8000, 0, 20)] * 50, [AnswerLengths(100, 0, 400)] * 50
    for answers in (long_prompts, long_answers, lognormal(200)):
        prompts = PrefillLoad.from_answers(answers, LinearTimes(), LIMITS, OBJECTIVES)
        crowd = DecodeLoad.from_answers(answers, LinearTimes(), LIMITS, OBJECTIVES)
        work = 20.0 * prompts.mean_s
        assert both(answers, 20.0) >= max(math.ceil(work), prompts.needed(20.0, 0.99), crowd.needed(20.0, 0.99))
        assert both(answers, 20.0) >= work + crowd.least_share(20.0, 1)
        assert both(answers, 0.05) == 1  # one has time for both
    assert both(long_prompts, 20.0) > 16  # each takes 0.8 s
    assert both(long_prompts, 0.0) == both([], 20.0) == 0
    embedded = [AnswerLengths(8000, 0, 0)] * 50
    assert both(embedded, 20.0) == PrefillLoad.from_answers(embedded, LinearTimes(), LIMITS, OBJECTIVES).needed(
        20.0, 0.99
    )


@given(st.floats(0.1, 300), st.floats(1.0, 2.0))
def test_more_load_never_needs_fewer_workers_that_do_everything(rate: float, more: float) -> None:
    answers = lognormal(50)
    assert both(answers, rate * more) >= both(answers, rate)


def test_an_objective_that_no_worker_can_keep_beside_prompts_asks_for_no_fleet_without_end() -> None:
    assert both(lognormal(100), 20.0, Objectives(ttft_s=0.001, ttft_stretch=1.0, tpot_s=0.001)) < 60
    nothing = [AnswerLengths(4000, 0, 100, NO_OBJECTIVES)] * 50
    assert both(nothing, 2.0) == 1 and both(nothing, 3.0) == 2  # a prompt takes 0.4 s


def test_each_class_has_its_share_of_prompts_in_time_however_few_are_of_it() -> None:
    """The strict ones are a twentieth: if all were late the rest would make up for it."""
    strict = Objectives(ttft_s=0.08, ttft_stretch=1.0)
    answers = [AnswerLengths(500, 0, 100, strict if index % 20 == 0 else None) for index in range(400)]
    mixed = PrefillLoad.from_answers(answers, LinearTimes(), FULL_STEPS, OBJECTIVES)
    alone = PrefillLoad.from_answers(answers[::20], LinearTimes(), FULL_STEPS, OBJECTIVES)
    assert mixed.needed(100.0, 0.9) == alone.needed(100.0, 0.9)
    loose = PrefillLoad.from_answers(answers[1:20], LinearTimes(), FULL_STEPS, OBJECTIVES)
    assert mixed.needed(100.0, 0.9) > loose.needed(100.0, 0.9)


def test_answers_keep_the_strictest_pace_of_their_classes() -> None:
    strict = Objectives(tpot_s=0.015)
    answers = [AnswerLengths(500, 0, 100, strict if index == 0 else None) for index in range(50)]
    mixed = DecodeLoad.from_answers(answers, LinearTimes(), LIMITS, OBJECTIVES)
    default = DecodeLoad.from_answers(answers[1:], LinearTimes(), LIMITS, OBJECTIVES)
    assert (mixed.longest_step_s, default.longest_step_s) == (filled_step_s(0.015), filled_step_s(0.03))
    assert filled_step_s(0.03) < 0.03  # placement fills steps no further
    assert mixed.needed(40.0, 0.99) > default.needed(40.0, 0.99)


def test_a_class_without_objectives_asks_for_its_work_to_be_done_and_no_more() -> None:
    answers = [AnswerLengths(4000, 0, 100, Objectives(priority=10))] * 50
    prompts = PrefillLoad.from_answers(answers, LinearTimes(), FULL_STEPS, OBJECTIVES)
    assert prompts.kept(2.0, 1) == 1.0 and prompts.needed(2.0, 0.99) == 1
    assert prompts.kept(3.0, 1) == 0.0 and prompts.needed(3.0, 0.99) == 2  # it takes 0.4 s
    urgent = [answer._replace(objectives=None) for answer in answers]
    assert PrefillLoad.from_answers(urgent, LinearTimes(), FULL_STEPS, OBJECTIVES).needed(2.0, 0.99) > 1
    crowd = DecodeLoad.from_answers(answers, LinearTimes(), LIMITS, OBJECTIVES)
    assert crowd.longest_step_s == math.inf and crowd.needed(40.0, 0.99) == 3  # their memory is what they need


def test_cached_tokens_are_no_work() -> None:
    cold = PrefillLoad.from_answers([AnswerLengths(8000, 0, 100)] * 20, LinearTimes(), LIMITS, OBJECTIVES)
    warm = PrefillLoad.from_answers([AnswerLengths(8000, 7000, 100)] * 20, LinearTimes(), LIMITS, OBJECTIVES)
    assert warm.needed(50.0, 0.99) < cold.needed(50.0, 0.99) / 3


# --- lengths ----------------------------------------------------------------------------------------------------


def test_the_sample_is_bounded_and_forgets_old_lengths() -> None:
    sample = LengthSample(size=100, half_life_s=60.0)
    for second in range(600):
        sample.add([AnswerLengths(1, 0, 1)] * 20, float(second))
    for second in range(600, 1200):
        sample.add([AnswerLengths(2, 0, 2)] * 20, float(second))
    assert len(sample) == 100
    assert sum(answer.num_prompt_tokens == 2 for answer in sample.answers) > 95


def test_the_sample_has_the_shares_of_what_came() -> None:
    sample = LengthSample(size=500, half_life_s=1e9)
    sample.add([AnswerLengths(10 if index % 4 else 1000, 0, 1) for index in range(20_000)], 0.0)
    share = sum(answer.num_prompt_tokens == 1000 for answer in sample.answers) / 500
    assert share == pytest.approx(0.25, abs=0.07)


# --- schedule ---------------------------------------------------------------------------------------------------

USUAL = Bounds(1, 10)


def hours(text: str) -> float:
    hour, minute = text.split(":")
    return 3600.0 * int(hour) + 60.0 * int(minute)


@pytest.mark.parametrize(
    ("window", "weekday", "at", "bounds"),
    [
        ("08:00-18:00 prefill>=4", 2, "12:00", Bounds(4, 10)),
        ("08:00-18:00 prefill>=4", 2, "18:00", USUAL),
        ("22:00-06:00 prefill<=2 decode>=3", 0, "23:30", Bounds(1, 2)),
        ("22:00-06:00 prefill<=2 decode>=3", 0, "05:59", Bounds(1, 2)),
        ("mon-fri 08:00-18:00 prefill>=4", 5, "12:00", USUAL),
        ("fri 22:00-06:00 prefill>=4", 5, "02:00", Bounds(4, 10)),
        ("fri 22:00-06:00 prefill>=4", 5, "23:00", USUAL),
        ("Fri 00:00-00:00 prefill>=4", 4, "12:00", Bounds(4, 10)),
        ("fri 00:00-00:00 prefill>=4", 5, "00:00", USUAL),
        ("sat-mon 08:00-09:00 prefill>=4", 0, "08:00", Bounds(4, 10)),
        ("08:00-18:00 prefill>=12 prefill<=3", 0, "08:00", Bounds(12, 12)),
        ("08:00-18:00 decode>=4", 2, "12:00", USUAL),
    ],
)
def test_windows_change_bounds(window: str, weekday: int, at: str, bounds: Bounds) -> None:
    assert Schedule([window]).bounds("prefill", USUAL, weekday, hours(at)) == bounds


def test_a_minimum_is_wished_for_before_its_window_begins() -> None:
    schedule = Schedule(["mon 00:05-01:00 prefill>=4"])
    assert schedule.soon("prefill", USUAL, 6, hours("23:59"), 600.0) == Bounds(4, 10)
    assert schedule.soon("prefill", USUAL, 6, hours("23:59"), 60.0) == USUAL


@pytest.mark.parametrize(
    "text", ["", "8-18 prefill>=4", "08:00-25:00 prefill>=4", "foo 08:00-09:00 decode>=1", "08:00-09:00"]
)
def test_a_window_that_says_nothing_clear_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not like|no day has|days are"):
        Schedule([text])


def test_time_of_day_repeats() -> None:
    assert math.isclose(DayProfile().bend(DAY_S + 5.0, 0.0), 1.0)


def test_an_embedding_is_the_work_of_a_prompt_and_of_no_answer() -> None:
    record = LoadRecord()
    request = RouterRequest("r", range(40), SamplingParams(max_tokens=1), pooling=Pooling.LAST)
    record.on_submitted(request)
    request.end_embedded(b"\0\0\x80?", 1.0)
    record.on_finished(request)
    seen = record.take(0)
    assert seen.prompts == (40,) and seen.answers == (AnswerLengths(40, 0, 0),)
    load = DecodeLoad.from_answers(seen.answers, LinearTimes(), LIMITS, OBJECTIVES)
    assert load.needed(100.0, 0.9) == 0


def test_an_answers_choices_are_counted_and_told_to_other_routers() -> None:
    record = LoadRecord()
    request = RouterRequest("r", range(40), SamplingParams(max_tokens=9), n=3)
    for choice in request.choices:
        choice.tokens.extend([SampledToken(1)] * 5)
    record.on_finished(request)
    seen = record.take(0)
    assert seen.answers == (AnswerLengths(40, 0, 15, num_choices=3),)
    assert SeenLoad.from_event(msgspec.json.decode(msgspec.json.encode(seen.as_event()))).answers == seen.answers


def test_answers_of_other_classes_say_what_they_were_to_get_to_other_routers_too() -> None:
    record, fast = LoadRecord(), Objectives(ttft_s=0.5, tpot_s=0.02, priority=-1)
    for name, objectives in (("default", OBJECTIVES), ("fast", fast), ("batch", NO_OBJECTIVES)):
        request = RouterRequest(name, range(40), SamplingParams(max_tokens=1), objectives=objectives)
        request.request_class = name
        request.choices[0].tokens.append(SampledToken(1))
        record.on_finished(request)
    seen = record.take(0)
    assert [answer.objectives for answer in seen.answers] == [None, replace(fast, priority=0), NO_OBJECTIVES]
    assert SeenLoad.from_event(msgspec.json.decode(msgspec.json.encode(seen.as_event()))).answers == seen.answers
