"""Tensors that a file has twice, or that are not what their names say: refused by name, before anything is kept."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from kvferry.common.errors import ConfigError
from kvferry.models.default import gguf_model_dir
from kvferry.models.gguf import rope
from kvferry.models.gguf.files import read_gguf
from kvferry.models.gguf.tensors import Part

from ...quantized import SHAPE, write_gguf

NUM_CLAIMED = 1 << 24


def _part(path: Path, number: int, *names: str) -> None:
    """Write one file of two of a model."""
    writer = gguf.GGUFWriter(path.with_name(f"m-{number + 1:05}-of-00002.gguf"), "llama")
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", 2)
    writer.add_int32("split.tensors.count", 3)
    for name in names:
        writer.add_tensor(name, np.ones(32, np.float32))
    _close(writer)


def _close(writer: gguf.GGUFWriter) -> None:
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def test_a_tensor_in_two_files_of_a_model_is_refused_with_both(tmp_path: Path) -> None:
    first = tmp_path / "m-00001-of-00002.gguf"
    _part(first, 0, "a", "b")
    _part(first, 1, "c")
    assert [tensor.name for tensor in read_gguf(first)[1]] == ["a", "b", "c"]
    _part(first, 1, "b")
    told = r"the tensor b is in two of its files, m-00001-of-00002\.gguf and m-00002-of-00002\.gguf"
    with pytest.raises(ConfigError, match=told):
        gguf_model_dir(first, cache=tmp_path / "cache")


def test_two_tensors_that_are_one_of_a_checkpoint_are_refused(tmp_path: Path) -> None:
    extra = {"token_embd_norm.weight": np.ones(SHAPE.hidden_size, np.float32)}  # LFM2's name of output_norm
    write_gguf(tmp_path / "m.gguf", "llama", {"": "Q8_0"}, extra=extra)
    with pytest.raises(ConfigError, match=r"read: 2 of its tensors are the checkpoint's model\.norm\.weight"):
        gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", ["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"])
@pytest.mark.parametrize(
    ("factors", "told"),
    [
        (np.ones(0, np.float32), r"has the shape \[0\]; it should be one row of 1 to 4096 factors"),
        (np.ones((1, 32), np.float32), r"has the shape \[1, 32\]; it should be one row"),
        (np.array([1.0] * 31 + [0.0], np.float32), r"has the factor 0\.0; frequencies are divided by finite ones"),
        (np.array([-1.0] + [1.0] * 31, np.float32), r"has the factor -1\.0; "),
        (np.array([np.inf] * 32, np.float32), r"has the factor inf; "),
        (np.array([np.nan] * 32, np.float32), r"has the factor nan; "),
    ],
)
def test_what_cannot_divide_frequencies_is_refused(
    tmp_path: Path, name: str, factors: np.ndarray[tuple[int, ...], np.dtype[np.float32]], told: str
) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", {"": "Q8_0"}, extra={name: factors})
    with pytest.raises(ConfigError, match=rf"can read: {name} {told}"):
        gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")


def test_factors_are_counted_before_any_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a few blocks of a disk may claim millions, of zeros."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor_info("rope_freqs.weight", (NUM_CLAIMED,), np.dtype(np.float32), 4 * NUM_CLAIMED)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file, writer.close):
        step()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 4 * NUM_CLAIMED + 64)
    reader = gguf.GGUFReader(path)
    monkeypatch.setattr(Part, "whole", classmethod(lambda _cls, _source: pytest.fail("numbers are read")))
    with pytest.raises(ValueError, match=rf"rope_freqs\.weight has the shape \[{NUM_CLAIMED}\]"):
        rope.rope_factors(reader.tensors)


def test_factors_in_few_bits_are_read_as_what_they_mean(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    halves = gguf.quants.quantize(np.full(32, 1.5, np.float32), gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("rope_freqs.weight", halves, raw_dtype=gguf.GGMLQuantizationType.BF16)
    _close(writer)
    assert rope.rope_factors(gguf.GGUFReader(tmp_path / "m.gguf").tensors) == {"rope_freqs.weight": [1.5] * 32}


def test_a_file_without_an_embedding_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", {"": "Q8_0"})
    path.write_bytes(path.read_bytes().replace(b"token_embd.weight", b"token_embx.weight"))
    with pytest.raises(ConfigError, match=r"can read: it has no tensor token_embd\.weight$"):
        gguf_model_dir(path, cache=tmp_path / "cache")
