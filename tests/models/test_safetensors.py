"""Files of weights that no worker could read are refused before one starts, with what to do."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from kvferry.common.errors import ConfigError
from kvferry.models.checkpoint import check_act_order, check_checkpoint, check_names, tensor_shapes
from kvferry.models.config import ModelConfig
from kvferry.models.heads import has_other_head
from kvferry.models.parts.config_fields import ConfigFields
from kvferry.models.quantization_config import read_quantization
from kvferry.models.stored.safetensors import read_header, safetensors_files

from ..checkpoints import write_checkpoint

UP = "model.layers.0.mlp.up_proj.weight"
NESTED = b"[" * 100_000 + b"]" * 100_000


def _rewrite(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_bytes_of_tensors_lie_one_behind_the_other(tmp_path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    model = write_checkpoint(tmp_path, tokenizer=False)
    path = model / "model.safetensors"
    begin, whole = read_header(path).end, path.read_bytes()
    header, data = json.loads(whole[8:begin]), whole[begin:]
    del header["__metadata__"]
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


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ({"dtype": 4}, "malformed: Expected `str`"),
        ({"shape": [64, -1]}, "malformed: Expected `int` >= 0"),
        ({"shape": [64, True]}, "malformed: Expected `int`, got `bool`"),
        ({"shape": [64, 10**30]}, "malformed: Expected `int` <="),
        ({"shape": "64"}, "malformed: Expected `array`"),
        ({"data_offsets": [8]}, "malformed: Expected `array` of length 2"),
        ({"data_offsets": [8, 4]}, f"by its header {UP} begins at 8 and ends at 4"),
        ({"data_offsets": [0.0, 8]}, "malformed: Expected `int`, got `float`"),
        ({"data_offsets": [0, True]}, "malformed: Expected `int`, got `bool`"),
        ({"data_offsets": [0, 10**30]}, "malformed: Expected `int` <="),
        ({"data_offsets": None}, "malformed: Expected `array`, got `null`"),
    ],
)
def test_what_a_header_says_of_a_tensor_is_checked_once(tmp_path: Path, damage: dict[str, object], why: str) -> None:
    path = tmp_path / "model.safetensors"
    _rewrite(path, {UP: {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]} | damage}, bytes(8))
    with pytest.raises(ConfigError, match=rf"{path} cannot be read: .*{UP}.*") as raised:
        read_header(path)
    assert why in str(raised.value)


@pytest.mark.parametrize("text", [b"[]", b"null", b'{"\xff": {}}', b'{"a": {"b": NaN}}', b'{"a": ' + NESTED + b"}"])
def test_other_headers_are_told_of(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ConfigError, match=rf"{path} cannot be read: its header is malformed: "):
        read_header(path)


def test_metadata_have_any_form_and_entries_may_say_more(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    told = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}
    _rewrite(path, {"__metadata__": {"dtype": 3}, UP: told | {"more": {}}}, bytes(8))
    header = read_header(path)
    assert header.entries == {UP: ("F32", (1, 2), header.end, header.end + 8)}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"[]", "holds no JSON object"),
        (b"{}", "is not an index of safetensors files"),
        (b'{"weight_map": ["a"]}', "is not an index of safetensors files"),
        (b'{"weight_map": ' + NESTED + b"}", "is not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        (b'{"weight_map": {"a": "../b"}}', "names '../b', which is no file beside it"),
    ],
)
def test_other_indexes_are_told_of(tmp_path: Path, text: bytes, why: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text)
    with pytest.raises(ConfigError, match=f"{index} {why}"):
        safetensors_files(tmp_path)


def test_a_head_is_compared_no_further_than_its_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 1 << 61]}
    _rewrite(tmp_path / "model.safetensors", dict.fromkeys(("lm_head.weight", "model.embed_tokens.weight"), told), b"8")
    pread, reads = os.pread, []

    def counted(file: int, size: int, start: int) -> bytes:
        reads.append(start)
        assert len(reads) < 20
        return pread(file, size, start)

    monkeypatch.setattr(os, "pread", counted)
    assert not has_other_head(tmp_path)


def test_groups_of_inputs_that_no_memory_holds_are_told_of(tmp_path: Path) -> None:
    told = {"dtype": "I32", "shape": [1 << 59], "data_offsets": [0, 1 << 61]}
    module = UP.removesuffix(".weight")
    _rewrite(tmp_path / "model.safetensors", {f"{module}.g_idx": told}, bytes(8))
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": True}
    quantization = read_quantization(ConfigFields(tmp_path / "config.json", {"quantization_config": gptq}))
    with pytest.raises(ConfigError, match=rf"cannot be read: {module}\.g_idx: MemoryError"):
        check_act_order(tmp_path, quantization, [module])
