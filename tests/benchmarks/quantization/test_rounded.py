"""The rounded checkpoint that servers are compared with stands for the built-in model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kvferry.benchmarks.quantization.rounded import write_rounded
from kvferry.engine.weights.formats import unpack
from kvferry.engine.weights.grouped import GroupedWeight
from kvferry.models.checkpoint import check_checkpoint, matrix_storage
from kvferry.models.config import ModelConfig
from kvferry.models.default import default_model_dir
from kvferry.models.stored.safetensors import safetensors_files

_NAME = "model.layers.3.mlp.down_proj.weight"


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_each_number_is_within_a_step_of_the_plain_one(kind: str, tmp_path: Path) -> None:
    write_rounded(tmp_path, kind)
    config = ModelConfig.from_dir(tmp_path)
    check_checkpoint(tmp_path, config)
    with safe_open(safetensors_files(default_model_dir())[0], framework="pt") as file:
        plain = file.get_tensor(_NAME).float()
    storage = matrix_storage(config.quantization, _NAME, tuple(plain.shape))
    assert storage is not None
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())

        def read(suffix: str) -> torch.Tensor | None:
            name = f"{_NAME.removesuffix('.weight')}.{suffix}"
            return file.get_tensor(name) if name in names else None

        rounded = unpack(storage, tuple(plain.shape), read, torch.bfloat16)
    assert isinstance(rounded, GroupedWeight) and rounded.bits == int(kind[-1])
    steps = rounded.scales.abs().repeat_interleave(rounded.group_size, 1)
    # Four bits reach to 8 steps on one side and to 7 on the other; a scale in bfloat16 is off by up to 1/256 of itself.
    most = 0.5 + 127 / 256 if kind == "int8" else 1 + 8 / 256
    assert bool(((rounded.dequantized() - plain).abs() <= steps * most).all())
