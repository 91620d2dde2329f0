"""What adapters of experts are said to take, beside what an engine takes memory for when it loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvferry.engine.engine import Engine
from kvferry.engine.nn.expert_adapters import TorchFactors
from kvferry.engine.ranks.communicator import Communicator
from kvferry.models.adapter import inspect_adapter
from kvferry.models.config import ModelConfig
from kvferry.sizing.adapters import expert_adapter_bytes

from ..adapters import write_adapter
from ..engine_driver import engine_config
from ..transformers_checkpoints import SMALL, write_model

_PARTS = ("q_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    fields = SMALL | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return write_model(tmp_path_factory.mktemp("models") / "moe", transformers.Qwen3MoeConfig(**fields))


class _LoneRank(Engine):
    """The first rank of several, alone."""

    def _connect(self, tp_rank: int, tp_size: int, store: object) -> Communicator:
        comm = Communicator()
        comm.size = tp_size
        return comm


@pytest.mark.parametrize(
    ("num_ranks", "fields"), [(1, {}), (2, {}), (2, {"enable_expert_parallel": True})], ids=["one", "parts", "whole"]
)
def test_memory_is_what_a_rank_takes(
    model_dir: Path, tmp_path: Path, num_ranks: int, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_adapter(tmp_path / str(rank), model_dir, rank=rank, targets=_PARTS) for rank in (4, 16, 8)]
    model, adapters = ModelConfig.from_dir(model_dir), [inspect_adapter(path) for path in paths]
    lora = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "tensor_parallel_size": num_ranks}
    config = engine_config(model_dir, **lora, **fields)
    taken: list[int] = []
    monkeypatch.setattr(TorchFactors, "begin", _noting(taken, TorchFactors.begin))
    engine = _LoneRank(config, tp_size=num_ranks, num_blocks=16)
    assert engine.adapters is not None
    for path in paths:
        engine.adapters.read(path)
    assert expert_adapter_bytes(config, model, adapters) == 4 * (taken[1] + taken[2])  # of the two that are largest
    none = inspect_adapter(write_adapter(tmp_path / "none", model_dir, targets=("q_proj",)))
    assert expert_adapter_bytes(config, model, [none]) == 0


def _noting(taken: list[int], begin: Any) -> Any:
    def noted(self: TorchFactors, num_values: int) -> None:
        if num_values:  # none after an adapter is read: what remains is let go
            taken.append(num_values)
        begin(self, num_values)

    return noted
