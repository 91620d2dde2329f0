from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.benchmarks.shared.reference import Answer, answer_gaps, gaps_by_engine
from kvferry.benchmarks.shared.shapes import write_checkpoint

from ...engine_driver import Driver, make_engine


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "small", "llama-tiny", 256)


def test_greedy_answer_in_float32_has_no_gap_by_either_reference(model_dir: Path) -> None:
    driver = Driver(make_engine(model_dir, dtype="float32"))
    prompts = [[7], [3, 1, 4, 1, 5, 9, 2, 6] * 5]
    answers = [
        Answer(tuple(prompt), tuple(tokens))
        for prompt, tokens in zip(prompts, driver.generate([driver.add(prompt) for prompt in prompts]), strict=True)
    ]
    gaps, by = answer_gaps(model_dir, answers, num_threads=1)
    assert by == "transformers in float32"
    for found in (gaps, gaps_by_engine(model_dir, answers, num_threads=1)):
        assert [len(answer) for answer in found] == [8, 8]
        assert max(gap for answer in found for gap in answer) < 1e-4


def test_wrong_token_has_the_same_large_gap_by_both_references(model_dir: Path) -> None:
    wrong = [Answer((5, 6, 7), (8, 9, 10))]
    (expected,), _ = answer_gaps(model_dir, wrong, num_threads=1)
    (found,) = gaps_by_engine(model_dir, wrong, num_threads=1)
    assert found == pytest.approx(expected, abs=1e-3)
    assert min(found) > 1
