"""Ranks that exchange rows yield what a sum over them yields, whoever is chosen, for any rows, ranks and plan."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvferry.common.errors import WorkerLost
from kvferry.engine.nn.blocks import make_feed_forward
from kvferry.engine.nn.builder import Builder
from kvferry.engine.nn.exchange import ExchangedMLP, Holders
from kvferry.engine.nn.experts import Replicas, SparseMLP
from kvferry.engine.nn.feed_forward import GatedMLP
from kvferry.engine.nn.stacked_experts import StackedExpert
from kvferry.engine.ranks.communicator import Communicator
from kvferry.models.config import ModelConfig
from kvferry.models.parts.expert_plan import ExpertPlan, Held

from ...deepseek import EXPERTS, SHAPE
from ...transformers_checkpoints import SMALL
from ..ranks.threads import JOIN_S, on_ranks

CPU = torch.device("cpu")
ROWS = (1, 2, 5, 15, 16, 17, 40, 600)
SPARSE: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
    "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 12, "num_experts_per_tok": 4},
    "DeepseekV3": SHAPE
    | EXPERTS["v3"]
    | {"n_routed_experts": 12, "first_k_dense_replace": 0}
    | {"moe_intermediate_size": 48},
}
MODEL_TYPES = {"Qwen3Moe": "qwen3_moe", "Mixtral": "mixtral", "GptOss": "gpt_oss", "DeepseekV3": "deepseek_v3"}


def config_of(folder: Path, family: str) -> ModelConfig:
    common: dict[str, Any] = {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": MODEL_TYPES[family],
        "dtype": "float32",
    }
    common |= {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "rope_interleave": True}
    (folder / "config.json").write_text(json.dumps(SMALL | SPARSE[family] | common))
    return ModelConfig.from_dir(folder)


def fill(block: SparseMLP, choose: str = "any") -> None:
    """Draw what each rank alike has of a tensor by its name."""
    for leaf in block.leaves():
        for slot in leaf.slots():
            seed = int.from_bytes(slot.name.encode()[-8:], "little") >> 1
            seed += sum(slot.name.encode())  # experts differ in the middle of their names
            whole = torch.randn(slot.shape, generator=torch.Generator().manual_seed(seed)) / slot.shape[-1] ** 0.5
            slot.target.copy_(whole.narrow(slot.dim, slot.start, slot.target.shape[slot.dim]))
    gate = block.gate
    if choose == "ties":
        gate.weight.plain[1:] = gate.weight.plain[1].clone()  # type: ignore[attr-defined]
    elif choose == "the same":
        gate.weight.plain.zero_()  # type: ignore[attr-defined]
    for bias in (gate.bias, gate.score_bias):
        if bias is not None and choose != "any":
            bias.zero_()


@dataclass(frozen=True)
class Layer:
    """A layer of experts, as any rank makes it."""

    config: ModelConfig
    held: Held
    choose: str = "any"

    def made(self, comm: Communicator, *, is_exchanged: bool) -> SparseMLP:
        assert self.config.experts is not None
        plan = ExpertPlan(self.config.experts.num_experts, comm.size, {0: self.held}, is_exchanged)
        whole = plan if comm.size > 1 else None
        block = make_feed_forward(Builder(self.config, comm, torch.float32, CPU, whole), "model.layers.0", 0)
        assert isinstance(block, ExchangedMLP if is_exchanged and comm.size > 1 else SparseMLP)
        fill(block, self.choose)
        return block

    def yields(self, batches: list[Tensor], *, is_exchanged: bool) -> list[tuple[list[Tensor], Tensor]]:
        """Return of each rank the results, and how often experts were taken."""

        def job(comm: Communicator) -> tuple[list[Tensor], Tensor]:
            block = self.made(comm, is_exchanged=is_exchanged)
            return [block(x) for x in batches], block.taken

        return on_ranks(len(self.held), job)

    def alone(self, batches: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        with torch.inference_mode():
            block = self.made(Communicator(), is_exchanged=False)
            return [block(x) for x in batches], block.taken


def rows_of(count: int, seed: int) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def drawn_plan(num_experts: int, size: int, seed: int) -> Held:
    """Draw which ranks hold each expert: one or several; each rank holds one."""
    generator = torch.Generator().manual_seed(seed)
    held = [{rank} for rank in range(size)]
    for expert in range(num_experts):
        copies = int(torch.randint(1, size + 1, (1,), generator=generator)) if expert % 3 == 0 else 1
        for rank in torch.randperm(size, generator=generator)[:copies].tolist():
            held[rank].add(expert)
    return tuple(tuple(sorted(own)) for own in held)


@pytest.mark.parametrize("choose", ["any", "ties", "the same"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("family", SPARSE)
def test_an_exchange_yields_what_a_sum_does(tmp_path: Path, family: str, size: int, choose: str) -> None:
    config = config_of(tmp_path, family)
    assert config.experts is not None
    held = drawn_plan(config.experts.num_experts, size, seed=size)
    layer = Layer(config, held, choose)
    batches = [rows_of(count, seed) for seed, count in enumerate(ROWS)]
    expected, taken = layer.alone(batches)
    summed = layer.yields(batches, is_exchanged=False)
    for results, counted in layer.yields(batches, is_exchanged=True):
        for x, y, by_sum, by_one in zip(batches, results, summed[0][0], expected, strict=True):
            assert y.shape == x.shape
            torch.testing.assert_close(y, by_sum, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(y, by_one, rtol=1e-4, atol=2e-5)
        assert torch.equal(counted, taken), "each row counts once, on every rank"
    assert int(taken.sum()) == sum(ROWS) * config.experts.num_chosen


@pytest.mark.parametrize("seed", range(12))
def test_any_shape_and_any_plan(tmp_path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    size, num_experts = between(2, 4), between(4, 24)
    base = config_of(tmp_path, "Qwen3Moe")
    assert base.experts is not None
    num_chosen = between(1, min(6, num_experts))
    experts = replace(base.experts, num_experts=num_experts, num_chosen=num_chosen, normalised=bool(seed % 2))
    layer = Layer(replace(base, experts=experts), drawn_plan(num_experts, size, seed))
    batches = [rows_of(between(1, 90), seed + i) for i in range(6)]
    expected, taken = layer.alone(batches)
    for results, counted in layer.yields(batches, is_exchanged=True):
        for y, known in zip(results, expected, strict=True):
            torch.testing.assert_close(y, known, rtol=1e-4, atol=2e-5)
        assert torch.equal(counted, taken)


@pytest.mark.parametrize("family", SPARSE)
@pytest.mark.parametrize("size", [2, 3])
def test_a_row_of_a_tile_does_not_feel_its_neighbours(
    tmp_path: Path, family: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, wherever it stands among 16: it then has another home, and goes with others."""
    multiplied = set[int]()
    for kind in (GatedMLP, StackedExpert):
        monkeypatch.setattr(kind, "partial", _noting(kind.partial, multiplied))
    config = config_of(tmp_path, family)
    assert config.experts is not None
    layer = Layer(config, drawn_plan(config.experts.num_experts, size, seed=7))
    x, others = rows_of(16, 1), rows_of(16, 2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    mixed = torch.where((torch.arange(16) % 2 == 0).unsqueeze(1), x, others)
    yielded = layer.yields([x, x[order], mixed], is_exchanged=True)
    assert multiplied == {16}, "some kernels round otherwise where rows are fewer"
    for (y, turned, beside), _ in yielded:
        assert torch.equal(turned, y[order])
        assert torch.equal(beside[::2], y[::2])


def _noting(partial: Callable[[Any, Tensor], Tensor], noted: set[int]) -> Callable[[Any, Tensor], Tensor]:
    def noting(self: object, x: Tensor) -> Tensor:
        noted.add(len(x))
        return partial(self, x)

    return noting


def test_the_rank_that_is_asked_takes_the_choice_for_its_own() -> None:
    held: Held = ((0, 1, 2), (1, 2, 3), (2, 1, 4))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 64, generator=generator)
    chosen = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(600)])
    ranks = Holders(held, 5, CPU).of(x, chosen)
    for rank in range(3):
        own = Replicas(held, rank, 5, CPU).own(x, chosen).view(600, 2)
        assert torch.equal(own < 5, ranks == rank)


def test_ranks_send_each_row_once_to_a_rank_and_no_more(tmp_path: Path) -> None:
    """Of experts that stand on one rank together a row goes there once, and not to ranks that compute none of its."""
    held: Held = (tuple(range(6)), tuple(range(6, 12)))
    row, result = 64 * 4 + 3 * 8, 64 * 4  # bytes: numbers and choices; float32
    sizes = list[tuple[int, int, list[int], list[int]]]()
    layer = Layer(config_of(tmp_path, "Qwen3Moe"), held, "the same")

    def job(comm: Communicator) -> None:
        block = layer.made(comm, is_exchanged=True)
        exchange = comm.all_to_all

        def noted(x: Tensor, sent: list[int], received: list[int]) -> Tensor:
            sizes.append((comm.rank, x.shape[1] * x.element_size(), sent, received))
            return exchange(x, sent, received)

        comm.all_to_all = noted  # type: ignore[method-assign]
        block.gate.weight.plain[6:] = -1.0  # type: ignore[attr-defined]
        block(rows_of(7, 0).abs())

    on_ranks(2, job)
    assert sorted(sizes) == [
        (0, result, [4, 3], [4, 0]),
        (0, row, [4, 0], [4, 3]),
        (1, result, [0, 0], [3, 0]),
        (1, row, [3, 0], [0, 0]),
    ]


def _to_the_first(self: Holders, x: Tensor, chosen: Tensor) -> Tensor:
    return self._ranks[chosen, 0] * 0


def _without_padding(
    self: ExchangedMLP, x: Tensor, asked: Tensor, weights: Tensor, slots: Tensor | None, *, at_least: int
) -> Tensor:
    own = asked.flatten()
    return self._part(x, own, self._counts(own), weights)


def _joined_backwards(self: Communicator, x: Tensor) -> Tensor:
    parts = self._gather(x)
    return torch.cat(parts[::-1] if x.is_floating_point() else parts)


@pytest.mark.parametrize(
    ("where", "name", "planted"),
    [
        pytest.param(Holders, "of", _to_the_first, id="rows go to a rank without their expert"),
        pytest.param(Communicator, "all_gather_rows", _joined_backwards, id="shares are joined in another order"),
    ],
)
def test_a_planted_fault_is_found(
    tmp_path: Path, where: type, name: str, planted: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, planted)
    with pytest.raises(AssertionError, match="not close"):
        test_an_exchange_yields_what_a_sum_does(tmp_path, "Qwen3Moe", 2, "any")


def test_a_planted_lack_of_padding_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExchangedMLP, "_computed", _without_padding)
    with pytest.raises(AssertionError, match="some kernels round otherwise"):
        test_a_row_of_a_tile_does_not_feel_its_neighbours(tmp_path, "Qwen3Moe", 2, monkeypatch)


def test_a_rank_that_is_gone_is_a_lost_worker(tmp_path: Path) -> None:
    layer = Layer(config_of(tmp_path, "Qwen3Moe"), drawn_plan(12, 2, 0))
    left = threading.Event()

    def job(comm: Communicator) -> None:
        block = layer.made(comm, is_exchanged=True)
        exchange = comm.all_to_all

        def gone(x: Tensor, sent: list[int], received: list[int]) -> Tensor:
            if comm.rank == 1:  # told how many rows come, and never sends its own
                comm._group = None
                left.set()
                raise KeyboardInterrupt
            left.wait(JOIN_S)
            return exchange(x, sent, received)

        comm.all_to_all = gone  # type: ignore[method-assign]
        if comm.rank == 0:
            with pytest.raises(WorkerLost, match="tensor-parallel rank 0: a collective failed"):
                block(rows_of(40, 0))
        else:
            with pytest.raises(KeyboardInterrupt):
                block(rows_of(40, 0))

    on_ranks(2, job)
