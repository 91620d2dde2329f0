"""Step-time models: what they add up to, and what is fitted from a worker's samples."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from kvferry.common.errors import ConfigError
from kvferry.simulator.costs.measured import fit, read_samples
from kvferry.sizing.hardware import GPUS, gpu_named
from kvferry.sizing.shapes import MODELS, model_named
from kvferry.sizing.steps import Linear, Roofline, StepModel, StepWork
from kvferry.wire.workers import StepSample

TRUTH = Linear(0.002, 0.001, 1e-4, 2e-9, 3e-4, 5e-8)


def _samples(model: StepModel, count: int = 300, noise: float = 0.0) -> list[StepSample]:
    random = Random(1)
    samples = []
    for number in range(count):
        rows = random.randrange(0, 32) if number % 3 else 0
        tokens = random.randrange(2, 512) if not rows or number % 2 else 0
        work = StepWork(tokens, tokens * random.randrange(0, 4096), rows, rows * random.randrange(1, 2048))
        step_s = model.step_s(work) * (1 + noise * random.gauss(0, 1))
        samples.append(StepSample(step_s, tokens, work.prefill_pairs, rows, work.decode_context))
    return samples


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("model", MODELS)
def test_every_pair_of_hardware_and_model_fits_or_says_that_it_does_not(gpu: str, model: str) -> None:
    shape = model_named(model)
    try:
        steps = Roofline(gpu_named(gpu), shape, 8)
    except ConfigError as error:
        assert "weights" in str(error) and shape.total_bytes > 8 * (0.9 * gpu_named(gpu).memory_gb - 4) * 1e9
        return
    assert steps.num_blocks(64) > 100
    assert 0.001 < steps.step_s(StepWork(0, 0, 1, 1024)) < 0.1


@pytest.mark.parametrize(
    "model", [Roofline(gpu_named("H100"), model_named("8B"), 1), TRUTH], ids=["roofline", "linear"]
)
def test_a_run_of_decode_steps_takes_what_its_steps_take(model: StepModel) -> None:
    rows, context = 7, 9000
    first_s, slope_s = model.run(rows, context)
    for number in (0, 1, 50):
        step_s = model.step_s(StepWork(0, 0, rows, context + number * rows))
        assert first_s + number * slope_s == pytest.approx(step_s)


def test_a_prompt_beside_decode_rows_shares_their_read_of_the_weights() -> None:
    steps = Roofline(gpu_named("H100"), model_named("70B"), 4)
    rows, prompt = StepWork(0, 0, 16, 16000), StepWork(64, 64 * 32)
    both = StepWork(64, 64 * 32, 16, 16000)
    assert (
        max(steps.step_s(rows), steps.step_s(prompt)) < steps.step_s(both) < steps.step_s(rows) + steps.step_s(prompt)
    )


def test_few_tokens_of_a_mixture_of_experts_read_few_of_its_weights() -> None:
    model = model_named("deepseek-v3")
    assert model.bytes_read(1) < 0.1 * model.total_bytes
    assert model.bytes_read(256) > 0.95 * model.total_bytes
    assert model.kv_bytes_per_token == 70_272


def test_rows_whose_experts_are_on_other_gpus_pay_for_the_way() -> None:
    steps = Roofline(gpu_named("H100"), model_named("deepseek-v3"), 64)
    rows = StepWork(decode_rows=64 * 128, decode_context=64 * 128 * 1000)
    assert steps.terms(rows).exchange == pytest.approx(58 * 487e-6)
    assert steps.step_s(rows) == pytest.approx(steps.terms(rows).total_s)
    assert steps.terms(StepWork(8192, 8192 * 4096)).exchange == 0  # a prompt's is in its share of the peak


def test_drafts_read_keys_again_up_to_what_launches_cost() -> None:
    steps = Roofline(gpu_named("H100"), model_named("8B"), 1)
    once = steps.terms(StepWork(0, 0, 2, 2000)).cache
    assert steps.terms(StepWork(0, 0, 2, 2000, draft_tokens=3)).cache == pytest.approx(2.5 * once)
    long, drafted = (StepWork(0, 0, 2, 200_000, draft_tokens=count) for count in (0, 8))
    assert steps.terms(drafted).cache - steps.terms(long).cache == pytest.approx(1.5e-3)
    assert steps.step_s(drafted) == pytest.approx(steps.terms(drafted).total_s)


def test_long_prompts_cost_attention_beside_their_products() -> None:
    steps = Roofline(gpu_named("H100"), model_named("70B"), 4)
    near, far = StepWork(8192, 8192 * 4096), StepWork(8192, 8192 * 100_000)
    assert steps.step_s(far) > 1.5 * steps.step_s(near)


def test_a_fit_finds_the_prices_that_the_samples_were_made_from() -> None:
    model = fit(_samples(TRUTH))
    for work in (StepWork(300, 60_000), StepWork(0, 0, 8, 8000), StepWork(100, 10_000, 4, 2000)):
        assert model.step_s(work) == pytest.approx(TRUTH.step_s(work), rel=1e-3)
    assert model.noise < 1e-3


def test_a_fit_tells_noise_and_passes_over_steps_that_something_else_has_stretched() -> None:
    samples = _samples(TRUTH, noise=0.05)
    samples[::20] = [StepSample(20 * s.step_s, *s_rest(s)) for s in samples[::20]]
    model = fit(samples)
    assert model.noise == pytest.approx(0.05, rel=0.5)
    work = StepWork(0, 0, 16, 16000)
    assert model.step_s(work) == pytest.approx(TRUTH.step_s(work), rel=0.1)
    assert fit(samples, noise=False).noise == 0.0


def s_rest(sample: StepSample) -> tuple[int, int, int, int]:
    return sample.prefill_tokens, sample.prefill_pairs, sample.decode_rows, sample.decode_context


def test_no_price_is_negative() -> None:
    shrinking = [StepSample(0.01 - 1e-5 * rows, 0, 0, rows, 100 * rows) for rows in range(1, 60)]
    assert min(fit(shrinking).per_row, fit(shrinking).per_context) >= 0


def test_samples_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({"samples": [[0.01, 16, 128, 0, 0], [0.02, 0, 0, 4, 100]]}))
    assert read_samples(path) == [StepSample(0.01, 16, 128), StepSample(0.02, 0, 0, 4, 100)]
    with pytest.raises(ConfigError, match="too few"):
        fit(read_samples(path))
    with pytest.raises(ConfigError, match=r"^0 samples of steps are too few"):
        fit([StepSample(1e-320 * number, 16, 128) for number in range(40)])
    path.write_text("{}")
    with pytest.raises(ConfigError, match="samples"):
        read_samples(path)


def test_unknown_names_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match="H100"):
        gpu_named("abacus")
    with pytest.raises(ConfigError, match="deepseek-v3"):
        model_named("none")
