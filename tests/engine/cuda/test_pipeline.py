"""Decode steps that are prepared ahead: the same tokens as the engine's, whatever comes and goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.common.request import SamplingParams
from kvferry.engine.engine import Engine

from ...checkpoints import put_nan, write_checkpoint
from ...engine_driver import GREEDY, Driver, make_engine, prompts
from .emulation import MAX_ROWS, LookingAhead

RANDOM = SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.3, top_p=0.95, seed=7, logprobs=2)
PENALIZED = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, frequency_penalty=0.7, min_tokens=8)
LONG = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), tokenizer=False)


def _generate(engine: Engine, sampling: list[SamplingParams]) -> list[list[int]]:
    """Prompts of unlike lengths, so that their answers begin new blocks at different steps."""
    driver = Driver(engine)
    lengths = [5, 16, 31, 33, 64, 14, 40, 9][: len(sampling)]
    return driver.generate([driver.add(p, s) for p, s in zip(prompts(lengths), sampling, strict=True)])


@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("sampling", [LONG, RANDOM], ids=["greedy", "random"])
def test_tokens_are_the_engines_and_steps_run_as_foretold(
    model_dir: Path, num_rows: int, sampling: SamplingParams
) -> None:
    engine = LookingAhead(model_dir)
    assert _generate(engine, [sampling] * num_rows) == _generate(make_engine(model_dir), [sampling] * num_rows)
    assert (engine.pipeline.num_steps, engine.pipeline.num_forecasts) == (23, 22)


def test_answers_that_end_by_length_leave_without_a_step_prepared_in_vain(model_dir: Path) -> None:
    sampling = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (24, 3, 9, 24, 2)]
    engine = LookingAhead(model_dir)
    assert _generate(engine, sampling) == _generate(make_engine(model_dir), sampling)
    assert (engine.pipeline.num_steps, engine.pipeline.num_forecasts) == (23, 22)
    assert {rows for _, rows in engine.device.sizes_run} == {5, 4, 3, 2}


@pytest.mark.parametrize("sampling", [LONG, RANDOM, PENALIZED], ids=["greedy", "random", "penalized"])
def test_what_is_right_of_a_draft_is_what_comes_one_by_one(model_dir: Path, sampling: SamplingParams) -> None:
    other = Driver(make_engine(model_dir))
    expected = other.generate([other.add(prompt, sampling) for prompt in prompts([5, 15, 31])])
    engine = LookingAhead(model_dir)
    driver = Driver(engine)
    seqs = [driver.add(prompt, sampling) for prompt in prompts([5, 15, 31])]
    driver.step([(seq, seq.num_tokens) for seq in seqs])
    for num_right, is_wrong in ((2, False), (0, True), (1, True), (0, False), (2, False)):
        rows = [(seq, answer[seq.num_output_tokens :][:num_right]) for seq, answer in zip(seqs, expected, strict=True)]
        rows = [
            (seq, [*draft, (answer[0] + 1) % 512] if is_wrong else draft)
            for (seq, draft), answer in zip(rows, expected, strict=True)
        ]
        rows[0] = (rows[0][0], [])  # one beside them has none
        counts = [len(run) for run in driver.verify(rows)]
        assert counts[0] == 1 and all(count >= 1 + num_right for count in counts[1:])
        assert (engine.pipeline._forecast is None) is any(draft for _, draft in rows)
    for _ in range(3):
        driver.step([(seq, 1) for seq in seqs])
    assert engine.pipeline.num_steps == 8 and engine.pipeline.num_forecasts >= 2
    for seq, answer in zip(seqs, expected, strict=True):
        assert seq.output_token_ids == answer[: seq.num_output_tokens]
    assert driver.step([(seqs[1], 1)])[0]


def _with_comings_and_goings(engine: Engine) -> list[list[int]]:
    """Joins, a chunk beside decode rows, an early end, a table moved to other blocks."""
    driver = Driver(engine)
    first, second, third = (driver.add(p, LONG) for p in prompts([15, 30, 12]))
    driver.step([(first, 15)])
    for _ in range(3):
        driver.step([(first, 1)])
    driver.step([(first, 1), (second, 30)])
    for _ in range(2):
        driver.step([(first, 1), (second, 1)])
    driver.step([(third, 12)])  # the others wait
    driver.step([(first, 1), (second, 1), (third, 1)])
    driver.step([(first, 1), (third, 1)])  # the second one leaves
    moved = [driver._free.pop() for _ in first.block_table]
    for source, target in zip(first.block_table, moved, strict=True):
        engine.kv_pages[:, target] = engine.kv_pages[:, source]
        engine.kv_pages[:, source] = 0
    first.block_table = moved
    for _ in range(4):
        driver.step([(first, 1), (third, 1)])
    driver.step([(second, 1), (third, 1)])
    return [seq.output_token_ids for seq in (first, second, third)]


def test_what_was_not_foretold_is_prepared_anew(model_dir: Path) -> None:
    engine = LookingAhead(model_dir)
    assert _with_comings_and_goings(engine) == _with_comings_and_goings(make_engine(model_dir))
    assert 0 < engine.pipeline.num_forecasts < engine.pipeline.num_steps


def test_blocks_are_copied_before_the_step(model_dir: Path) -> None:
    def fork(engine: Engine) -> tuple[int, int]:
        driver = Driver(engine)
        first = driver.add(prompts([21])[0])
        driver.step([(first, 21)])
        forked = driver.step_fork(first)
        driver.step([(first, 1)])
        return forked, first.token_ids[22]

    child_token, parent_token = fork(LookingAhead(model_dir))
    assert child_token == parent_token == fork(make_engine(model_dir))[0]


def test_every_pending_choice_gets_its_token_and_nothing_is_foretold_of_it(model_dir: Path) -> None:
    def last_prompt_token(engine: Engine) -> list[int]:
        driver = Driver(engine)
        seq = driver.add(prompts([12])[0], SamplingParams(temperature=5.0, seed=3))
        seq.samples = False
        driver.step([(seq, 11)])
        seq.samples, seq.pending_choices = True, (0, 1, 4)
        ((*tokens,),) = driver.step([(seq, 1)])
        return [token.token_id for token in tokens]

    engine = LookingAhead(model_dir)
    tokens = last_prompt_token(engine)
    assert len(tokens) == 3 and tokens == last_prompt_token(make_engine(model_dir))
    assert engine.pipeline.num_steps == 1 and engine.pipeline._forecast is None


def test_layers_are_told_of_and_rows_without_a_sample_yield_nothing(model_dir: Path) -> None:
    engine = LookingAhead(model_dir)
    driver = Driver(engine)
    silent, seq = (driver.add(p) for p in prompts([12, 12]))
    silent.samples = False
    layers: list[int] = []
    driver.step([(silent, 10), (seq, 12)])
    tokens = driver.step([(silent, 1), (seq, 1)], layers.append)
    assert layers == [0, 1] and tokens[0] == () and len(tokens[1]) == 1
    assert engine.pipeline.num_steps == 1


def test_too_many_rows_and_chunks_are_left_to_the_engine(model_dir: Path) -> None:
    engine = LookingAhead(model_dir)
    answers = Driver(engine)
    seqs = [answers.add(prompt) for prompt in prompts([6] * (MAX_ROWS + 1))]
    expected = Driver(make_engine(model_dir))
    assert answers.generate(seqs) == expected.generate([expected.add(seq.token_ids[:6], GREEDY) for seq in seqs])
    assert engine.pipeline.num_steps == 0


def test_a_row_whose_logits_are_no_distribution_leaves_and_the_others_go_on(tmp_path: Path) -> None:
    broken = put_nan(write_checkpoint(tmp_path, tokenizer=False), "model.embed_tokens.weight", 500)
    engine = LookingAhead(broken)
    driver = Driver(engine)
    first, bad, second = (driver.add(prompt, RANDOM) for prompt in prompts([5, 16, 31], 480))
    for seq in (first, bad, second):
        driver.step([(seq, seq.num_tokens)])
    bad.token_ids[-1] = 500
    steps = [driver.step([(seq, 1) for seq in seqs]) for seqs in ((first, bad, second), (first, second))]
    assert [[bool(tokens) for tokens in step] for step in steps] == [[True, False, True], [True, True]]
    assert not driver.outputs[-2].rows[1].is_finite
    other = Driver(make_engine(broken))
    alone = other.generate([other.add(prompt, RANDOM) for prompt in prompts([5, 16, 31], 480)[::2]])
    assert [first.output_token_ids, second.output_token_ids] == [tokens[:3] for tokens in alone]
