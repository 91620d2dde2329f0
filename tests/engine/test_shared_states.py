"""Ranks that share layers with states: what one rank computes, from parts of the same pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.engine.calibrate import calibrate
from kvferry.engine.cpu.described import StateRuns
from kvferry.engine.cpu.state_runs import state_runs
from kvferry.engine.engine import Engine
from kvferry.engine.nn.states import LayerStates
from kvferry.engine.ranks.group import RankGroup
from kvferry.kvcache.blocks import BlockPool
from kvferry.models.config import ModelConfig
from kvferry.models.parts.delta_nets import DeltaNetsConfig
from kvferry.models.parts.mamba import MambaConfig
from kvferry.models.parts.short_convolutions import ShortConvolutionsConfig
from kvferry.models.parts.states import RowPart, StatesConfig
from kvferry.transfer.protocol.shards import expected_pairs, pieces

from ..adapters import merge, write_adapter
from ..engine_driver import GREEDY, Driver, engine_config, make_engine
from ..transformers_checkpoints import write_state_models
from .test_adapters import said_by_ranks
from .test_states import NEAR, VARIANTS, prompts
from .transformers_reference import reference_logprobs

BLOCKS, BLOCKS_OF_PAGES = 64, 4
_LAYERS: dict[str, Any] = {"layers": (True, False, True, True), "kernel_size": 4}
_MAMBA: dict[str, Any] = {"num_heads": 8, "head_dim": 4, "state_dim": 6, "conv_bias": True, "proj_bias": False}
KINDS: dict[str, StatesConfig] = {
    "delta nets": DeltaNetsConfig(
        **_LAYERS, num_key_heads=4, num_value_heads=8, key_dim=6, value_dim=5, is_grouped=False
    ),
    "mamba, one group": MambaConfig(**_LAYERS, **_MAMBA, num_groups=1),
    "mamba, groups": MambaConfig(**_LAYERS, **_MAMBA, num_groups=4),
    "convolutions": ShortConvolutionsConfig(**_LAYERS, num_columns=12, has_bias=False),
}
SPEC = KVCacheSpec(model="m", num_layers=40, num_kv_heads=4, head_dim=6, block_size=4, dtype="float32")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_state_models(tmp_path_factory.mktemp("models"), VARIANTS)


@contextmanager
def two_ranks(model_dir: Path, **fields: object) -> Iterator[Engine]:
    config: EngineConfig = engine_config(model_dir, tensor_parallel_size=2, **fields)
    group = RankGroup.start(config, num_blocks=BLOCKS)
    try:
        yield Engine(config, tp_size=2, num_blocks=BLOCKS, group=group)
    finally:
        group.close()


def _answers(engine: Engine, asked: list[list[int]], chunk: int = 23) -> list[list[int]]:
    """Chunks and answers go past the ends of blocks."""
    driver, sampling = Driver(engine), msgspec.structs.replace(GREEDY, max_tokens=17)
    return driver.generate([driver.add(prompt, sampling) for prompt in asked], chunk=chunk)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_say_what_transformers_says(checkpoints: Path, variant: str) -> None:
    asked = prompts([1, 17, 70])
    for whole_experts in (False, True) if "moe" in variant or "next" in variant else (False,):
        with two_ranks(checkpoints / variant, block_size=16, enable_expert_parallel=whole_experts) as engine:
            for prompt, answer in zip(asked, _answers(engine, asked), strict=True):
                following = reference_logprobs(checkpoints / variant, (*prompt, *answer[:-1]))[len(prompt) - 1 :]
                chosen = following.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
                assert bool((following.amax(1) - chosen <= NEAR).all()), prompt


def test_ranks_measure_themselves_behind_tokens_that_nobody_computed(checkpoints: Path) -> None:
    [asked] = prompts([20])
    with two_ranks(checkpoints / "qwen3.5", block_size=16) as engine:
        assert any(sample.decode_rows for sample in calibrate(engine, BlockPool(BLOCKS, 16), 1.2))
        found = _answers(engine, [asked])
    assert found == _answers(make_engine(checkpoints / "qwen3.5"), [asked])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "targets"),
    [
        ("qwen3.5", ("in_proj_qkv", "in_proj_z", "in_proj_b", "out_proj", "q_proj", "o_proj")),
        ("qwen3 next, some dense", ("in_proj_qkvz", "in_proj_ba", "out_proj")),
        ("granite 4", ("in_proj", "out_proj")),
        ("lfm2", ("in_proj", "out_proj")),
    ],
)
def test_ranks_share_adapters_of_layers_with_states(
    checkpoints: Path, tmp_path: Path, variant: str, targets: tuple[str, ...]
) -> None:
    asked, path = prompts([40, 17]), checkpoints / variant
    adapter = write_adapter(tmp_path / "adapter", path, rank=8, targets=targets, seed=3, alpha=32)
    driver = Driver(make_engine(merge(path, adapter, tmp_path / "merged")))
    wanted = driver.generate([driver.add(prompt) for prompt in asked])
    assert said_by_ranks(path, adapter, asked) == wanted != _answers(make_engine(path), asked)


def test_a_rank_has_the_sizes_of_its_shares() -> None:
    for config in KINDS.values():
        whole = config.shared_by(4)
        assert whole.num_shares == 4
        for num_ranks in (1, 2, 4):
            own = whole.of_rank(num_ranks)
            assert own.num_shares * num_ranks == 4 and own.share_size == whole.share_size
            assert own.num_bytes * num_ranks == whole.num_bytes
            assert own.num_pages(SPEC.page_bytes(num_ranks)) == whole.num_pages(SPEC.page_bytes())
    assert KINDS["delta nets"].shared_by(6).num_shares == 2, "heads of three ranks would be none of four"
    assert KINDS["mamba, groups"].shared_by(8).num_shares == 4, "two ranks would have parts of a group"
    assert KINDS["mamba, one group"].shared_by(8).num_shares == 8


def _pages(states: StatesConfig, num_ranks: int) -> Tensor:
    return torch.full((states.num_pages(SPEC.page_bytes()), BLOCKS_OF_PAGES, *SPEC.page_shape(num_ranks)), torch.nan)


def _attached(config: StatesConfig, pages: Tensor) -> LayerStates:
    states = LayerStates(config)
    states.attach(pages)
    return states


def _write(source: Tensor, target: Tensor, ranks: tuple[int, int], sizes: tuple[int, int]) -> None:
    """Write what a rank of one worker writes to one of another: in every page of states, as of keys and values."""
    shards = [SPEC.shard(rank, size) for rank, size in zip(ranks, sizes, strict=True)]
    own, other = (pages.flatten(2).view(torch.uint8) for pages in (source, target))
    for piece in pieces(shards[0], shards[1], SPEC) or ():
        part = own[:, :, piece.local_offset : piece.local_offset + piece.num_bytes]
        other[:, :, piece.remote_offset : piece.remote_offset + piece.num_bytes] = part


def _part(rows: Tensor, parts: tuple[RowPart, ...], rank: int, num_ranks: int) -> Tensor:
    """Cut what a rank has out of whole rows, [..., numbers]."""
    found = []
    for part, whole in zip(parts, torch.split(rows, [part.size for part in parts], -1), strict=True):
        found.append(whole if part.is_common else whole.chunk(num_ranks, -1)[rank])
    return torch.cat(found, -1)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (1, 4), (4, 2), (2, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_pages_bring_ranks_their_states(kind: str, sizes: tuple[int, int]) -> None:
    whole, generator = KINDS[kind].shared_by(SPEC.num_kv_heads), torch.Generator().manual_seed(1)
    blocks, ends = torch.tensor([3, 1]), torch.tensor([7.0, 9.0])
    source, target = ([_pages(whole, size) for _ in range(size)] for size in sizes)
    wanted = []
    for index in range(whole.num_layers):
        inputs = torch.randn(2, whole.kernel_size - 1, whole.num_convolved, generator=generator)
        memory = torch.randn(2, *whole.memory_shape, generator=generator)
        wanted.append((inputs, memory))
        for rank, pages in enumerate(source):
            own = _part(inputs, whole.row_parts, rank, sizes[0]), memory.chunk(sizes[0], 1)[rank]
            _attached(whole.of_rank(sizes[0]), pages).write(index, blocks, ends, *own)
    shards = [[SPEC.shard(rank, size) for rank in range(size)] for size in sizes]
    for pair in expected_pairs(shards[0], shards[1]):
        _write(source[pair[0]], target[pair[1]], pair, sizes)
    for rank, pages in enumerate(target):
        states = _attached(whole.of_rank(sizes[1]), pages)
        for index, (inputs, memory) in enumerate(wanted):
            found = states.read(index, blocks, ends.long())
            assert torch.equal(found[0], _part(inputs, whole.row_parts, rank, sizes[1]))
            assert torch.equal(found[1], memory.chunk(sizes[1], 1)[rank]) and torch.equal(found[2], ends)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_runs_tell_where_the_same_numbers_lie(kind: str, num_ranks: int) -> None:
    whole = KINDS[kind].shared_by(SPEC.num_kv_heads)
    own, pages, block = whole.of_rank(num_ranks), _pages(whole, num_ranks), 2
    states, numbers = _attached(own, pages), pages.view(-1)[block * pages.stride(1) :]
    for index in range(own.num_layers):
        state = torch.arange(1.0, 1.0 + own.layer_size)
        inputs, memory = torch.split(state[1:], [own.num_inputs, own.layer_size - 1 - own.num_inputs])
        inputs, memory = inputs.view(1, -1, own.num_convolved), memory.view(1, *own.memory_shape)
        states.write(index, slice(block, block + 1), state[:1], inputs, memory)
        described: StateRuns = state_runs(
            own, index, page_bytes=SPEC.page_bytes(num_ranks), page_stride=4 * pages.stride(0)
        )
        runs = [described.runs[i] for i in range(described.num_runs)]
        copies = [described.copies[i] for i in range(described.num_copies)]
        assert [run.at for run in runs] == [sum(run.size for run in runs[:i]) for i in range(len(runs))]
        assert sum(run.size for run in runs) == own.layer_size
        assert sum(run.size for run in runs + copies) == own.num_shares * own.share_size
        for run in runs + copies:
            assert torch.equal(numbers[run.place // 4 :][: run.size], state[run.at : run.at + run.size])


def test_more_ranks_than_shares_are_refused(checkpoints: Path) -> None:
    model = ModelConfig.from_dir(checkpoints / "qwen3.5")
    with pytest.raises(ConfigError, match=r"= 4 does not divide the model's .*; these do: \[1, 2\]"):
        model.check_tp_size(4)
