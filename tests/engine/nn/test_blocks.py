"""Blocks of other kinds than the product's: a model of them is loaded, packed and run, exactly too, where nothing but
the choice of the block was changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvferry.common.request import SampledToken
from kvferry.engine.engine import Engine
from kvferry.engine.nn import decoder as decoders
from kvferry.engine.nn.attention.base import AttentionBackend
from kvferry.engine.nn.builder import Builder
from kvferry.engine.nn.decoder import Decoder
from kvferry.engine.nn.feed_forward import GatedMLP
from kvferry.engine.nn.layers import ColumnParallelLinear, Part, RowParallelLinear
from kvferry.engine.nn.loading import load_weights
from kvferry.engine.nn.rotary import Rope
from kvferry.engine.nn.torch_runner import TorchRunner
from kvferry.engine.ranks.communicator import Communicator
from kvferry.engine.weights.weight import DenseWeight, Leaf, WeightSlot
from kvferry.models.config import ModelConfig

from ...checkpoints import write_checkpoint
from ...engine_driver import GREEDY, Driver, engine_config, prompts

LENGTHS = [5, 40, 17, 1]


class Experts:
    """A feed-forward of two, each taking the tokens whose first feature has its sign."""

    def __init__(self, builder: Builder, name: str, layer_id: int) -> None:
        size = builder.config.intermediate_size
        self.experts = [GatedMLP(builder, f"{name}.mlp.experts.{index}", size) for index in range(2)]

    def __call__(self, x: Tensor) -> Tensor:
        first, second = (expert(x) for expert in self.experts)
        return torch.where(x[:, :1] > 0, first, second)

    def leaves(self) -> Iterator[Leaf]:
        for expert in self.experts:
            yield from expert.leaves()


class Gate:
    """A mixer that looks at its own token alone, and at no page."""

    def __init__(self, builder: Builder, name: str, layer_id: int) -> None:
        size = builder.config.hidden_size
        self.gate = ColumnParallelLinear(builder, f"{name}.gate", size, [Part(f"{name}.gate", 2 * size)], bias=False)
        self.o_proj = RowParallelLinear(builder, f"{name}.out", 2 * size, size, bias=False)

    def project(self, x: Tensor, rope: Rope) -> Tensor:
        return self.gate(x).sigmoid()

    def mix(self, projected: Tensor, backend: AttentionBackend) -> Tensor:
        return projected

    def output(self, mixed: Tensor) -> Tensor:
        return self.o_proj(mixed)

    def leaves(self) -> Iterator[Leaf]:
        yield self.gate
        yield self.o_proj


class Int8Weight:
    """Eight bits a number and a scale for each output."""

    def __init__(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> None:
        self.num_outputs, self.num_inputs, self.dtype = num_outputs, num_inputs, dtype
        self.numbers = torch.empty(num_outputs, num_inputs, dtype=torch.int8)
        self.scales = torch.empty(num_outputs)
        self.is_packed = False

    def slots(
        self, name: str, shape: tuple[int, int], *, rows: slice = slice(None), dim: int = 0, start: int = 0
    ) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{name}.weight", shape, self.numbers[rows], dim, start)
        yield WeightSlot(f"{name}.weight_scale", shape[:1], self.scales[rows], 0, start if dim == 0 else 0)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, (self.numbers * self.scales[:, None]).to(x.dtype), bias)

    def pack(self) -> None:
        self.is_packed = True


def _run(engine: Engine) -> list[tuple[SampledToken, ...]]:
    driver = Driver(engine)
    seqs = [driver.add(prompt, GREEDY) for prompt in prompts(LENGTHS, 500)]
    return [*driver.step([(seq, seq.num_tokens) for seq in seqs]), *driver.step([(seq, 1) for seq in seqs])]


def _alone(engine: Engine) -> list[tuple[SampledToken, ...]]:
    found = []
    for prompt in prompts(LENGTHS, 500):
        driver = Driver(engine)
        seq = driver.add(prompt, GREEDY)
        found.append([driver.step([(seq, seq.num_tokens)])[0], driver.step([(seq, 1)])[0]])
    return [first for first, _ in found] + [second for _, second in found]


@pytest.fixture(params=["make_feed_forward", "make_mixer"])
def other_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have every layer made with a block of a kind that the product does not know; its name."""
    kind = {"make_feed_forward": Experts, "make_mixer": Gate}[request.param]
    monkeypatch.setattr(decoders, request.param, kind)
    return kind.__name__


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_block_runs_exactly(tmp_path: Path, other_block: str, dtype: str) -> None:
    write_checkpoint(tmp_path, tokenizer=False)
    config = engine_config(tmp_path, load_format="dummy", dtype=dtype, deterministic=True)
    engine = Engine(config, num_blocks=64)
    assert engine.runner.results.startswith("torch ")
    assert _run(engine) == _alone(engine)


def test_a_model_of_blocks_that_are_not_for_native_code_runs_in_torch(tmp_path: Path, other_block: str) -> None:
    write_checkpoint(tmp_path, tokenizer=False)
    with structlog.testing.capture_logs() as lines:
        engine = Engine(engine_config(tmp_path, load_format="dummy", dtype="bfloat16"), num_blocks=64)
    assert isinstance(engine.runner, TorchRunner)
    assert [line["event"] for line in lines] == ["cpu_kernels"]
    assert all(tokens for tokens in _run(engine))


def test_blocks_are_loaded_and_packed_by_what_they_hold(tmp_path: Path, other_block: str) -> None:
    config = ModelConfig.from_dir(write_checkpoint(tmp_path, tokenizer=False))
    decoder = Decoder(config, Communicator(), dtype=torch.float32, device=torch.device("cpu"))
    load_weights(decoder, tmp_path, load_format="dummy", seed=0)
    names = [slot.name for slot in decoder.slots()]
    assert len(names) == len(set(names))
    ours = ".mlp.experts.1.down_proj.weight" if other_block == "Experts" else ".0.gate.weight"
    assert any(name.endswith(ours) for name in names)
    linears = list(decoder.linears())
    assert len(linears) == config.num_layers * (6 if other_block == "Experts" else 4) + 1
    decoder.pack()
    weights = [linear.weight for linear in linears]
    assert all(isinstance(weight, DenseWeight) and not weight.plain.numel() for weight in weights)


@pytest.mark.parametrize("rank", [0, 1])
def test_another_weight_is_loaded_with_its_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """A checkpoint of whole numbers gives what the one gives that holds the same numbers times their scales."""
    wide, narrow = (write_checkpoint(tmp_path / name, tokenizer=False, biases=True) for name in ("wide", "narrow"))
    tensors = load_file(wide / "model.safetensors")
    quantized = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scales = tensors[name].abs().amax(1) / 127
        quantized[name] = (tensors[name] / scales[:, None]).round()  # whole, in a type of plain numbers
        quantized[f"{name}_scale"] = scales
        tensors[name] = quantized[name] * scales[:, None]
    save_file(tensors, wide / "model.safetensors")
    save_file(quantized, narrow / "model.safetensors")

    comm = Communicator()
    comm.rank, comm.size = rank, 2

    def load(path: Path) -> Decoder:
        decoder = Decoder(ModelConfig.from_dir(path), comm, dtype=torch.float32, device=torch.device("cpu"))
        load_weights(decoder, path, load_format="auto", seed=0)
        return decoder

    expected = load(wide)

    def int8_weight(builder: Builder, _: object, outputs: int, inputs: int, *, num_ranks: int = 1) -> Int8Weight:
        return Int8Weight(outputs, inputs, builder.dtype)

    monkeypatch.setattr(Builder, "weight", int8_weight)
    found = load(narrow)
    found.pack()
    for ours, theirs in zip(found.linears(), expected.linears(), strict=True):
        x = torch.randn(3, ours.weight.num_inputs)
        torch.testing.assert_close(ours.weight.product(x, ours.bias), theirs.weight.product(x, theirs.bias))
        assert ours is found.head.linear or (isinstance(ours.weight, Int8Weight) and ours.weight.is_packed)
