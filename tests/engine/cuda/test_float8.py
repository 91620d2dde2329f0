"""Products in 8-bit floats: what their numbers stand for, and a checkpoint's answers beside those of its plain twin."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvferry.common.errors import ConfigError
from kvferry.common.request import SamplingParams
from kvferry.engine.cuda.float8 import Float8Weight
from kvferry.engine.cuda.runner import CudaRunner
from kvferry.engine.engine import Engine
from kvferry.engine.nn.decoder import Decoder
from kvferry.engine.nn.layers import ColumnParallelLinear, Linear
from kvferry.engine.nn.loading import load_weights
from kvferry.engine.ranks.communicator import Communicator
from kvferry.engine.weights.float8 import RoundedRows, RoundedWeight, to_float8
from kvferry.engine.weights.grouped import GroupedWeight
from kvferry.engine.weights.weight import PIECE_ROWS, DenseWeight
from kvferry.models.config import ModelConfig
from kvferry.models.quantization import quantized_at_load
from kvferry.sizing.memory import rank_weights

from ...checkpoint_shapes import QWEN3_MOE, write_by_shapes
from ...checkpoints import write_checkpoint
from ...engine_driver import Driver, engine_config, prompts
from ...quantized import SHAPE, write_pair

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
    weight = Float8Weight(*to_float8(plain.to(device)), plain.dtype)
    assert torch.equal(weight.numbers.cpu().float(), stored)
    x = torch.randn(5, 64, generator=generator).bfloat16()
    bias = torch.randn(48, generator=generator).bfloat16() if has_bias else None
    found = weight.product(x.to(device), None if bias is None else bias.to(device)).cpu().float()
    rounded, factors = to_float8(x)
    expected = (rounded.float() * factors) @ plain.float().t() + (0 if bias is None else bias.float())
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("format_name", ["compressed fp8 channel", "compressed fp8 tensor"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_a_checkpoint_in_8_bits_answers_as_its_plain_twin(tmp_path: Path, format_name: str, device: str) -> None:
    narrow, plain = write_pair(tmp_path, format_name)
    engine = _engine(narrow, device=device)
    assert _num_narrow(engine) == 8
    assert 0 < _distance(_logprobs(engine), _logprobs(_engine(plain, device="cpu", dtype="float32"))) < CLOSE


@pytest.mark.parametrize("format_name", ["compressed fp8 channel", "compressed fp8 tensor", "modelopt fp8 tensor"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_a_checkpoints_own_numbers_are_multiplied_by(tmp_path: Path, format_name: str, device: str) -> None:
    """Whatever the largest of an output is: with one scale for all outputs it is seldom 448."""
    narrow, plain = write_pair(tmp_path, format_name)
    tensors, weights = load_file(plain / "model.safetensors"), {}
    for linear in _linears(_engine(narrow, device=device)):
        if isinstance(linear.weight, Float8Weight):
            weights[linear.name] = linear.weight
            meant = linear.weight.numbers.float() * linear.weight.scales.view(-1, 1)
            assert torch.equal(meant.cpu(), _Reference(linear, tensors, "cpu")._matrix)
    assert weights


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_a_checkpoint_in_8_bits_never_takes_a_plain_ones_room(tmp_path: Path, device: str) -> None:
    """A model whose plain weights the memory does not hold is loaded, in what `kvferry size` counts."""
    path, _ = write_pair(tmp_path, "compressed fp8 channel")
    config = ModelConfig.from_dir(path)
    decoder = Decoder(config, Communicator(), dtype=torch.bfloat16, device=torch.device(device))
    load_weights(decoder, path, load_format="auto", seed=0)
    weights = [linear.weight for linear in decoder.linears()]
    rounded = [weight for weight in weights if isinstance(weight, RoundedWeight)]
    assert len(rounded) == 8
    taken = sum(slot.target.nbytes for slot in decoder.slots()) + sum(weight.scales.nbytes for weight in rounded)
    engine = engine_config(path, device=device, dtype="bfloat16")
    assert taken == rank_weights(engine, config, has_float8=True).total


# --- rounded while they are loaded -----------------------------------------------------------------------------------


def _rounded_twin(path: Path, twin: Path) -> Path:
    """Write a checkpoint of the numbers that a plain one's are rounded to, each output by its largest, in float32."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            scales = tensor.abs().amax(1, keepdim=True).float() / 448
            tensors[name] = (tensor.float() / scales).to(torch.float8_e4m3fn).float() * scales
        else:
            tensors[name] = tensor.float()
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    return twin


class _Reference:
    """Multiplies in float32, by a matrix of a rounded twin and by each token's inputs in 8 bits."""

    def __init__(self, linear: Linear, tensors: dict[str, Tensor], device: str) -> None:
        names = (
            [share.part.name for share in linear.shares] if isinstance(linear, ColumnParallelLinear) else [linear.name]
        )
        self._matrix = torch.cat([tensors[f"{name}.weight"] for name in names]).to(device)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        scales = x.double().abs().amax(1, keepdim=True) / 448
        rounded = (x.double() / scales).float().to(torch.float8_e4m3fn).double() * scales
        return torch.nn.functional.linear(rounded.float(), self._matrix).to(x.dtype)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_a_plain_checkpoint_answers_as_its_rounded_numbers(tmp_path: Path, device: str) -> None:
    """Beside all of it in float32, and beside products in float32 by inputs that are rounded as well."""
    path, other = (write_checkpoint(tmp_path / name, tokenizer=False, shape=SHAPE) for name in ("plain", "twin"))
    twin = _rounded_twin(path, other)
    engine = _engine(path, device=device, quantization="fp8")
    assert _num_narrow(engine) == 8 and engine.model_config.weights_form == "fp8"
    assert engine.spec.model != _engine(path, device=device).spec.model
    ours = _logprobs(engine)
    assert 0 < _distance(ours, _logprobs(_engine(twin, device="cpu", dtype="float32"))) < CLOSE
    reference, tensors = _engine(path, device=device), load_file(twin / "model.safetensors")
    for linear in _linears(reference):
        if linear.name.endswith("_proj"):
            linear.weight = _Reference(linear, tensors, device)  # type: ignore[assignment]
    assert _distance(ours, _logprobs(reference)) < CLOSE / 5
    for linear in _linears(engine):
        if isinstance(linear.weight, Float8Weight):
            meant = linear.weight.numbers.float() * linear.weight.scales.view(-1, 1)
            expected = _Reference(linear, tensors, "cpu")._matrix
            torch.testing.assert_close(meant.cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_captured_steps_yield_the_tokens_of_launched_ones(tmp_path: Path, device: str) -> None:
    path = write_checkpoint(tmp_path, tokenizer=False, shape=SHAPE)
    answers = []
    for is_captured in (True, False):
        driver = Driver(_engine(path, device=device, quantization="fp8", is_captured=is_captured))
        answers.append(driver.generate([driver.add(prompt) for prompt in prompts([5, 16, 31], 250)]))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_experts_are_rounded_and_computed_together(tmp_path: Path, device: str) -> None:
    path = tmp_path / "experts"
    write_by_shapes(path, QWEN3_MOE)
    engine = _engine(path, device=device, quantization="fp8", is_captured=True)
    assert isinstance(engine.runner, CudaRunner) and engine.runner.pieces is not None, "steps are not captured"
    kinds = {linear.name: type(linear.weight) for linear in _linears(engine)}
    assert {kind for name, kind in kinds.items() if name.endswith(".gate")} == {DenseWeight}
    assert {kind for name, kind in kinds.items() if name.endswith("_proj")} == {Float8Weight}
    assert any(".experts." in name for name in kinds)
    plain = _engine(path, device="cpu", dtype="float32")
    assert 0 < _distance(_logprobs(engine), _logprobs(plain)) < 2 * CLOSE, "a near tie chooses another expert"


class _FakeRank(Communicator):
    """A rank whose collectives are never used: only its shards matter."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def _rounded(path: Path, rank: int, size: int, load_format: str) -> dict[str, RoundedWeight]:
    config = replace(ModelConfig.from_dir(path), quantization=quantized_at_load("fp8"))
    decoder = Decoder(config, _FakeRank(rank, size), dtype=torch.bfloat16, device=torch.device("cpu"))
    load_weights(decoder, path, load_format=load_format, seed=3)
    weights = {linear.name: linear.weight for linear in decoder.linears()}
    return {name: weight for name, weight in weights.items() if isinstance(weight, RoundedWeight)}


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_ranks_have_the_numbers_and_scales_of_one(tmp_path: Path, load_format: str) -> None:
    path = write_checkpoint(tmp_path, tokenizer=False, shape=SHAPE)
    whole = _rounded(path, 0, 1, load_format)
    assert len(whole) == 8
    for rank in range(2):
        for name, part in _rounded(path, rank, 2, load_format).items():
            one = whole[name]
            if part.num_inputs < one.num_inputs:
                own = slice(rank * part.num_inputs, (rank + 1) * part.num_inputs)
                assert torch.equal(part.scales, one.scales)
                assert torch.equal(part.numbers.float(), one.numbers[:, own].float())
                continue
            sizes = (256, 128, 128) if name.endswith("qkv_proj") else (512, 512)  # outputs of the fused parts
            starts = [sum(sizes[:index]) for index in range(len(sizes))]
            firsts = [start + rank * size // 2 for start, size in zip(starts, sizes, strict=True)]
            rows = [torch.arange(first, first + size // 2) for first, size in zip(firsts, sizes, strict=True)]
            own_rows = torch.cat(rows)
            assert torch.equal(part.scales, one.scales[own_rows])
            assert torch.equal(part.numbers.float(), one.numbers.float()[own_rows])


def test_the_reference_multiplies_by_the_numbers_that_it_stands_for() -> None:
    weight = RoundedWeight.of(32, 64, dtype=torch.float32, device=torch.device("cpu"))
    [slot] = weight.slots("linear", (32, 64))
    assert slot.rows is not None
    plain, x = torch.randn(32, 64), torch.randn(5, 64)
    slot.rows.put(plain, 0, 0)
    torch.testing.assert_close(weight.product(x, None), x @ weight.widened().t())
    assert float((weight.widened() - plain).abs().max() / plain.abs().max()) < 2**-4
    with pytest.raises(AssertionError, match="only GPUs"):
        weight.pack()


def _float8(num_outputs: int, num_inputs: int, num_groups: int) -> GroupedWeight:
    generator = torch.Generator().manual_seed(num_groups)
    numbers = torch.randn(num_outputs, num_inputs, generator=generator).mul_(20).to(torch.float8_e4m3fn)
    scales = torch.rand(num_outputs, num_groups, generator=generator) / 100
    return GroupedWeight(numbers, scales, dtype=torch.bfloat16)


@pytest.mark.parametrize(("num_groups", "dim", "length"), [(1, 0, 32), (1, 1, 32), (1, 1, 64), (4, 1, 16)])
def test_numbers_stay_where_one_scale_is_for_all_inputs_of_a_rank(num_groups: int, dim: int, length: int) -> None:
    """As with a scale for each output, or for all, and where a rank's inputs are one block."""
    stored, start = _float8(64, 64, num_groups), 64 - length
    shape = (length, 64) if dim == 0 else (64, length)
    weight = RoundedWeight.of(*shape, dtype=torch.bfloat16, device=torch.device("cpu"))
    RoundedRows(weight.numbers, weight.scales).put(stored, dim, start)
    meant = weight.numbers.float() * weight.scales
    assert torch.equal(meant, stored.dequantized().narrow(dim, start, length))
    assert torch.equal(weight.numbers.float(), stored.numbers.float().narrow(dim, start, length))


def test_blocks_are_rounded_by_whole_outputs_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = _float8(PIECE_ROWS + 8, 64, 4)
    numbers, scales = to_float8(stored.dequantized())
    widened, sizes = GroupedWeight.dequantized, []

    def told(part: GroupedWeight) -> Tensor:
        sizes.append(part.num_outputs)
        return widened(part)

    monkeypatch.setattr(GroupedWeight, "dequantized", told)
    weight = RoundedWeight.of(PIECE_ROWS + 8, 32, dtype=torch.bfloat16, device=torch.device("cpu"))
    RoundedRows(weight.numbers, weight.scales).put(stored, 1, 32)
    assert torch.equal(weight.numbers.float(), numbers[:, 32:].float()) and torch.equal(weight.scales, scales)
    assert sizes == [PIECE_ROWS, 8]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_other_devices_and_types_are_refused(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path, tokenizer=False, shape=SHAPE)
    with pytest.raises(ConfigError, match="its products are of bfloat16"):
        _engine(path, device=device, quantization="fp8", dtype="float32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    with pytest.raises(ConfigError, match=r"only GPUs of capability 9\.0 or more .* use int8 or int4"):
        _engine(path, device=device, quantization="fp8")


def test_cpus_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tokenizer=False, shape=SHAPE)
    with pytest.raises(ConfigError, match=r"only GPUs of capability 9\.0 or more .* use int8 or int4"):
        _engine(path, device="cpu", quantization="fp8")


def _engine(path: Path, *, is_captured: bool = False, **fields: object) -> Engine:
    """Build one; what is asked of most is one prompt's step, for which graphs would take ten times what it takes."""
    defaults = {"dtype": "bfloat16", "max_num_seqs": 8, "max_model_len": 512, "enforce_eager": not is_captured}
    return Engine(engine_config(path, **(defaults | fields)), num_blocks=64)


def _logprobs(engine: Engine) -> Tensor:
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=8)
    driver = Driver(engine)
    driver.step([(driver.add(prompts([60], 250)[0], sampling), 60)])
    return torch.tensor([entry.logprob or 0.0 for entry in driver.outputs[0].rows[0].prompt_logprobs])


def _linears(engine: Engine) -> list[Linear]:
    assert isinstance(engine.runner, CudaRunner)
    return list(engine.runner._decoder.plain.linears())


def _num_narrow(engine: Engine) -> int:
    return sum(isinstance(linear.weight, Float8Weight) for linear in _linears(engine))


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """RMS, of the range."""
    return float((ours - theirs).square().mean().sqrt() / (theirs.max() - theirs.min()))
