"""Products in 8-bit floats: what their numbers stand for, and a checkpoint's answers beside those of its plain twin."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from kvferry.common.request import SamplingParams
from kvferry.engine.cuda.float8 import Float8Weight, to_float8
from kvferry.engine.cuda.runner import CudaRunner
from kvferry.engine.engine import Engine

from ...engine_driver import Driver, engine_config, prompts
from ...quantized import write_pair

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]"),
]
gpu = [
    *on_gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper card"
    ),
]
# RMS of log-probabilities, of their range: rounding to three bits of mantissa moves one by some 2 % (RMS), and each
# product has one of its tokens; here also of its weights, whose scales are random.
CLOSE = 0.045


def test_a_row_is_scaled_to_the_largest_number() -> None:
    rows = torch.tensor([[1.0, -7.0, 0.5], [0.0, 0.0, 0.0], [3e38, 1.0, 0.0]])
    numbers, scales = to_float8(rows)
    assert numbers.float()[:, :2].tolist() == [[64.0, -448.0], [0.0, 0.0], [448.0, 0.0]]
    assert bool(numbers.float().isfinite().all())
    torch.testing.assert_close((numbers.float() * scales)[0], rows[0], rtol=2**-4, atol=0)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_a_checkpoints_own_numbers_are_found_again(device: str, has_bias: bool) -> None:
    """Where each output has a scale by its largest weight, as those have that compressors write."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(48, 64, generator=generator).mul_(100).clamp_(-448, 448)
    numbers[torch.arange(48), torch.randint(0, 64, (48,), generator=generator)] = 448.0
    stored, scales = numbers.to(torch.float8_e4m3fn).float(), torch.rand(48, 1, generator=generator) * 1e-2
    plain = (stored * scales).bfloat16()
    weight = Float8Weight(plain.to(device))
    assert torch.equal(weight._numbers.cpu().float(), stored)
    x = torch.randn(5, 64, generator=generator).bfloat16()
    bias = torch.randn(48, generator=generator).bfloat16() if has_bias else None
    found = weight.product(x.to(device), None if bias is None else bias.to(device)).cpu().float()
    rounded, factors = to_float8(x)
    expected = (rounded.float() * factors) @ plain.float().t() + (0 if bias is None else bias.float())
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("format_name", ["compressed fp8 channel", "compressed fp8 tensor", "fp8 block"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_a_checkpoint_in_8_bits_answers_as_its_plain_twin(tmp_path: Path, format_name: str, device: str) -> None:
    narrow, plain = write_pair(tmp_path, format_name)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=8)
    found = []
    for path, fields in ((narrow, {"device": device, "dtype": "bfloat16"}), (plain, {"dtype": "float32"})):
        engine = Engine(engine_config(path, max_num_seqs=8, max_model_len=512, **fields), num_blocks=64)
        driver = Driver(engine)
        driver.step([(driver.add(prompts([60], 250)[0], sampling), 60)])
        found.append([entry.logprob or 0.0 for entry in driver.outputs[0].rows[0].prompt_logprobs])
        if device == fields.get("device"):
            assert isinstance(engine.runner, CudaRunner)
            weights = [linear.weight for linear in engine.runner._decoder.plain.linears()]
            # One of two layers' gate is plain in the last format, so what it is fused with stays plain too.
            assert sum(isinstance(weight, Float8Weight) for weight in weights) == 8 - (format_name == "fp8 block")
    ours, theirs = (torch.tensor(each) for each in found)
    distance = (ours - theirs).square().mean().sqrt() / (theirs.max() - theirs.min())
    assert 0 < float(distance) < CLOSE
