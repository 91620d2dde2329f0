"""Products of whole numbers of 8 bits with a scale for each output: of few rows, of many, and checkpoints' answers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from kvferry.engine.cuda import int8
from kvferry.engine.cuda.int8 import Int8Weight, takes, to_int8
from kvferry.engine.cuda.runner import CudaRunner
from kvferry.engine.engine import Engine
from kvferry.engine.weights.grouped import GroupedWeight, has_triton
from kvferry.models.quantization import CARD_ROWS
from kvferry.models.storage import Form

from ...checkpoints import write_checkpoint
from ...engine_driver import Driver, engine_config, prompt_logprobs, prompts
from ...quantized import SHAPE, write_pair
from .lockstep import two_ranks

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs a newer card"
    ),
    pytest.mark.skipif(torch.cuda.is_available() and not has_triton(), reason="needs Triton"),
]
cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
CLOSE = 2e-2  # RMS of log-probabilities, of their range: a row's numbers are rounded to a 254th of its largest


def _weight(num_outputs: int = 48, num_inputs: int = 256) -> GroupedWeight:
    matrix = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(num_inputs))
    return GroupedWeight.quantized(matrix, Form(8, num_inputs, has_minima=False), dtype=torch.bfloat16)


def _on(device: str, weight: GroupedWeight) -> Int8Weight:
    return Int8Weight(GroupedWeight(weight.numbers.to(device), weight.scales.to(device), dtype=weight.dtype))


def test_a_row_is_scaled_to_the_largest_number() -> None:
    rows = torch.tensor([[1.0, -6.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [3e38, 1.0, 0.0, -3e38]]).bfloat16()
    numbers, scales = to_int8(rows)
    assert numbers.tolist() == [[21, -127, 11, 0], [0, 0, 0, 0], [127, 0, 0, -127]]
    assert scales[1] == 0 and scales[0] == pytest.approx(6 / 127)


@cuda
@pytest.mark.parametrize("num_rows", [0, 1, 5, CARD_ROWS, CARD_ROWS + 1, 300])
def test_a_product_is_that_of_the_numbers(num_rows: int, device: str) -> None:
    grouped = _weight()
    plain, weight = grouped.dequantized(), _on(device, grouped)
    x, bias = (torch.randn(*size).bfloat16() for size in ((num_rows, 256), (48,)))
    numbers, scales = to_int8(x)
    rows = x.float() if num_rows <= CARD_ROWS else numbers.float() * scales
    for each in (None, bias):
        found = weight.product(x.to(device), None if each is None else each.to(device)).cpu()
        expected = rows @ plain.T + (0 if each is None else each.float())
        assert found.shape == expected.shape and found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=2e-2)


@cuda
def test_parts_of_many_rows_are_multiplied_one_after_another(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has as many as CUDA's product takes, the last one too; sums are exact, so nothing depends on the parts."""
    weight, x = _on(device, _weight()), torch.randn(2 * CARD_ROWS + 3, 256).bfloat16().to(device)
    whole = weight.product(x, None).cpu()
    monkeypatch.setattr(int8, "_SUMS", CARD_ROWS * 48)
    monkeypatch.setattr(int8, "_ROWS", 50)
    assert torch.equal(weight.product(x, None).cpu(), whole)


@cuda
def test_what_is_not_finite_reaches_its_row_alone(device: str) -> None:
    weight, x = _on(device, _weight()), torch.randn(CARD_ROWS + 5, 256)
    x[3, 7], x[9, 200], x[11] = float("nan"), float("inf"), 0.0
    found = weight.product(x.bfloat16().to(device), None).cpu()
    is_finite = found.isfinite()
    assert not bool(is_finite[3].any()) and not bool(is_finite[9].any())
    assert bool(is_finite[[row for row in range(len(x)) if row not in (3, 9)]].all()) and not bool(found[11].any())


def test_scales_of_whole_outputs_without_minima_are_taken() -> None:
    matrix = torch.randn(48, 64)

    def made(**fields: object) -> GroupedWeight:
        form = Form(8, 64, has_minima=False)._replace(**fields)  # type: ignore[arg-type]
        return GroupedWeight.quantized(matrix, form, dtype=torch.bfloat16)

    assert takes(made())
    assert not any(takes(other) for other in (made(bits=4), made(group_size=32), made(has_minima=True)))
    assert not takes(made().narrow(0, 0, 44)), "outputs are no multiple of 8"


# --- engines --------------------------------------------------------------------------------------------------------


def _engine(path: Path, **fields: object) -> Engine:
    defaults = {"device": "cuda", "dtype": "bfloat16", "max_num_seqs": 8, "max_model_len": 512, "enforce_eager": True}
    return Engine(engine_config(path, **(defaults | fields)), num_blocks=64)


def _logprobs(engine: Engine, num_tokens: int) -> Tensor:
    return prompt_logprobs(engine, prompts([num_tokens], 250)[0])


def _rms(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).square().mean().sqrt() / (theirs.max() - theirs.min()))


@cuda
@pytest.mark.parametrize("num_tokens", [40, 200])
def test_a_checkpoint_answers_as_its_plain_twin(tmp_path: Path, num_tokens: int, device: str) -> None:
    stored, plain = write_pair(tmp_path, "compressed int8 channel")
    with capture_logs() as logs:
        engine = _engine(stored)
    assert isinstance(engine.runner, CudaRunner)
    weights = [linear.weight for linear in engine.runner._decoder.plain.linears()]
    assert sum(isinstance(weight, Int8Weight) for weight in weights) == 8
    assert [entry for entry in logs if entry["event"] == "quantized_weights"] == [
        {"event": "quantized_weights", "log_level": "info", "int8": 8}
    ]
    expected = _logprobs(_engine(plain, device="cpu", dtype="float32"), num_tokens)
    assert 0 < _rms(_logprobs(engine, num_tokens), expected) < CLOSE


@cuda
def test_weights_rounded_at_load_answer_in_graphs_as_outside_of_them(tmp_path: Path, device: str) -> None:
    path, answers = write_checkpoint(tmp_path, tokenizer=False, shape=SHAPE), []
    for is_eager in (False, True):
        driver = Driver(_engine(path, quantization="int8", enforce_eager=is_eager))
        answers.append(driver.generate([driver.add(prompt) for prompt in prompts([5, 16, 151], 250)]))
    assert answers[0] == answers[1]


@cuda
def test_two_ranks_answer_as_one(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path, tokenizer=False, shape=SHAPE)
    fields = {"device": "cuda", "dtype": "bfloat16", "quantization": "int8", "max_model_len": 512}
    alone = _logprobs(_engine(path, quantization="int8"), 200)
    config = engine_config(path, **fields, max_num_seqs=8, enforce_eager=True, tensor_parallel_size=2)
    with two_ranks(monkeypatch, config, 64) as engine:
        assert _rms(_logprobs(engine, 200), alone) < CLOSE
