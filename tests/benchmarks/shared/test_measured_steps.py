import pytest

from kvferry.benchmarks.shared.measured_steps import fit_steps
from kvferry.common.errors import ConfigError
from kvferry.sizing.steps import StepWork
from kvferry.wire.workers import StepSample


def _prompt(tokens: int, context: int = 0) -> StepSample:
    pairs = tokens * (context + tokens // 2)
    return StepSample(0.002 + 0.0005 * tokens + 1e-8 * pairs, tokens, pairs)


def _decode(rows: int, context: int, bend: float = 1.0) -> StepSample:
    return StepSample((0.004 + 0.001 * rows + 1e-6 * context) * bend, 0, 0, rows, context)


PROMPTS = [_prompt(tokens, context) for tokens in (16, 64, 200, 512) for context in (0, 500, 3000)] * 4
DECODES = [_decode(rows, rows * each) for rows in (1, 2, 4, 8, 16) for each in (50, 400, 2000)] * 4


def test_steps_come_out_as_they_were_measured() -> None:
    steps = fit_steps([*PROMPTS, *DECODES])
    assert steps.step_s(StepWork(256, 256 * 128)) == pytest.approx(_prompt(256).step_s, rel=0.03)
    assert steps.step_s(StepWork(0, 0, 6, 3000)) == pytest.approx(_decode(6, 3000).step_s, rel=0.03)
    assert steps.noise < 0.02


def test_a_run_of_steps_begins_with_a_step_and_grows_by_its_rows() -> None:
    steps = fit_steps([*PROMPTS, *DECODES])
    first_s, slope_s = steps.run(4, 1000)
    assert first_s == pytest.approx(steps.step_s(StepWork(0, 0, 4, 1000)))
    assert first_s + slope_s == pytest.approx(steps.step_s(StepWork(0, 0, 4, 1004)))


def test_what_bends_is_kept_by_octave() -> None:
    bent = [_decode(rows, 100 * rows, 1.3 if rows >= 8 else 1.0) for rows in range(1, 17)] * 8
    steps = fit_steps([*PROMPTS, *bent])
    for rows in (2, 10):
        expected = _decode(rows, 100 * rows, 1.3 if rows >= 8 else 1.0).step_s
        assert steps.step_s(StepWork(0, 0, rows, 100 * rows)) == pytest.approx(expected, rel=0.06)


def test_the_calibration_is_left_out_where_enough_was_seen() -> None:
    slow = [StepSample(sample.step_s * 2, *list(_fields(sample))) for sample in (*PROMPTS, *DECODES)]
    assert fit_steps([*PROMPTS, *DECODES], slow).decodes.num_samples == len(DECODES)
    assert fit_steps([*PROMPTS, *DECODES[:10]], slow).decodes.num_samples == 10 + len(DECODES)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 samples of decode steps"):
        fit_steps([*PROMPTS, *DECODES[:2]])


def _fields(sample: StepSample) -> tuple[int, int, int, int]:
    return sample.prefill_tokens, sample.prefill_pairs, sample.decode_rows, sample.decode_context
