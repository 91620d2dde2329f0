"""Drafts: what is proposed, how much of it is verified, and that what comes of it never depends on it."""

from __future__ import annotations

import random
from collections.abc import Sequence as Tokens
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.batch import UNDRAFTED, Batch, BatchRow, RowKind, RowOutput, StepOutput, verified_output
from kvferry.common.config import SpeculativeConfig
from kvferry.common.request import RequestId, SampledToken, SamplingParams, Sequence
from kvferry.decode.ngrams import MAX_INDEXED, NgramProposer
from kvferry.decode.scheduler import DecodeScheduler
from kvferry.decode.speculation import Speculation
from kvferry.kvcache.blocks import BlockPool
from kvferry.tests.fake_clock import FakeClock

from .bench import BLOCK, SPEC

CONFIG = SpeculativeConfig(method="ngram", num_speculative_tokens=5, prompt_lookup_min=2, prompt_lookup_max=4)
MAX_MODEL_LEN = 200
STEP_S = 0.01


# --- n-grams --------------------------------------------------------------------------------------------------


def longest_match(tokens: list[int], least: int, most: int) -> int:
    """Say it plainly: the place after the longest earlier occurrence of the end, the latest of equals; 0: none."""
    best, best_length = 0, 0
    for place in range(len(tokens) - 1, least - 1, -1):
        length = 0
        while length < min(most, place) and tokens[place - length - 1] == tokens[len(tokens) - length - 1]:
            length += 1
        if length >= least and length > best_length:
            best, best_length = place, length
    return best


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 3), st.integers(0, 2), st.integers(1, 8))
def test_a_draft_goes_on_from_the_longest_match(tokens: list[int], least: int, more: int, count: int) -> None:
    proposer = NgramProposer(least, least + more)
    for end in range(0, len(tokens), 3):
        proposer.propose(tokens[:end], count)  # what is indexed piece by piece is as what is indexed at once
    draft = proposer.propose(tokens, count)
    place = longest_match(tokens, least, least + more)
    fresh = NgramProposer(least, least + more).propose(tokens, count)
    assert draft == fresh
    if place == 0:
        assert draft == ()
        return
    assert len(draft) == count
    written = [*tokens, *draft]
    if len([p for p in range(least, len(tokens)) if tokens[p - least : p] == tokens[len(tokens) - least :]]) <= 8:
        assert list(draft) == [written[place + index] for index in range(count)]


def test_a_repetition_is_drafted_beyond_its_end() -> None:
    assert NgramProposer(2, 4).propose([9, 1, 2, 1, 2], 5) == (1, 2, 1, 2, 1)
    assert NgramProposer(1, 4).propose([7, 7], 3) == (7, 7, 7)


def test_a_long_prompt_is_indexed_in_several_steps() -> None:
    proposer, prompt = NgramProposer(2, 4), [*range(2 * MAX_INDEXED), 5, 6]
    drafts = [proposer.propose([*prompt, *range(7, 7 + step)], 1) for step in range(4)]
    assert drafts == [(), (), (9,), (10,)]


def test_without_a_match_or_room_there_is_no_draft() -> None:
    assert NgramProposer(2, 4).propose([1, 2, 3, 4], 5) == ()
    assert NgramProposer(2, 4).propose([], 5) == ()
    assert NgramProposer(2, 4).propose([1, 2, 1, 2], 0) == ()


# --- how many -------------------------------------------------------------------------------------------------


def sequence(name: str = "r", *, max_tokens: int = 100) -> Sequence:
    """It repeats itself, so that there is always a draft."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return Sequence(RequestId(name), 0, 0, [1, 2, 3] * 4, 11, params, num_computed_tokens=11)


def rows_of(seqs: Tokens[Sequence]) -> list[BatchRow]:
    return [BatchRow(seq, 1) for seq in seqs]


def answer(rows: list[BatchRow], seconds: float, *, right: bool) -> None:
    """Let each row's sequence say what was drafted, or something else."""
    for row in rows:
        expected = NgramProposer(2, 4).propose(row.seq.token_ids, 1 + len(row.draft))
        said = expected if right else [expected[0] + 100]
        row.seq.token_ids.extend(said)
        row.seq.num_computed_tokens = row.seq.num_tokens - 1


def play(
    speculation: Speculation, seqs: list[Sequence], num_steps: int, *, right: bool, token_s: float = 0.0
) -> list[int]:
    """Run steps; how many tokens each has fed beside those that are known."""
    fed = []
    for _ in range(num_steps):
        rows = rows_of(seqs)
        speculation.draft(rows, 64, lambda seq, count: count)
        drafted = sum(len(row.draft) for row in rows)
        output = StepOutput([RowOutput(()) for _ in rows], STEP_S + drafted * token_s, 0)
        speculation.observe(Batch(rows), output)
        answer(rows, STEP_S, right=right)
        for seq in seqs:
            del seq.token_ids[: -12 if not right else 0]  # the length stays, and with it the room
            seq.num_computed_tokens = seq.num_tokens - 1
            if right:
                del seq.token_ids[12:]
                seq.num_computed_tokens = 11
        fed.append(drafted)
    return fed


def test_the_first_step_of_so_many_rows_has_no_drafts_so_that_its_time_is_known() -> None:
    speculation = Speculation(CONFIG, MAX_MODEL_LEN)
    assert play(speculation, [sequence()], 2, right=True)[0] == 0
    assert play(speculation, [sequence("a"), sequence("b")], 1, right=True) == [0]


@pytest.mark.parametrize("config", [CONFIG, SpeculativeConfig(method="draft_model", model=Path("draft"))])
def test_no_more_is_drafted_than_has_masks_in_time(config: SpeculativeConfig) -> None:
    for limit in (0, 1, 3, 2**31):
        speculation, seq = Speculation(config, MAX_MODEL_LEN), sequence()
        speculation.costs.plain_s[1], speculation.costs.share, speculation.costs.depth_share = STEP_S, 0.001, 0.001
        seq.draft_limit, row = limit, BatchRow(seq, 1)
        speculation.draft([row], 64, lambda seq, count: count)
        assert len(row.draft) == min(limit, config.num_speculative_tokens)


def test_cheap_drafts_are_verified_whole_and_dear_ones_not_at_all() -> None:
    cheap, dear = Speculation(CONFIG, MAX_MODEL_LEN), Speculation(CONFIG, MAX_MODEL_LEN)
    assert play(cheap, [sequence()], 40, right=True)[-1] == CONFIG.num_speculative_tokens
    assert play(dear, [sequence()], 40, right=True, token_s=2 * STEP_S)[-1] == 0


def test_a_slow_step_is_forgiven() -> None:
    speculation = Speculation(CONFIG, MAX_MODEL_LEN)
    play(speculation, [sequence()], 20, right=True, token_s=2 * STEP_S)
    assert any(play(speculation, [sequence()], 400, right=True))


def test_many_rows_draft_again_after_many_steps_without() -> None:
    speculation, seqs = Speculation(CONFIG, MAX_MODEL_LEN), [sequence(f"r{number}") for number in range(32)]
    speculation.costs.share = 0.01
    for _ in range(500):
        speculation.observe(Batch(rows_of(seqs)), StepOutput([RowOutput(()) for _ in seqs], STEP_S, 0))
    assert any(play(speculation, seqs, 5, right=True))


class OftenRight:
    """A proposer that is right by chance. What is said is always the same token."""

    def __init__(self, rate: float) -> None:
        self._rate, self._drawn = rate, random.Random(1)

    def propose(self, tokens: Tokens[int], num_tokens: int) -> tuple[int, ...]:
        return tuple(1 if self._drawn.random() < self._rate else 7 for _ in range(num_tokens))


def speedup(num_rows: int, rows_share: float, *, num_steps: int = 500) -> float:
    """Return the tokens of a second by those without drafts. `rows_share`: of a step, that a token of each takes."""
    proposer = OftenRight(0.6)
    speculation = Speculation(CONFIG, 100_000, lambda seq: proposer)
    seqs, time, num_said = [sequence(f"r{number}", max_tokens=100_000) for number in range(num_rows)], 0.0, 0
    for _ in range(num_steps):
        rows = rows_of(seqs)
        speculation.draft(rows, 2048, lambda seq, count: count)
        step = 1 + rows_share * sum(len(row.draft) for row in rows) / num_rows
        speculation.observe(Batch(rows), StepOutput([RowOutput(()) for _ in rows], STEP_S * step, 0))
        for row in rows:
            count = 1 + next((place for place, token in enumerate(row.draft) if token != 1), len(row.draft))
            row.seq.token_ids.extend([1] * count)
            row.seq.num_computed_tokens += count
            num_said += count
        time += step
    return num_said / num_rows / time


@pytest.mark.parametrize("num_rows", [24, 48])
def test_drafts_are_tried_in_batches_that_were_never_smaller(num_rows: int) -> None:
    assert speedup(num_rows, 0.1) > 1.2
    assert speedup(num_rows, 1.0) > 0.97


def test_one_step_in_many_goes_without() -> None:
    fed = play(Speculation(CONFIG, MAX_MODEL_LEN), [sequence()], 200, right=True)
    assert 2 <= fed[10:].count(0) <= 4


def test_no_draft_goes_beyond_the_answer_its_room_or_the_budget() -> None:
    speculation = Speculation(CONFIG, MAX_MODEL_LEN)
    short, cramped = sequence("short", max_tokens=3), sequence("cramped")
    play(speculation, [sequence("x"), sequence("y")], 1, right=True)
    rows = rows_of([short, cramped])
    speculation.draft(rows, 4, lambda seq, count: min(count, 1) if seq is cramped else count)
    assert [len(row.draft) for row in rows] == [1, 1]  # one token was said of three: two more, the last one drawn
    assert all(row.kind is RowKind.VERIFY and row.num_known_tokens == 1 for row in rows)
    rows = rows_of([sequence("p"), sequence("q")])
    speculation.draft(rows, 3, lambda seq, count: count)
    assert sum(len(row.draft) for row in rows) == 3


def test_what_has_ended_is_forgotten() -> None:
    speculation, seq = Speculation(CONFIG, MAX_MODEL_LEN), sequence()
    play(speculation, [seq], 3, right=True)
    speculation.forget(seq)
    assert not speculation._tracks


# --- what looking for drafts takes ----------------------------------------------------------------------------


class Slow:
    """A proposer that takes its time, and is right or never is."""

    def __init__(self, clock: FakeClock, search_s: float) -> None:
        self._clock, self._search_s = clock, search_s
        self.is_right = True
        self.num_looks = 0

    def propose(self, tokens: Tokens[int], num_tokens: int) -> tuple[int, ...]:
        self.num_looks += 1
        self._clock.advance(self._search_s)
        return tuple(said_at(len(tokens) + number) if self.is_right else 7 for number in range(num_tokens))


def said_at(position: int) -> int:
    return 1 + position % 3


class Reader:
    """What takes in one sequence's tokens before it looks, a microsecond each."""

    def __init__(self, slow: Slow, clock: FakeClock) -> None:
        self._slow, self._clock, self._num_read = slow, clock, 0

    def propose(self, tokens: Tokens[int], num_tokens: int) -> tuple[int, ...]:
        num_new = min(len(tokens) - self._num_read, MAX_INDEXED)
        self._num_read += num_new
        self._clock.advance(num_new * 1e-6)
        return self._slow.propose(tokens, num_tokens) if self._num_read == len(tokens) else ()


class Looks:
    """Rows that say the same again and again, and what was looked for and fed for them."""

    def __init__(self, search_s: float, *, num_rows: int = 1, share: float = 0.01, num_repeats: int = 0) -> None:
        """`num_repeats`: of what they say, in the prompts, which are read then."""
        clock = FakeClock()
        self.slow, self._share = Slow(clock, search_s), share
        self.speculation = Speculation(
            CONFIG, 100_000, lambda seq: Reader(self.slow, clock) if num_repeats else self.slow, clock=clock
        )
        self._seqs = [sequence(f"r{number}", max_tokens=100_000) for number in range(num_rows)]
        for seq in self._seqs:
            seq.token_ids[:0] = [1, 2, 3] * num_repeats
            seq.num_prompt_tokens = seq.num_computed_tokens = seq.num_tokens - 1

    def step(self) -> tuple[int, int]:
        """Return how many looks there were, and how many drafted tokens."""
        rows, num_looks = rows_of(self._seqs), self.slow.num_looks
        self.speculation.costs.share = self._share
        self.speculation.draft(rows, 64, lambda seq, count: count)
        self.speculation.observe(Batch(rows), StepOutput([RowOutput(()) for _ in rows], STEP_S, 0))
        for row in rows:
            tokens = row.seq.token_ids
            for token in (*row.draft, -1):
                tokens.append(said_at(len(tokens)))
                if token != tokens[-1]:
                    break
            row.seq.num_computed_tokens = row.seq.num_tokens - 1
        return self.slow.num_looks - num_looks, sum(len(row.draft) for row in rows)

    def steps(self, count: int) -> tuple[list[int], list[int]]:
        numbers = [self.step() for _ in range(count)]
        return [looks for looks, _ in numbers], [drafted for _, drafted in numbers]


def test_no_draft_is_looked_for_in_a_step_that_has_none() -> None:
    counts, drafted = Looks(0.0).steps(200)
    assert counts[0] == 0 and 2 <= counts[10:].count(0) <= 4
    assert [bool(count) for count in counts] == [bool(count) for count in drafted]


def test_no_draft_is_looked_for_where_not_even_a_right_one_would_pay() -> None:
    assert not any(Looks(0.0, share=1.0).steps(20)[0])
    assert not any(Looks(0.0, share=0.3, num_rows=4).steps(20)[0])


@pytest.mark.parametrize("num_rows", [1, 8])
def test_looking_is_worth_its_time_or_takes_little_of_it(num_rows: int) -> None:
    search_s = 0.1 * STEP_S / num_rows
    looks = Looks(search_s, num_rows=num_rows)
    assert sum(looks.steps(100)[0]) > 90 * num_rows
    looks.slow.is_right = False
    looks.steps(100)
    counts, _ = looks.steps(1000)
    assert 0 < sum(counts) * search_s < 0.025 * 1000 * STEP_S
    looks.slow.is_right = True
    looks.steps(100)
    assert sum(looks.steps(100)[0]) > 90 * num_rows, "it is noticed"


def test_taking_in_long_prompts_is_no_search_for_drafts() -> None:
    looks = Looks(1e-6, num_rows=16, num_repeats=3 * MAX_INDEXED)
    looks.steps(20)
    assert sum(looks.steps(50)[1]) > 45 * 16


def test_looking_that_takes_longer_than_what_it_saves_is_seldom_done() -> None:
    search_s = 10 * STEP_S
    looks = Looks(search_s)
    looks.steps(100)
    assert 0 < sum(looks.steps(2000)[0]) * search_s < 0.025 * 2000 * STEP_S


# --- by a model -----------------------------------------------------------------------------------------------


def play_model(
    speculation: Speculation, num_rows: int, num_steps: int, *, num_right: int, depth_s: float, token_s: float = 0.0
) -> list[int]:
    """Run steps in which a draft model's first `num_right` tokens are right; how many each row has had drafted."""
    seqs = [sequence(f"r{number}", max_tokens=10_000) for number in range(num_rows)]
    lengths = []
    for _ in range(num_steps):
        rows = rows_of(seqs)
        speculation.draft(rows, 64, lambda seq, count: count)
        speculation.assign(rows)
        outputs = []
        for row in rows:
            assert set(row.draft) <= {UNDRAFTED}
            row.draft = tuple(range(len(row.draft)))
            said = [*row.draft[:num_right], 99]
            outputs.append(RowOutput((tuple(SampledToken(token) for token in said),)))
        depth, drafted = max(len(row.draft) for row in rows), sum(len(row.draft) for row in rows)
        step_s = STEP_S + depth * depth_s + drafted * token_s
        speculation.observe(Batch(rows), StepOutput(outputs, step_s, 0, draft_s=depth * depth_s))
        lengths.append(depth)
    return lengths


def by_model() -> Speculation:
    config = SpeculativeConfig(method="draft_model", model=Path("d"), num_speculative_tokens=5)
    return Speculation(config, 20_000, block_size=BLOCK)


def test_a_draft_model_that_is_cheap_and_right_drafts_all_it_may() -> None:
    assert play_model(by_model(), 1, 40, num_right=5, depth_s=0.1 * STEP_S)[-1] == 5
    assert play_model(by_model(), 4, 40, num_right=5, depth_s=0.1 * STEP_S)[-1] == 5


def test_one_that_takes_as_long_as_its_target_costs_next_to_nothing() -> None:
    lengths = play_model(by_model(), 1, 600, num_right=1, depth_s=STEP_S, token_s=0.05 * STEP_S)
    assert lengths[0] == 0 < lengths[1]
    later = lengths[100:]
    steps, tokens = sum(1 + 1.05 * length for length in later), sum(1 + min(1, length) for length in later)
    assert steps / tokens < 1.01


def test_one_that_is_always_wrong_is_seldom_tried() -> None:
    lengths = play_model(by_model(), 1, 1000, num_right=0, depth_s=0.1 * STEP_S)
    assert sum(lengths[:5]) > 0
    assert 0 < sum(lengths[200:]) < 0.05 * 800


# --- what comes of it -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_a_run_is_what_one_token_at_a_time_would_be(draft: list[int], drawn: list[int]) -> None:
    """`drawn[i]`: what the model says after i drafted tokens, if all of them were its own."""
    row = BatchRow(sequence(), 1 + len(draft), tuple(draft))
    tokens = [(SampledToken(token),) for token in drawn[: 1 + len(draft)]]
    [run] = verified_output(row, tokens).runs
    said = [token.token_id for token in run]
    assert said == drawn[: len(said)]
    assert said[:-1] == draft[: len(said) - 1]  # every token but the last was fed as it was said
    assert len(said) == 1 + len(draft) or said[-1] != draft[len(said) - 1]  # and it goes as far as that holds


def test_logits_that_are_no_distribution_end_a_run_and_no_answer_that_does_not_reach_them() -> None:
    row = BatchRow(sequence(), 3, (4, 5))
    good = (SampledToken(4),)
    assert verified_output(row, [good, (), ()]) == RowOutput((good,))
    assert not verified_output(row, [(), good, good]).is_finite


# --- in the scheduler -----------------------------------------------------------------------------------------


@pytest.fixture
def scheduler() -> DecodeScheduler:
    pool = BlockPool(8, BLOCK)
    speculation = Speculation(CONFIG, MAX_MODEL_LEN)
    return DecodeScheduler(pool, SPEC, max_num_batched_tokens=32, max_num_seqs=4, speculation=speculation)


def running(scheduler: DecodeScheduler, seq: Sequence) -> Sequence:
    seq.block_table = scheduler._pool.allocate(-(-seq.num_tokens // BLOCK))
    scheduler.adopt(seq)
    return seq


def step(scheduler: DecodeScheduler) -> Batch:
    batch = scheduler.schedule()
    assert batch is not None
    return batch


def complete(scheduler: DecodeScheduler, batch: Batch, said: list[int]) -> None:
    [row] = batch.rows
    run = tuple(SampledToken(token) for token in said)
    scheduler.observe(batch, StepOutput([RowOutput((run,))], STEP_S, batch.num_tokens))
    scheduler.complete(batch)
    row.seq.token_ids += said
    if len(said) > 1:
        scheduler.accept(row.seq, len(said) - 1)
    scheduler.check()
    scheduler._pool.check()


def test_rejected_tokens_are_neither_counted_nor_published(scheduler: DecodeScheduler) -> None:
    seq = running(scheduler, sequence())
    complete(scheduler, step(scheduler), [1])  # the time of a step without drafts
    batch = step(scheduler)
    [row] = batch.rows
    assert row.draft[:2] == (2, 3) and row.num_scheduled_tokens == 1 + len(row.draft)
    complete(scheduler, batch, [2, 99])  # the draft's first token was right
    assert seq.num_computed_tokens == 14 and seq.num_tokens == 15
    assert seq.num_published_blocks == 14 // BLOCK
    assert scheduler.draft_counters.accepted_tokens == 1
    assert scheduler.speculation is not None and scheduler.speculation._tracks
    scheduler.remove(seq)
    assert scheduler.is_quiet and not scheduler._pool.num_owned_blocks and not scheduler.speculation._tracks


def test_what_was_right_is_fed_again_where_layers_keep_states(scheduler: DecodeScheduler) -> None:
    assert scheduler.speculation is not None
    scheduler.speculation.keeps_states = True
    seq = running(scheduler, sequence())
    complete(scheduler, step(scheduler), [1])
    complete(scheduler, step(scheduler), [2, 3])  # the draft's first token was right
    assert seq.num_computed_tokens == 13 and seq.num_tokens == 15
    [row] = step(scheduler).rows
    assert row.draft and row.kind is RowKind.VERIFY and row.token_ids[:2] == [2, 3]
    assert row.num_known_tokens == 2 and row.samples


def test_what_is_fed_again_takes_no_more_than_a_step_has() -> None:
    pool, speculation = BlockPool(8, BLOCK), Speculation(CONFIG, MAX_MODEL_LEN, keeps_states=True)
    scheduler = DecodeScheduler(pool, SPEC, max_num_batched_tokens=4, max_num_seqs=4, speculation=speculation)
    for name in "ab":
        running(scheduler, sequence(name)).num_computed_tokens = 9
    for seq in scheduler.queues.running:
        seq.num_fed_again = 2
    batch = step(scheduler)
    assert [(row.seq.request_id, row.num_scheduled_tokens) for row in batch.rows] == [("a", 3)]
    complete(scheduler, batch, [1])
    assert [(row.seq.request_id, row.num_scheduled_tokens) for row in step(scheduler).rows] == [("a", 1), ("b", 3)]


def test_what_is_fed_again_and_fills_a_block_leaves_its_next_token_another(scheduler: DecodeScheduler) -> None:
    assert scheduler.speculation is not None
    scheduler.speculation.keeps_states = True
    seq = running(scheduler, sequence())
    complete(scheduler, step(scheduler), [1])
    taken = scheduler._pool.allocate(scheduler._pool.num_free_blocks - 2)
    complete(scheduler, step(scheduler), [2, 3, 1, 2])
    assert seq.num_computed_tokens + seq.num_fed_again == len(seq.block_table) * BLOCK
    batch = step(scheduler)
    assert batch.rows[0].end <= len(seq.block_table) * BLOCK
    scheduler._pool.free(taken)


def test_a_sequence_that_feeds_tokens_again_decodes_or_is_preempted(scheduler: DecodeScheduler) -> None:
    """Without a draft the row decodes all the same; with its blocks it loses what was to be fed again."""
    assert scheduler.speculation is not None
    scheduler.speculation.keeps_states = True
    seq = running(scheduler, sequence())
    complete(scheduler, step(scheduler), [1])
    complete(scheduler, step(scheduler), [2, 99])
    batch = step(scheduler)
    assert [(row.kind, row.num_scheduled_tokens) for row in batch.rows] == [(RowKind.DECODE, 2)]
    complete(scheduler, batch, [7])
    assert (seq.num_computed_tokens, seq.num_fed_again) == (15, 0)
    seq.num_fed_again = 1
    scheduler._preempt(seq)
    assert (seq.num_computed_tokens, seq.num_fed_again) == (0, 0)


def test_rows_without_a_draft_stand_before_those_with_one(scheduler: DecodeScheduler) -> None:
    drafting, plain = running(scheduler, sequence("drafting")), running(scheduler, sequence("plain"))
    plain.token_ids[:] = range(12)
    for names in (["drafting", "plain"], ["plain", "drafting"]):  # the first time tells what a step takes
        batch = step(scheduler)
        assert [row.seq.request_id for row in batch.rows] == names
        scheduler.observe(batch, StepOutput([RowOutput(())] * 2, STEP_S, batch.num_tokens))
        scheduler.complete(batch)
        for row in batch.rows:
            row.seq.token_ids.append(1 if row.seq is drafting else 50)


def test_a_step_has_no_draft_where_a_prompt_takes_all_of_its_tokens() -> None:
    scheduler = DecodeScheduler(
        BlockPool(32, BLOCK), SPEC, max_num_batched_tokens=12, max_num_seqs=4, speculation=Speculation(CONFIG, 200)
    )
    running(scheduler, sequence())
    complete(scheduler, step(scheduler), [1])
    scheduler.add(Sequence(RequestId("prompt"), 0, 0, list(range(40)), 40, SamplingParams(), arrival=1))
    batch = step(scheduler)
    assert [(row.kind, row.num_scheduled_tokens) for row in batch.rows] == [(RowKind.DECODE, 1), (RowKind.CHUNK, 11)]


def test_a_draft_takes_no_block_that_somebody_may_need(scheduler: DecodeScheduler) -> None:
    seq = running(scheduler, sequence())
    complete(scheduler, step(scheduler), [1])
    taken = scheduler._pool.allocate(scheduler._pool.num_free_blocks - 2)  # one for the next token, one for growth
    [row] = step(scheduler).rows
    assert row.end <= len(seq.block_table) * BLOCK
    assert scheduler._pool.num_free_blocks == 1
    scheduler._pool.free(taken)
