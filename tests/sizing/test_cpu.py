"""Step times of a CPU by the rates of each part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvferry.common.config import EngineConfig
from kvferry.sizing.cpu_rates import CpuRates
from kvferry.sizing.figures import Sizer
from kvferry.sizing.hardware import gpu_named, probed_cpu
from kvferry.sizing.shapes import shape_of
from kvferry.sizing.steps import StepWork
from kvferry.sizing.work import count_params, num_values

from .models import model_of

RATES = CpuRates(
    products=((1, 100e-12), (8, 120e-12), (64, 640e-12)),
    value_s=1e-9,
    score_s=1e-9,
    score_item_s=1e-11,
    cache_byte_s=1e-10,
    step_s=6e-4,
    layer_s=1.25e-5,  # of 32 layers 4e-4
)
ENGINE = EngineConfig(model_dir=Path("."), served_model_name="m", device="cpu", max_num_batched_tokens=512)


def test_a_product_takes_what_was_measured_for_as_many_rows() -> None:
    assert [RATES.product_s(rows) for rows in (0.5, 1, 4.5, 8, 36, 64, 128)] == pytest.approx(
        [50e-12, 100e-12, 110e-12, 120e-12, 380e-12, 640e-12, 1280e-12]
    )
    assert RATES.bytes_per_s == pytest.approx(20e9)
    assert RATES.flops_per_s == pytest.approx(0.2e12)
    assert RATES.check()


def test_a_step_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    model = model_of(tmp_path, "8b")
    params, values = count_params(model), num_values(model)
    sizer = Sizer(ENGINE, model, probed_cpu(64, RATES), 1000)
    cache = 8 * 1000 * 2 * 32 * 8 * 128 * 2
    rows = (params.layers + params.head) * 120e-12 + 8 * values * 1e-9 + cache * 1e-10 + 1e-3
    assert sizer.decode(8).expected_s == pytest.approx(rows, rel=1e-6)
    scores = 64 * 65 / 2 * 31 * 32 * (1e-9 + 128 * 1e-11)  # behind the last layer's keys there is one row
    assert params.last == 4096 * 4096 + 3 * 4096 * 14336
    prompt = (params.layers - params.last) * 640e-12 + (params.last + params.head) * 100e-12 + 64 * values * 1e-9
    prompt += scores + 1e-3
    assert sizer.prompt(64).expected_s == pytest.approx(prompt, rel=1e-6)
    assert sizer.decode(8).bound_s < sizer.decode(8).expected_s
    narrow = Sizer(ENGINE.model_copy(update={"kv_cache_dtype": "int8"}), model, probed_cpu(64, RATES), 1000)
    saved = cache * 1e-10 * (1 - 1.5 * (128 + 4) / 256)
    assert narrow.decode(8).expected_s == pytest.approx(rows - saved, rel=1e-6)
    first_s, more_s = sizer.steps.run(8, 8000)
    assert first_s + more_s == pytest.approx(sizer.steps.step_s(StepWork(decode_rows=8, decode_context=8008)))


def test_all_tokens_go_into_the_state_of_a_last_layer(tmp_path: Path) -> None:
    """What is behind it, rows that sample alone; the last layer that attends is not the last one, so all are scored."""
    kinds = ["full_attention", "linear_attention"]
    model = model_of(tmp_path, "states", num_hidden_layers=2, layer_types=kinds)
    assert count_params(model).last == 1024 * 16 * 128 + 3 * 1024 * 3584
    shape = shape_of(ENGINE, model, probed_cpu(64, RATES), 1000)
    assert shape.scores_per_pair == pytest.approx(8)


def test_torch_takes_all_tokens_through_the_last_layer(tmp_path: Path) -> None:
    model = model_of(tmp_path, "nano-30b-a3b")
    engine = ENGINE.model_copy(update={"dtype": "float32"})  # in which C++ has no experts
    shape = shape_of(engine, model, probed_cpu(64, RATES), 1000)
    assert shape.last_params == shape.last_experts == 0
    attending = sum(window is None for window in model.kv_windows)
    assert shape.scores_per_pair == pytest.approx(attending * 32)
    dense = model_of(tmp_path, "nano-9b")
    assert shape_of(ENGINE, dense, probed_cpu(64, RATES), 1000).last_params > 0
    assert shape_of(ENGINE.model_copy(update={"device": "cuda"}), dense, gpu_named("H100"), 1000).last_params == 0


def test_experts_are_multiplied_by_the_rows_that_chose_them(tmp_path: Path) -> None:
    model = model_of(tmp_path, "30b-a3b")
    sizer = Sizer(ENGINE, model, probed_cpu(64, RATES), 1000)
    params = count_params(model)
    alone = (params.layers + params.head + params.experts * 8 / 128) * 100e-12
    alone += num_values(model) * 1e-9 + 1000 * 2 * 48 * 4 * 128 * 2 * 1e-10 + 1e-3
    assert sizer.decode(1).expected_s == pytest.approx(alone, rel=1e-2)
    assert params.last_experts == params.experts / 48


@pytest.mark.parametrize(("byte_s", "token_s"), [(1e-9, 27 * 576 * 2 * 1e-9), (1e-11, 27 * 16 * (1e-9 + 544 * 1e-11))])
def test_a_latent_is_read_once_and_multiplied_for_all_heads(tmp_path: Path, byte_s: float, token_s: float) -> None:
    """Whichever takes longer; a prompt's products are over 576 numbers of a key and 512 of a value."""
    rates = replace(RATES, cache_byte_s=byte_s)
    sizer = Sizer(ENGINE, model_of(tmp_path, "v2-lite"), probed_cpu(64, rates), 1000)
    _, more_s = sizer.steps.run(8, 8000)
    assert more_s == pytest.approx(8 * token_s, rel=1e-6)
    pairs = StepWork(prefill_tokens=2, prefill_pairs=3), StepWork(prefill_tokens=2, prefill_pairs=1003)
    scores_s = sizer.steps.step_s(pairs[1]) - sizer.steps.step_s(pairs[0])
    assert scores_s == pytest.approx(1000 * 26 * 16 * (1e-9 + 544 * 1e-11), rel=1e-6)  # the last layer has none
