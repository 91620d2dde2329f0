"""A checkpoint's 8-bit floats stay as they are on a GPU: those in blocks, and all where it has no products of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvferry.engine.cuda.coded import CodedWeight
from kvferry.engine.cuda.experts import GroupedExperts
from kvferry.engine.cuda.runner import CudaRunner
from kvferry.engine.cuda.stacks import CodedStack
from kvferry.engine.engine import Engine
from kvferry.engine.nn.decoder import Decoder
from kvferry.engine.nn.loading import load_weights
from kvferry.engine.weights.float8 import RoundedWeight, groups_to_float8
from kvferry.engine.weights.grouped import GroupedWeight
from kvferry.models.config import ModelConfig
from kvferry.models.quantization import Quantization, Rule
from kvferry.models.storage import Form, Storage
from kvferry.sizing.memory import rank_weights

from ...checkpoint_shapes import QWEN3_MOE, write_by_shapes
from ...checkpoints import write_checkpoint
from ...deepseek import EXPERTS, write_for_cuda
from ...engine_driver import Driver, engine_config, prompts
from ...quantized import SHAPE, write_pair
from .test_float8 import CLOSE, _distance, _engine, _FakeRank, _linears, _logprobs, _Reference, gpu, on_gpu

BLOCK = 64
WEIGHT_ONLY = 0.012  # RMS of log-probabilities, of their range, where bfloat16 alone rounds
EARLIER = [(8, 0), (8, 9)]  # capabilities of cards without products of 8-bit floats here


def _in_blocks(path: Path, twin: Path) -> tuple[Path, Path]:
    """Store a plain checkpoint's linears in blocks of 8-bit floats, and what these mean in float32 beside it."""
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        stored[name], plain[name] = tensor, tensor.float()
        if "_proj" in name and name.endswith(".weight"):
            height, width = (-(-size // BLOCK) for size in tensor.shape)
            scales = torch.rand(height, width, generator=torch.Generator().manual_seed(len(stored))) * 0.002 + 1e-4
            whole = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: len(tensor), : tensor.shape[1]]
            stored[name] = (tensor.float() / whole).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scales
            plain[name] = stored[name].float() * whole
    save_file(plain, twin / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (path / "config.json").write_text(json.dumps(config))
    return path, twin


def _dense_pair(folder: Path, shape: object = SHAPE) -> tuple[Path, Path]:
    written = (write_checkpoint(folder / name, tokenizer=False, shape=shape) for name in ("blocks", "twin"))  # type: ignore[arg-type]
    return _in_blocks(*written)


def _coded(engine: Engine) -> list[CodedWeight]:
    return [linear.weight for linear in _linears(engine) if isinstance(linear.weight, CodedWeight)]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_blocks_are_multiplied_by_in_8_bits_with_the_checkpoints_scales(tmp_path: Path, device: str) -> None:
    path, twin = _dense_pair(tmp_path)
    engine, plain = _engine(path, device=device), _engine(twin, device=device)
    coded = _coded(engine)
    assert len(coded) == 8 and all(weight.codes.rounds_rows and weight.codes.group_size == BLOCK for weight in coded)
    ours = _logprobs(engine)
    assert 0 < _distance(ours, _logprobs(_engine(twin, device="cpu", dtype="float32"))) < CLOSE
    tensors = load_file(twin / "model.safetensors")
    for linear in _linears(plain):
        if linear.name.endswith("_proj"):
            linear.weight = _BlockReference(linear, tensors, device)  # type: ignore[assignment]
    assert _distance(ours, _logprobs(plain)) < CLOSE / 5


class _BlockReference(_Reference):
    """Multiplies in float32, by inputs in 8 bits of which each block has its scale."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        numbers, scales = groups_to_float8(x, BLOCK)
        return ((numbers.float() * scales.repeat_interleave(BLOCK, 1)) @ self._matrix.t()).to(x.dtype)


def test_an_input_that_is_far_out_spoils_its_group_alone() -> None:
    rows = torch.rand(3, 64) + 0.5
    rows[1, 40] = 1e6
    numbers, scales = groups_to_float8(rows, 16)
    meant = numbers.float() * scales.repeat_interleave(16, 1)
    assert scales.shape == (3, 4)
    torch.testing.assert_close(meant[:, :32], rows[:, :32], rtol=2**-4, atol=0)
    assert float(meant[1, 41]) == 0.0


@pytest.mark.parametrize("format_name", ["compressed fp8 channel", "compressed fp8 tensor", "fp8 block"])
@pytest.mark.parametrize("capability", EARLIER)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_earlier_cards_widen_them_in_registers(
    tmp_path: Path, capability: tuple[int, int], format_name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    path, twin = write_pair(tmp_path, format_name)
    engine = _engine(path, device=device)
    coded = _coded(engine)
    # One of two layers' gate is plain in the last format, so what it is fused with stays plain too.
    assert len(coded) == 8 - (format_name == "fp8 block") and not any(weight.codes.rounds_rows for weight in coded)
    assert _distance(_logprobs(engine), _logprobs(_engine(twin, device="cpu", dtype="float32"))) < WEIGHT_ONLY


@pytest.mark.parametrize("has_float8", [True, False])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_they_take_what_is_counted(
    tmp_path: Path, device: str, has_float8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_float8:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    path, _ = _dense_pair(tmp_path)
    decoder = _loaded(path, 0, 1, device)
    grouped = [weight for linear in decoder.linears() if isinstance(weight := linear.weight, GroupedWeight)]
    assert len(grouped) == 8 and all(weight.is_e4m3 for weight in grouped)
    taken = sum(slot.target.nbytes for slot in decoder.slots()) + sum(weight.scales.nbytes for weight in grouped)
    engine = engine_config(path, device=device, dtype="bfloat16")
    assert taken == rank_weights(engine, ModelConfig.from_dir(path), has_float8=has_float8).total


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_ranks_that_cut_a_block_have_its_numbers(tmp_path: Path, device: str, load_format: str) -> None:
    """A rank's 160 inputs are two blocks of 64 and a half: groups of 32 hold them exactly."""
    path, _ = _dense_pair(tmp_path, replace(SHAPE, intermediate_size=320))
    whole = _grouped(path, 0, 1, device, load_format)
    for rank in range(2):
        for name, part in _grouped(path, rank, 2, device, load_format).items():
            if not name.endswith("down_proj"):
                continue
            assert part.group_size == 32 and whole[name].group_size == 64
            own = slice(rank * part.num_inputs, (rank + 1) * part.num_inputs)
            assert torch.equal(part.dequantized(), whole[name].dequantized()[:, own])


def _loaded(path: Path, rank: int, size: int, device: str, load_format: str = "auto") -> Decoder:
    config = ModelConfig.from_dir(path)
    decoder = Decoder(config, _FakeRank(rank, size), dtype=torch.bfloat16, device=torch.device(device))
    load_weights(decoder, path, load_format=load_format, seed=3)
    return decoder


def _grouped(path: Path, rank: int, size: int, device: str, load_format: str) -> dict[str, GroupedWeight]:
    weights = {linear.name: linear.weight for linear in _loaded(path, rank, size, device, load_format).linears()}
    return {name: weight for name, weight in weights.items() if isinstance(weight, GroupedWeight)}


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_rows_of_groups_that_are_too_small_stay_as_they_are(device: str) -> None:
    torch.manual_seed(3)
    for group_size in (16, 32):
        weight = GroupedWeight(*groups_to_float8(torch.randn(48, 64, device=device), group_size), dtype=torch.bfloat16)
        matrix, coded = weight.dequantized().cpu(), CodedWeight(weight)
        assert coded.codes.rounds_rows == (group_size == 32)
        x = torch.randn(5, 64).bfloat16()
        error = coded.product(x.to(device), None).float().cpu() - x.float() @ matrix.T
        rounding = 1 / 16 if coded.codes.rounds_rows else 1 / 128  # of three bits, and of bfloat16's seven
        assert (error.abs() <= (rounding + 1 / 128) * (x.float().abs() @ matrix.T.abs())).all()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_captured_steps_yield_the_tokens_of_launched_ones(tmp_path: Path, device: str) -> None:
    path, _ = _dense_pair(tmp_path)
    answers = []
    for is_captured in (True, False):
        driver = Driver(_engine(path, device=device, is_captured=is_captured))
        answers.append(driver.generate([driver.add(prompt) for prompt in prompts([5, 16, 31], 250)]))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (8, 0)])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_experts_in_blocks_are_computed_together(
    tmp_path: Path, capability: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    written = []
    for name in ("blocks", "twin"):
        written.append(tmp_path / name)
        write_by_shapes(written[-1], QWEN3_MOE)
    path, twin = _in_blocks(*written)
    engine = _engine(path, device=device, is_captured=True)
    assert isinstance(engine.runner, CudaRunner) and engine.runner.pieces is not None, "steps are not captured"
    for block in engine._experts.blocks.values():
        assert isinstance(block.grouped, GroupedExperts) and isinstance(block.grouped._up, CodedStack)
        assert block.grouped._up.codes.rounds_rows == (capability[0] > 8)
    far = _distance(_logprobs(engine), _logprobs(_engine(twin, device="cpu", dtype="float32")))
    assert far < (2 * CLOSE if capability[0] > 8 else CLOSE), "a near tie chooses another expert"


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_a_model_with_latents_is_in_blocks_but_for_what_makes_its_heads(tmp_path: Path, device: str) -> None:
    for name in ("blocks", "twin"):
        write_for_cuda(tmp_path / name, **EXPERTS["v3"], moe_intermediate_size=128)
    path, twin = _in_blocks(tmp_path / "blocks", tmp_path / "twin")
    engine = _engine(path, device=device)
    kinds = {linear.name: type(linear.weight) for linear in _linears(engine)}
    apart = {name for name, kind in kinds.items() if kind is not CodedWeight and ".experts." not in name}
    assert apart == {"lm_head", "model.layers.1.mlp.gate"}
    assert all(block.grouped is not None for block in engine._experts.blocks.values())
    assert _distance(_logprobs(engine), _logprobs(_engine(twin, device="cpu", dtype="float32"))) < 2 * CLOSE


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_without_the_kernel_they_are_rounded_once_more(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvferry.engine.weights.grouped.has_triton", lambda: False)
    path, _ = _dense_pair(tmp_path)
    assert {type(linear.weight) for linear in _loaded(path, 0, 1, device).linears()} >= {RoundedWeight}
    assert not _coded(_engine(path, device=device))


def test_only_what_is_stored_so_in_groups_that_are_multiplied_is_kept() -> None:
    blocks = Storage(layout="float8", sharing="block", block=(128, 128))
    rules = [Rule("blocks", blocks), Rule("whole", Storage(layout="float8")), Rule("plain", None)]
    rules.append(Rule("odd", replace(blocks, block=(128, 40))))
    quantization = Quantization(name="fp8", method="fp8", rules=tuple(rules))

    def group(modules: list[str], num_inputs: int, *, has_products: bool = False) -> int:
        form = quantization.kept_float8(modules, num_inputs, has_products=has_products)
        assert form is None or form == Form(8, form.group_size, has_minima=False, is_e4m3=True)
        return 0 if form is None else form.group_size

    assert group(["blocks"], 512) == group(["blocks", "whole"], 512, has_products=True) == 128
    assert group(["blocks"], 192) == 64 and group(["blocks"], 512, has_products=True) == 128
    assert group(["whole"], 512) == 512 and group(["whole"], 512, has_products=True) == 0
    assert group(["blocks", "plain"], 512) == group(["odd"], 512) == group(["whole"], 24) == 0
