"""Files of weights that no worker could read are refused before one starts, with what to do."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from kvferry.common.errors import ConfigError
from kvferry.models.checkpoint import check_checkpoint, check_names, tensor_shapes
from kvferry.models.config import ModelConfig
from kvferry.models.stored.safetensors import read_header, safetensors_files

from ..checkpoints import write_checkpoint

UP = "model.layers.0.mlp.up_proj.weight"


def _rewrite(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_bytes_of_tensors_lie_one_behind_the_other(tmp_path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    model = write_checkpoint(tmp_path, tokenizer=False)
    path = model / "model.safetensors"
    begin, entries = read_header(path)
    header, data = dict[str, Any](entries), path.read_bytes()[begin:]
    start, end = header[UP]["data_offsets"]
    behind = {
        name: entry | {"data_offsets": [each + 64 for each in entry["data_offsets"]]}
        for name, entry in header.items()
        if entry["data_offsets"][0] >= start
    }
    damaged = {
        "a gap": (header | behind, data[:start] + bytes(64) + data[start:]),
        "twice": (header | {UP: header[UP] | {"data_offsets": [0, end - start]}}, data),
    }
    config = ModelConfig.from_dir(model)
    check_checkpoint(model, config)
    for changed, stored in damaged.values():
        _rewrite(path, changed, stored)
        with pytest.raises(SafetensorError):
            safe_open(path, framework="pt")
        with pytest.raises(ConfigError, match=r"the bytes of \S+ begin at \d+, and those before them end at \d+"):
            check_checkpoint(model, config)


@pytest.mark.parametrize("own", ["qweight", "weight.absmax", "SCB"])
def test_quantized_weights_without_a_word_of_it_are_told_of(tmp_path: Path, own: str) -> None:
    """Tools of the first years wrote a file of their own beside config.json."""
    model = write_checkpoint(tmp_path, tokenizer=False)
    config, name = ModelConfig.from_dir(model), f"{UP.removesuffix('weight')}{own}"
    wanted = set(tensor_shapes(config))
    for found in (wanted | {name}, (wanted | {name}) - {UP}):
        with pytest.raises(
            ConfigError, match=f"; {name} is of quantized weights, and config.json has no quantization_"
        ):
            check_names(wanted, found, model, config)
    with pytest.raises(ConfigError, match=rf"1 tensors are missing: {UP}$"):
        check_names(wanted, wanted - {UP}, model, config)


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("model-00001-of-00002.safetensors", "copy the index"),
        ("consolidated.safetensors", "Mistral's own form: take the model's files for transformers"),
        ("adapter_model.safetensors", "serve the model that it was made for"),
        ("gptq_model-4bit-128g.safetensors", "call it model.safetensors"),
        ("model-Q4_K_M.gguf", "to serve that file, name it in place of the folder"),
        ("pytorch_model.bin", r"AutoModelForCausalLM.from_pretrained\('/.*'\).save_pretrained\('/.*'\)"),
        ("consolidated.00.pth", "what the transformers library saves"),
    ],
)
def test_weights_of_another_form_are_told_of(tmp_path: Path, name: str, way_out: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=f"it has {name}; .*{way_out}.* or use --load-format dummy"):
        safetensors_files(tmp_path)
