"""Checkpoints whose stacks of experts are in MXFP4, drawn at random."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def write_mxfp4(source: Path, path: Path) -> Path:
    """Write a gpt-oss model's like, in a checkpoint of one file, whose experts are drawn in MXFP4."""
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.dim() != 3:
            stored[name] = tensor
            continue
        count, num_inputs, num_outputs = tensor.shape
        blocks = torch.randint(256, (count, num_outputs, num_inputs // 32, 16), generator=generator)
        scales = torch.randint(121, 124, blocks.shape[:3], generator=generator)
        stored |= {f"{name}_blocks": blocks.to(torch.uint8), f"{name}_scales": scales.to(torch.uint8)}
    save_file(stored, path / "model.safetensors")
    raw = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (path / "config.json").write_text(json.dumps(raw))
    return path
