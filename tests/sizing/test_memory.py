"""What a rank is said to take, beside the tensors of a live engine."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from kvferry.engine.engine import Engine
from kvferry.engine.ranks.group import Communicator
from kvferry.models.config import ModelConfig
from kvferry.sizing.memory import cache_token_bytes, weight_bytes

from ..checkpoints import write_checkpoint
from ..engine_driver import engine_config

NUM_BLOCKS = 64
LARGE = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "num_layers": 3}
SHAPES: dict[str, tuple[str, dict[str, int | str | bool | None]]] = {
    "llama": ("llama", {}),
    "llama, its head tied": ("llama", {"tie_embeddings": True, "vocab_size": 2048}),
    "llama with biases": ("llama", {"biases": True}),
    "an odd vocabulary": ("llama", {"vocab_size": 1511}),
    "sizes that fill no tile": ("llama", {"hidden_size": 336, "head_dim": 96, "num_qo_heads": 8, "vocab_size": 700}),
    "mistral, wide": ("mistral", {"intermediate_size": 1536, "sliding_window": 64}),
    "qwen2": ("qwen2", {"num_kv_heads": 4}),
    "qwen3, deep, tied": ("qwen3", {"num_layers": 6, "tie_embeddings": True}),
}
PRECISIONS = ("plain", "int8", "int4")


class _FakeRank(Communicator):
    """A rank whose collectives are never used: only its shards matter."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


class _LoneRank(Engine):
    """The first rank of several, alone."""

    def _connect(self, tp_rank: int, tp_size: int, store: object) -> Communicator:
        return _FakeRank(tp_size)


def _storages() -> dict[int, int]:
    """The memory of all tensors that are alive, by its address."""
    found: dict[int, int] = {}
    for each in gc.get_objects():
        if type(each) is torch.Tensor:
            if each.is_mkldnn:
                found[id(each)] = each.numel() * each.element_size()
            else:
                found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return found


def _taken(config: object, num_ranks: int) -> int:
    gc.collect()
    before = _storages()
    engine = _LoneRank(config, tp_size=num_ranks, num_blocks=NUM_BLOCKS)  # type: ignore[arg-type]
    gc.collect()
    pages = engine.kv_pages
    after = _storages() | {pages.untyped_storage().data_ptr(): pages.nbytes}  # without what aligns them
    return sum(size for address, size in after.items() if address not in before)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", SHAPES)
def test_memory_is_that_of_a_live_rank(tmp_path: Path, name: str, dtype: str, num_ranks: int) -> None:
    family, fields = SHAPES[name]
    path = write_checkpoint(tmp_path, family, tokenizer=False, dtype=dtype, **(LARGE | fields))  # type: ignore[arg-type]
    model = ModelConfig.from_dir(path)
    for precision in PRECISIONS if dtype == "bfloat16" else PRECISIONS[:1]:
        quantization = None if precision == "plain" else precision
        config = engine_config(
            path, tensor_parallel_size=num_ranks, quantization=quantization, load_format="dummy", swap_space=0
        )
        said = weight_bytes(config, model) + NUM_BLOCKS * config.block_size * cache_token_bytes(config, model)
        assert said == pytest.approx(_taken(config, num_ranks), rel=0.03), precision
