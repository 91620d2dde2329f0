"""Packed weights: every number is where the C++ looks for it, and nothing is held twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvferry.common.request import SampledToken
from kvferry.engine.cpu import build, compiler
from kvferry.engine.cpu.compiler import NativeUnavailable
from kvferry.engine.cpu.model import NativeModel
from kvferry.engine.cpu.packing import Packed, Packer, Tiles
from kvferry.engine.cpu.runner import NativeRunner
from kvferry.engine.engine import Engine
from kvferry.engine.nn import decoder as decoders
from kvferry.engine.nn.builder import Builder
from kvferry.engine.nn.decoder import Decoder
from kvferry.engine.nn.deterministic import torch_results
from kvferry.engine.nn.feed_forward import GatedMLP
from kvferry.engine.nn.loading import load_weights
from kvferry.engine.ranks.communicator import Communicator
from kvferry.engine.weights.weight import DenseWeight
from kvferry.models.config import ModelConfig
from kvferry.models.default import cache_dir
from kvferry.sizing.memory import rank_weights

from ...checkpoints import write_checkpoint, write_embedding_model
from ...engine_driver import GREEDY, Driver, engine_config, make_engine, prompts

LENGTHS = [5, 70, 1]


@pytest.fixture(scope="module")
def pack(isa: str) -> Packer:
    return Packer(build.load(cache_dir()), torch.bfloat16)


def _matrix(num_outputs: int, num_inputs: int) -> Tensor:
    return torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(num_inputs)).bfloat16()


def _pack(pack: Packer, matrix: Tensor) -> tuple[Tiles, Tensor]:
    tiles, (memory,) = pack(DenseWeight(matrix))
    assert isinstance(memory, Tensor)
    return tiles, memory


@pytest.fixture(scope="module")
def side_by_side(isa: str) -> int:
    """Return how many outputs' pairs stand side by side."""
    return 32 if isa == "amx" else 64


def _unpacked(memory: Tensor, num_inputs: int, side_by_side: int) -> Tensor:
    """[padded outputs, padded inputs] from [outputs / `side_by_side`, inputs / 2, `side_by_side`, 2]."""
    num_pairs = -(-num_inputs // 32) * 16
    return memory.view(-1, num_pairs, side_by_side, 2).transpose(1, 2).reshape(-1, 2 * num_pairs)


@given(st.integers(1, 200), st.integers(1, 150))
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing_and_pads_with_zeros(
    pack: Packer, side_by_side: int, num_outputs: int, num_inputs: int
) -> None:
    matrix = _matrix(num_outputs, num_inputs)
    tiles, memory = _pack(pack, matrix)
    found = _unpacked(memory, num_inputs, side_by_side)
    assert torch.equal(found[:num_outputs, :num_inputs], matrix)
    assert not found[num_outputs:].any() and not found[:, num_inputs:].any()
    assert (tiles.weights, tiles.columns) == (memory.data_ptr(), num_outputs)
    assert (tiles.pairs * 2, len(found)) == (found.shape[1], -(-num_outputs // 64) * 64)


def test_a_units_tile_of_pairs_is_read_as_it_lies(pack: Packer, side_by_side: int) -> None:
    """16 pairs of 16 outputs are 16 rows of 64 bytes, one pair's apart, as a matrix unit loads one of its tiles."""
    matrix, x = _matrix(128, 64), torch.randn(64).bfloat16()
    _, memory = _pack(pack, matrix)
    sums = torch.zeros(128)
    for output in range(0, 128, 16):
        for pair in range(0, 32, 16):
            start = output // side_by_side * side_by_side * 64 + (pair * side_by_side + output % side_by_side) * 2
            tile = memory.as_strided((16, 16, 2), (2 * side_by_side, 2, 1), start).float()
            inputs = x[2 * pair : 2 * pair + 32].float().view(16, 1, 2)
            sums[output : output + 16] += (tile * inputs).sum((0, 2))
    torch.testing.assert_close(sums, matrix.float() @ x.float())


# --- a whole model ----------------------------------------------------------------------------------------------


def _answers(path: Path, **fields: object) -> list[tuple[SampledToken, ...]]:
    config = engine_config(path, dtype="bfloat16", deterministic=True, **fields)
    engine = Engine(config, num_blocks=64)
    assert isinstance(engine.runner, NativeRunner)
    driver = Driver(engine)
    seqs = [driver.add(prompt, GREEDY) for prompt in prompts(LENGTHS, 500)]
    return [*driver.step([(seq, seq.num_tokens) for seq in seqs]), *driver.step([(seq, 1) for seq in seqs])]


def _swap_pairs(tiles: Tensor) -> Tensor:
    return tiles.view(-1, 2).flip(1)


def _shift_columns(tiles: Tensor) -> Tensor:
    return tiles.view(-1, 64, 2).roll(1, 1)


def _swap_halves(tiles: Tensor) -> Tensor:
    return tiles.view(-1, 2, 32, 2).flip(1)


@pytest.mark.parametrize("plant", [_swap_pairs, _shift_columns, _swap_halves])
def test_a_wrong_packing_is_noticed(
    pack: Packer, side_by_side: int, plant: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, tokenizer=False, dtype="bfloat16", tie_embeddings=True, vocab_size=515)
    expected, right = _answers(tmp_path), Packer.__call__

    def planted(self: Packer, weight: DenseWeight, *, in_turns: bool = False) -> Packed:
        packed = right(self, weight, in_turns=in_turns)
        (memory,) = packed.memory
        assert callable(plant) and isinstance(memory, Tensor)
        memory.copy_(plant(memory).reshape(-1))
        return packed

    assert _answers(tmp_path) == expected
    monkeypatch.setattr(Packer, "__call__", planted)
    assert _answers(tmp_path) != expected
    with pytest.raises(AssertionError):
        test_packing_loses_nothing_and_pads_with_zeros.hypothesis.inner_test(pack, side_by_side, 70, 40)  # type: ignore[attr-defined]


def _decoder(path: Path) -> Decoder:
    decoder = Decoder(ModelConfig.from_dir(path), Communicator(), dtype=torch.bfloat16, device=torch.device("cpu"))
    load_weights(decoder, path, load_format="auto", seed=0)
    return decoder


@pytest.mark.parametrize("tied", [False, True])
def test_no_matrix_is_held_twice(pack: Packer, tied: bool, tmp_path: Path) -> None:
    """All but the rows that tokens are looked up in, which a tied head is packed beside."""
    path = write_checkpoint(tmp_path, tokenizer=False, tie_embeddings=tied)
    decoder = _decoder(path)
    NativeModel(decoder, cache_dir())
    plain = [linear.weight.plain for linear in decoder.linears() if isinstance(linear.weight, DenseWeight)]
    assert len(plain) == 2 * 4 + 1 and not any(tensor.numel() for tensor in plain)
    assert decoder.embedding.weight.plain.numel()
    head = decoder.head.rows.weight
    assert isinstance(head, DenseWeight) and head.plain.numel() == (
        decoder.embedding.weight.plain.numel() if tied else 0
    )


def test_without_the_library_the_decoder_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = _decoder(write_checkpoint(tmp_path, tokenizer=False))
    before = [slot.target.clone() for slot in decoder.slots()]
    monkeypatch.setattr(compiler, "_COMPILERS", ())
    with pytest.raises(NativeUnavailable):
        NativeModel(decoder, cache_dir())
    assert all(torch.equal(slot.target, old) for slot, old in zip(decoder.slots(), before, strict=True))


class _Halved(GatedMLP):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) / 2


class _Halves(DenseWeight):
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return super().product(x, bias) / 2


def test_what_only_looks_like_a_known_block_is_left_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, tokenizer=False)
    with monkeypatch.context() as patch:
        patch.setattr(decoders, "make_feed_forward", lambda builder, layer, _: _Halved(builder, f"{layer}.mlp", 128))
        with pytest.raises(NativeUnavailable, match=r"no C\+\+ for layers of Attention and _Halved"):
            NativeModel(_decoder(tmp_path), cache_dir())
    monkeypatch.setattr(Builder, "weight", lambda builder, _, *shape, **kwargs: _Halves(builder.empty(*shape)))
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ for .*qkv_proj in torch.bfloat16 as _Halves"):
        NativeModel(_decoder(tmp_path), cache_dir())


def test_torchs_results_are_named_after_the_unit_that_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for has_amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        names.append(torch_results(torch.bfloat16, 1))
    assert " AMX " in names[1] and names[1].replace(" AMX", "") == names[0]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_model_without_a_head_packs_none(tmp_path: Path, quantization: str | None) -> None:
    """Its steps make sums of hidden states, and rows that sample are for measuring alone."""
    path = write_embedding_model(tmp_path / "model")
    engine = make_engine(path, dtype="bfloat16", quantization=quantization)
    assert isinstance(engine.runner, NativeRunner)
    decoder = engine.runner.decoder
    assert decoder._model.head.weights is None and not decoder._model.head.integers
    driver = Driver(engine)
    assert driver.generate([driver.add(prompts([5])[0], GREEDY)])
    kept = rank_weights(engine.config, ModelConfig.from_dir(path))
    tied = rank_weights(engine.config, replace(ModelConfig.from_dir(path), has_head=True))
    assert kept.read < tied.read and tied.total - kept.total == tied.read - kept.read
