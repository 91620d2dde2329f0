"""Random adapters of any model, as peft writes them."""

from __future__ import annotations

import json
from pathlib import Path

from kvferry.models.checkpoint import tensor_shapes
from kvferry.models.config import ModelConfig

_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_random_adapter(path: Path, model: ModelConfig, rank: int, *, seed: int) -> int:
    """Write random matrices for all linear modules, in float32; return their file's size in bytes."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(model).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in _MODULES and module != name:
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, shape[1], generator=generator) * 0.01
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(shape[0], rank, generator=generator) * 0.01
    path.mkdir(parents=True)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(_MODULES)}
    (path / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
    save_file(tensors, path / "adapter_model.safetensors")
    return (path / "adapter_model.safetensors").stat().st_size
