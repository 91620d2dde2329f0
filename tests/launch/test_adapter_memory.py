"""Adapters of experts that are served from the start are counted before it, and refused where nothing applies them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.common.errors import ConfigError
from kvferry.launch.engine_checks import check_memory
from kvferry.launch.host import Host
from kvferry.launch.plan import Deployment, plan
from kvferry.models.config import ModelConfig
from kvferry.settings.fields import ServeSettings
from kvferry.settings.pools import PoolSettings
from kvferry.sizing.memory import RANK_BYTES, weight_bytes

from ..adapters import write_adapter
from ..transformers_checkpoints import SMALL, write_model

_PARTS = ("q_proj", "gate_proj", "up_proj", "down_proj")


def test_a_start_counts_them(tmp_path: Path) -> None:
    import transformers

    fields = SMALL | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model_dir = write_model(tmp_path / "model", transformers.Qwen3MoeConfig(**fields))
    model = ModelConfig.from_dir(model_dir)
    path = write_adapter(tmp_path / "experts", model_dir, rank=16, targets=_PARTS)
    attention = write_adapter(tmp_path / "attention", model_dir, rank=16, targets=("q_proj",))

    def deployed(*adapters: Path, **fields: object) -> Deployment:
        settings = {"enable_lora": True, "lora_modules": [f"{one.name}={one}" for one in adapters], "device": "cpu"}
        settings |= fields
        pools = {"prefill": PoolSettings(workers=0), "decode": PoolSettings(workers=1)}
        return plan(ServeSettings.model_validate({**pools, **settings}), model_dir, "moe")

    [worker] = deployed().workers
    free = RANK_BYTES + weight_bytes(worker.config.engine, model) + (1 << 10)
    check_memory(deployed(attention), Host(2, free), model)
    with pytest.raises(ConfigError, match="memory: 1 ranks take about"):
        check_memory(deployed(path), Host(2, free), model)
    with pytest.raises(
        ConfigError, match=r"lora_modules: experts adapts .*experts\.0\.down_proj; .* need lora_experts on a GPU"
    ):
        check_memory(deployed(path, device="cuda"), Host(2, free), model)
    check_memory(deployed(path, device="cuda", lora_experts=True), Host(2, free), model)
