"""Small random adapters as peft writes them, and the model that each of them makes of a checkpoint.

write_adapter(tmp_path / "a", model_dir, rank=8, seed=1)      an adapter of all linear modules
merge(model_dir, tmp_path / "a", tmp_path / "merged")         the checkpoint with W + scale * B A in its place
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    path: Path,
    model_dir: Path,
    *,
    rank: int = 8,
    alpha: float = 16,
    rslora: bool = False,
    targets: Sequence[str] = ALL,
    seed: int = 0,
    strength: float = 1.0,
    dtype: torch.dtype = torch.float32,
    config: dict[str, object] | None = None,
    ranks: dict[str, int] | None = None,
    only: str = "",
) -> Path:
    """Write random matrices, as peft's `save_pretrained` would. `ranks`: its rank_pattern. `only`: a pattern that
    modules' names must have.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, weight in sorted(load_file(model_dir / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        if module == name or module.rpartition(".")[2] not in targets or not re.search(only, module):
            continue
        own = next((r for pattern, r in (ranks or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)), rank)
        size_out, size_in = weight.shape
        down = torch.randn(own, size_in, generator=generator) / math.sqrt(size_in)
        up = torch.randn(size_out, own, generator=generator) * (strength * math.sqrt(own) / alpha)
        tensors[f"base_model.model.{module}.lora_A.weight"] = down.to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = up.to(dtype)
    fields: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model_dir),
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "target_modules": list(targets),
        "rank_pattern": ranks or {},
        "alpha_pattern": {},
        "bias": "none",
        "modules_to_save": None,
        "use_dora": False,
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(fields | (config or {})), encoding="utf-8")
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


def merged_model(model_dir: Path, adapter: Path | None, target: Path) -> Path:
    """Write the model in float32, with the adapter merged into it if one is given."""
    shutil.copytree(model_dir, target)
    tensors = {name: tensor.float() for name, tensor in load_file(model_dir / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target if adapter is None else merge(target, adapter, target.with_name(f"{target.name}-merged"))


def merge(model_dir: Path, adapter: Path, target: Path) -> Path:
    """Write the model that the adapter makes: each adapted W becomes W + scale * B A, in float32."""
    shutil.copytree(model_dir, target)
    fields = json.loads((adapter / "adapter_config.json").read_text())
    matrices = load_file(adapter / "adapter_model.safetensors")
    tensors = load_file(model_dir / "model.safetensors")
    for name in [name for name in matrices if ".lora_A." in name]:
        down, up = matrices[name].double(), matrices[name.replace("lora_A", "lora_B")].double()
        rank = len(down)
        scale = fields["lora_alpha"] / (math.sqrt(rank) if fields["use_rslora"] else rank)
        weight = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        merged = tensors[weight].double() + scale * (up @ down)
        tensors[weight] = merged.to(tensors[weight].dtype)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
