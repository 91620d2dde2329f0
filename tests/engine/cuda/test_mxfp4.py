"""Experts in MXFP4 on a card: in their own bits, or as 8-bit floats where these are asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from kvferry.common.config import EngineConfig
from kvferry.engine.cuda.codes import Code
from kvferry.engine.cuda.experts import GroupedExperts, group
from kvferry.engine.cuda.runner import CudaRunner
from kvferry.engine.cuda.stacks import CodedStack, Float8Stack, PlainStack
from kvferry.engine.engine import Engine
from kvferry.engine.nn.decoder import Decoder
from kvferry.engine.nn.experts import Gate
from kvferry.engine.nn.loading import load_weights
from kvferry.engine.nn.stacked_experts import mxfp4_as_float8, unpack_mxfp4
from kvferry.engine.ranks.communicator import Communicator
from kvferry.engine.served_model import served_model
from kvferry.engine.weights.float8 import RoundedWeight
from kvferry.engine.weights.weight import DenseWeight
from kvferry.models.config import ModelConfig
from kvferry.sizing.memory import rank_weights

from ...engine_driver import engine_config, prompt_logprobs, prompts
from ...mxfp4 import write_mxfp4
from ...transformers_checkpoints import SMALL, write_model
from ..test_cuda_states import _config
from .lockstep import two_ranks
from .test_pieces import Twins

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]"),
]
on_a_card = [pytest.param("cuda", marks=gpu)]
FIELDS: dict[str, object] = {
    "head_dim": 64,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": 40,
}
[PROMPT] = prompts([90])
# Of log-probabilities in the median, with such weights: rounded to 16 bits they are off by 0.1, and rows are to 8, too.
CLOSE = 0.25
IN_16_BITS = 0.15


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_model(root / "plain", transformers.GptOssConfig(**SMALL | FIELDS), dtype=torch.bfloat16)
    return write_mxfp4(root / "plain", root / "mxfp4")


def _narrow(path: Path, **fields: object) -> EngineConfig:
    return _config(path, quantization="fp8", dtype="bfloat16", **fields)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Tensor:
    """Return what the numbers judge, widened to float32."""
    return prompt_logprobs(Engine(engine_config(checkpoint, dtype="float32"), num_blocks=100), PROMPT)


def _error(engine: Engine, expected: Tensor) -> float:
    """Return how far half of the log-probabilities are from what is expected."""
    return float((prompt_logprobs(engine, PROMPT) - expected).abs().median())


def _draw(lowest: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (48, 6, 16), generator=generator).to(torch.uint8)
    return blocks, torch.randint(lowest, 131, (48, 6), generator=generator).to(torch.uint8)


def test_numbers_are_kept_where_a_groups_exponent_is_near_the_largest() -> None:
    blocks, scales = _draw(130 - 12)
    numbers, factors = mxfp4_as_float8(blocks, scales)
    assert torch.equal(numbers.float() * factors, unpack_mxfp4(blocks, scales).T)
    assert numbers.float().abs().max() == 384


def test_others_are_rounded_and_rows_of_zeros_stay() -> None:
    blocks, scales = _draw(90)
    blocks[7] = 0
    scales[7] = 0
    numbers, factors = mxfp4_as_float8(blocks, scales)
    error = (numbers.float() * factors - unpack_mxfp4(blocks, scales).T).abs()
    assert error.max() > 0 and bool((error <= factors * 2.0**-10).all())
    assert not numbers[7].float().any() and bool(factors.isfinite().all())


@pytest.mark.parametrize("device", on_a_card)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_rank_has_its_part_in_what_is_counted(checkpoint: Path, device: str, load_format: str) -> None:
    config, card = served_model(_narrow(checkpoint, device=device)), torch.device(device)
    found = []
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        comm = Communicator(rank, size, Twins(size) if size > 1 else None)  # type: ignore[arg-type]
        decoder = Decoder(config, comm, dtype=torch.bfloat16, device=card)
        load_weights(decoder, checkpoint, load_format=load_format, seed=0)
        weights = [linear.weight for linear in decoder.linears() if ".experts." in linear.name]
        assert len(weights) == 2 * 2 * 8 and {type(weight) for weight in weights} == {RoundedWeight}
        rounded = [weight for weight in weights if isinstance(weight, RoundedWeight)]
        found.append([weight.widened().cpu() for weight in rounded])
        taken = sum(slot.target.nbytes for slot in decoder.slots())
        taken += sum(
            each.scales.nbytes for linear in decoder.linears() if isinstance(each := linear.weight, RoundedWeight)
        )
        engine = _narrow(checkpoint, device=device, tensor_parallel_size=size)
        counted = rank_weights(engine, ModelConfig.from_dir(checkpoint), has_float8=True, groups_float8=True).total
        assert taken == counted if size == 1 else taken == pytest.approx(counted, rel=0.005)
    for whole, first, second in zip(*found, strict=True):
        dim = 0 if len(first) < len(whole) else 1
        assert torch.equal(torch.cat((first, second), dim), whole)


@pytest.mark.parametrize("device", on_a_card)
def test_answers_are_near_those_of_the_widened_numbers(checkpoint: Path, expected: Tensor, device: str) -> None:
    engine = Engine(_narrow(checkpoint, device=device), num_blocks=100)
    assert isinstance(engine.runner, CudaRunner) and engine.runner._decoder.can_be_captured
    for block in engine._experts.blocks.values():
        assert isinstance(block.grouped, GroupedExperts) and isinstance(block.grouped._up, Float8Stack)
    assert 0 < _error(engine, expected) < CLOSE


@pytest.mark.usefixtures("few_sizes")
@pytest.mark.parametrize("device", on_a_card)
@pytest.mark.parametrize("fields", [{}, {"enable_expert_parallel": True}], ids=["parts", "whole"])
def test_so_are_two_ranks(
    checkpoint: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch, device: str, fields: dict[str, object]
) -> None:
    config = _narrow(checkpoint, device=device, tensor_parallel_size=2, **fields)
    with two_ranks(monkeypatch, config, 100) as engine:
        assert 0 < _error(engine, expected) < CLOSE


@pytest.mark.parametrize("device", on_a_card)
@pytest.mark.parametrize("capability", [(10, 0), (7, 5)])
def test_a_card_without_products_in_8_bits_keeps_them_and_an_older_one_widens_them(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, device: str, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    card = torch.device(device)
    config = served_model(_narrow(checkpoint, device=device))
    decoder = Decoder(config, Communicator(), dtype=torch.bfloat16, device=card)
    load_weights(decoder, checkpoint, load_format="auto", seed=0)
    group(decoder, card)
    block = decoder.layers[0].sparse
    assert block is not None
    if capability[0] < 8:
        assert block.grouped is None and isinstance(block.experts[0].down_proj.weight, DenseWeight)
        return
    assert isinstance(block.grouped, GroupedExperts)
    for stack in (block.grouped._up, block.grouped._down):
        assert isinstance(stack, CodedStack) and stack.codes.code is Code.MXFP4


@pytest.mark.parametrize("device", on_a_card)
def test_unasked_they_are_multiplied_by_in_their_own_bits(checkpoint: Path, expected: Tensor, device: str) -> None:
    engine = Engine(_config(checkpoint, dtype="bfloat16", device=device), num_blocks=100)
    assert isinstance(engine.runner, CudaRunner) and engine.runner._decoder.can_be_captured
    for block in engine._experts.blocks.values():
        assert isinstance(block.grouped, GroupedExperts) and isinstance(block.grouped._up, CodedStack)
        assert block.grouped._up.codes.numbers.shape == (8, 2 * 96, 128 // 2)
    assert 0 < _error(engine, expected) < IN_16_BITS


@pytest.mark.usefixtures("few_sizes")
@pytest.mark.parametrize("device", on_a_card)
@pytest.mark.parametrize("fields", [{}, {"enable_expert_parallel": True}], ids=["parts", "whole"])
def test_two_ranks_have_whole_groups_or_widen(
    checkpoint: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch, device: str, fields: dict[str, object]
) -> None:
    config = _config(checkpoint, dtype="bfloat16", device=device, tensor_parallel_size=2, **fields)
    with two_ranks(monkeypatch, config, 100) as engine:
        kept = {
            type(block.grouped._up)
            for block in engine._experts.blocks.values()
            if isinstance(block.grouped, GroupedExperts)
        }
        assert kept == ({CodedStack} if fields else {PlainStack})  # half of 96 columns are no whole groups
        assert 0 < _error(engine, expected) < IN_16_BITS


@pytest.mark.usefixtures("few_sizes")
@pytest.mark.parametrize("device", on_a_card)
def test_a_rank_whose_experts_nobody_chooses_warms_up_with_the_others(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """It multiplies nothing in few bits: attention is in 16 bits, and rows that are exchanged go to the other rank."""

    def choose(gate: Gate, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.arange(3, device=x.device).expand(len(x), 3), torch.ones(len(x), 3, device=x.device)

    monkeypatch.setattr(Gate, "choose", choose)
    fields: dict[str, object] = {"enable_expert_parallel": True, "expert_exchange": "all_to_all"}
    config = _config(checkpoint, dtype="bfloat16", device=device, tensor_parallel_size=2, **fields)
    with two_ranks(monkeypatch, config, 100) as engine:
        assert len(prompt_logprobs(engine, PROMPT)) == len(PROMPT) - 1


@pytest.mark.parametrize("device", on_a_card)
def test_what_they_take_is_what_is_counted(checkpoint: Path, device: str) -> None:
    engine = _config(checkpoint, dtype="bfloat16", device=device)
    config = served_model(engine)
    decoder = Decoder(config, Communicator(), dtype=torch.bfloat16, device=torch.device(device))
    load_weights(decoder, checkpoint, load_format="auto", seed=0)
    taken = sum(slot.target.nbytes + (0 if slot.scales is None else slot.scales.nbytes) for slot in decoder.slots())
    assert taken == rank_weights(engine, ModelConfig.from_dir(checkpoint), has_float8=True, groups_float8=True).total
