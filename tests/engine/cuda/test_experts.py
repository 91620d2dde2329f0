"""Experts computed together yield what the loop over them does, whoever is chosen, in a graph, on any rank."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kvferry.engine.cuda.decoder import FusedDecoder
from kvferry.engine.cuda.experts import GroupedExperts, RealRows, group
from kvferry.engine.cuda.float8 import Float8Weight, narrow
from kvferry.engine.cuda.kernels import FusedKernels
from kvferry.engine.cuda.stacks import CodedStack
from kvferry.engine.nn.decoder import Decoder
from kvferry.engine.nn.exchange import ExchangedMLP
from kvferry.engine.nn.experts import SparseMLP
from kvferry.engine.nn.loading import load_weights
from kvferry.engine.ranks.communicator import Communicator
from kvferry.models.config import ModelConfig
from kvferry.models.parts.expert_plan import ExpertPlan
from kvferry.models.quantization import quantized_at_load

from ...checkpoint_shapes import GPT_OSS, write_by_shapes
from ...deepseek import EXPERTS, write_for_cuda
from .lockstep import Lockstep, Meeting
from .test_pieces import Twins

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]"),
]
CUDA = torch.device("cuda", 0)
NUM_CHOSEN = 2


class Checkpoint(NamedTuple):
    path: Path
    config: ModelConfig  # of what its weights are in memory


@pytest.fixture(scope="module", params=["deepseek", "8 bits", "gpt-oss"])
def checkpoint(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Checkpoint:
    """Gated experts, such in 8-bit floats, and such with biases and a clamped activation."""
    path = tmp_path_factory.mktemp("models") / "model"
    if request.param == "gpt-oss":
        write_by_shapes(path, GPT_OSS | {"num_experts_per_tok": NUM_CHOSEN})
    else:
        write_for_cuda(path, **EXPERTS["v3"])
    config = ModelConfig.from_dir(path)
    if request.param == "8 bits":
        config = replace(config, quantization=quantized_at_load("fp8"))
    return Checkpoint(path, config)


def _decoder(checkpoint: Checkpoint, comm: Communicator, plan: ExpertPlan | None = None) -> Decoder:
    decoder = Decoder(checkpoint.config, comm, dtype=torch.bfloat16, device=CUDA, expert_plan=plan)
    load_weights(decoder, checkpoint.path, load_format="auto", seed=0)
    narrow(decoder, CUDA)
    return decoder


EVEN = ExpertPlan(8, 2)
REPLICATED = ExpertPlan(8, 2, {1: ((0, 1, 2, 3, 4), (0, 4, 5, 6, 7))})


def _blocks(checkpoint: Checkpoint, comm: Communicator, plan: ExpertPlan | None = None) -> tuple[SparseMLP, SparseMLP]:
    """The same experts twice: one by one, and together."""
    blocks = []
    for is_grouped in (False, True):
        decoder = _decoder(checkpoint, comm, plan)
        block = decoder.layers[1].feed_forward
        assert isinstance(block, SparseMLP)
        if is_grouped:
            group(decoder, CUDA)
            assert isinstance(block.grouped, GroupedExperts)
        blocks.append(block)
    return blocks[0], blocks[1]


def _rows(count: int) -> Tensor:
    return torch.randn(count, 128, generator=torch.Generator().manual_seed(count)).bfloat16().to(CUDA)


@torch.inference_mode()
@pytest.mark.parametrize("chosen", ["any", "the same", "ties"])
@pytest.mark.parametrize("plan", [None, EVEN, REPLICATED])
def test_experts_together_yield_what_they_do_one_by_one(
    checkpoint: Checkpoint, chosen: str, plan: ExpertPlan | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvferry.engine.cuda.experts._ROWS", 32)
    num_ranks = 1 if plan is None else plan.num_ranks
    for rank in range(num_ranks):
        group_of = Twins(num_ranks) if num_ranks > 1 else None
        alone, together = _blocks(checkpoint, Communicator(rank, num_ranks, group_of), plan)  # type: ignore[arg-type]
        for block in (alone, together):
            bias = block.gate.score_bias if block.gate.bias is None else block.gate.bias
            assert bias is not None
            if chosen == "the same":
                bias.copy_(10 * torch.arange(8.0))
            elif chosen == "ties":
                bias.zero_()
                block.gate.weight.plain.zero_()  # type: ignore[attr-defined]
        for count in (1, 5, 80):
            x = _rows(count)
            assert isinstance(together.grouped, GroupedExperts)
            together.grouped.rows.count.fill_(count)
            together.grouped.rows.begin(count)
            torch.testing.assert_close(together(x).float(), alone(x).float(), rtol=2e-2, atol=2e-2)
        assert together.taken.cpu().tolist() == alone.taken.tolist()
        assert int(together.taken.sum()) == 86 * NUM_CHOSEN


@torch.inference_mode()
def test_a_graph_of_experts_follows_its_rows(checkpoint: Checkpoint) -> None:
    alone, together = _blocks(checkpoint, Communicator())
    x, grouped = _rows(6), together.grouped
    assert isinstance(grouped, GroupedExperts) and isinstance(grouped.rows, RealRows)
    grouped.rows.begin(6)
    together(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grouped.rows.begin(6)
        y = together(x)
    assert not together.taken.any(), "captures count nothing"
    x.copy_(torch.flip(x, [1]))
    grouped.rows.count.fill_(4)
    graph.replay()
    torch.testing.assert_close(y.float(), alone(x).float(), rtol=2e-2, atol=2e-2)
    assert int(together.taken.sum()) == 4 * NUM_CHOSEN


@torch.inference_mode()
@pytest.mark.parametrize("checkpoint", ["8 bits"], indirect=True)
def test_experts_in_8_bits_stay_so_and_take_no_room_twice(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, together = _blocks(checkpoint, Communicator())
    for name in ("gate_up_proj", "down_proj"):
        weights = [getattr(expert, name).weight for expert in together.experts]
        assert all(isinstance(weight, Float8Weight) for weight in weights)
        for tensors in ([weight.numbers for weight in weights], [weight.scales for weight in weights]):
            places = [tensor.data_ptr() for tensor in tensors]
            assert [place - places[0] for place in places] == [i * tensors[0].nbytes for i in range(len(tensors))]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    decoder = _decoder(checkpoint, Communicator())
    group(decoder, CUDA)
    block = decoder.layers[1].feed_forward
    assert isinstance(block, SparseMLP) and isinstance(block.grouped, GroupedExperts)
    assert isinstance(block.grouped._up, CodedStack), "torch has no product of them for that card"


@pytest.mark.parametrize("plan", [EVEN, REPLICATED])
def test_exchanged_experts_yield_what_one_rank_does_and_are_in_no_graph(
    checkpoint: Checkpoint, plan: ExpertPlan
) -> None:
    alone, _ = _blocks(checkpoint, Communicator())
    meeting = Meeting(2)

    @torch.inference_mode()
    def run(rank: int) -> list[Tensor]:
        comm = Communicator(rank, 2, Lockstep(rank, meeting))  # type: ignore[arg-type]
        exchanged = replace(plan, is_exchanged=True)
        with meeting.turn:
            decoder = _decoder(checkpoint, comm, exchanged)
            group(decoder, CUDA)
            assert not FusedDecoder(decoder, FusedKernels()).can_be_captured
            block = decoder.layers[1].feed_forward
            assert isinstance(block, ExchangedMLP) and block.grouped is None
            return [block(_rows(count)) for count in (1, 5, 80)]

    with ThreadPoolExecutor(2) as ranks:
        for results in ranks.map(run, range(2)):
            for y, count in zip(results, (1, 5, 80), strict=True):
                with torch.inference_mode():
                    torch.testing.assert_close(y.float(), alone(_rows(count)).float(), rtol=2e-2, atol=2e-2)
