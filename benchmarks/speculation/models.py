"""Draft models for a model that has none of its own: one that is bad and cheap, and one that is always right.

A model's first layers alone, with its embedding, its last norm and its tokenizer, draft for it without having learned
to. A model that gets layers which add nothing says the same and takes longer, so that it itself is a perfect draft.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_LAYER = re.compile(r"(model\.layers\.)(\d+)(\..*)")
_ADDED = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")  # what a layer adds comes through them


def write_truncated(model_dir: Path, target: Path, num_layers: int) -> Path:
    """Write the model's first layers as a model of their own, and return its directory."""
    tensors = {name: tensor for name, tensor in _read(model_dir).items() if _layer(name) < num_layers}
    return _write(model_dir, target, num_layers, tensors)


def write_extended(model_dir: Path, target: Path, num_idle_layers: int) -> Path:
    """Write the model with further layers, which compute as much as any and change nothing; return its directory."""
    tensors = _read(model_dir)
    count = 1 + max(map(_layer, tensors))
    for name in [name for name in tensors if _layer(name) >= 0]:
        for copy in range(count + _layer(name), count + num_idle_layers, count):
            tensor = tensors[name]
            tensors[_LAYER.sub(rf"\g<1>{copy}\g<3>", name)] = (
                torch.zeros_like(tensor) if name.endswith(_ADDED) else tensor.clone()
            )
    return _write(model_dir, target, count + num_idle_layers, tensors)


def _layer(name: str) -> int:
    """Return the layer that a tensor is of; -1: none."""
    match = _LAYER.fullmatch(name)
    return -1 if match is None else int(match[2])


def _read(model_dir: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    return tensors


def _write(model_dir: Path, target: Path, num_layers: int, tensors: dict[str, Tensor]) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    for path in model_dir.glob("*.json"):
        if not path.name.endswith(".index.json"):
            shutil.copy(path, target)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = num_layers
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
