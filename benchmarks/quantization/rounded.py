"""Writes the built-in model rounded to whole numbers, as a checkpoint that other servers read too.

    python -m kvferry.benchmarks.quantization.rounded int8 DIR      # compressed-tensors: int8, inputs by token
    python -m kvferry.benchmarks.quantization.rounded int4 DIR      # compressed-tensors: int4 in groups, packed
    python -m kvferry.benchmarks.serve --model DIR --systems kvferry-co,vllm-agg ...

The head stays plain, as such checkpoints have it. Numbers are rounded as `--quantization` rounds them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.benchmarks.shared.program import parser_of
from kvferry.models.default import default_model_dir
from kvferry.models.stored.safetensors import safetensors_files

if TYPE_CHECKING:
    from torch import Tensor

_GROUP = 64  # the largest power of two that divides the inputs of all of its matrices


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("quantization.rounded", __doc__)
    parser.add_argument("kind", choices=("int8", "int4"))
    parser.add_argument("folder", type=Path, metavar="DIR")
    flags = parser.parse_args(argv)
    write_rounded(flags.folder, flags.kind)
    return 0


def write_rounded(folder: Path, kind: str) -> None:
    """Write config, weights and the tokenizer's files into a folder, which is made."""
    from safetensors.torch import load_file, save_file

    source = default_model_dir()
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, Tensor] = {}
    for path in safetensors_files(source):
        for name, tensor in load_file(path).items():
            is_linear = tensor.dim() == 2 and ".layers." in name
            tensors |= _stored(name, tensor, kind) if is_linear else {name: tensor}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = _described(kind)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _stored(name: str, matrix: Tensor, kind: str) -> dict[str, Tensor]:
    """Return the tensors that stand for a matrix [out, in], by their names."""
    import torch

    from kvferry.engine.weights.grouped import GroupedWeight
    from kvferry.models.storage import Form

    size = matrix.shape[1] if kind == "int8" else _GROUP
    rounded = GroupedWeight.quantized(matrix, Form(int(kind[-1]), size, has_minima=False))
    scales = rounded.scales.to(torch.bfloat16)
    if kind == "int8":
        return {name: rounded.numbers, f"{name}_scale": scales}
    shape = torch.tensor(matrix.shape)
    packed = rounded.numbers.view(torch.int32)  # the first number in the lowest bits of either
    return {f"{name}_packed": packed, f"{name}_scale": scales, f"{name}_shape": shape}


def _described(kind: str) -> dict[str, object]:
    weights: dict[str, object] = {"num_bits": int(kind[-1]), "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "channel"} if kind == "int8" else {"strategy": "group", "group_size": _GROUP}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if kind == "int8" else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs if kind == "int8" else None,
            }
        },
    }


if __name__ == "__main__":
    sys.exit(main())
