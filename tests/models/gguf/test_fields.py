"""Numbers of a file's fields, and what is told of one that is not there."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from kvferry.common.errors import ConfigError
from kvferry.models.gguf.convert import convert_gguf
from kvferry.models.gguf.fields import GgufFields


def _write(path: Path, **numbers: float) -> GgufFields:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in numbers.items():
        (writer.add_float64 if name.startswith("double") else writer.add_float32)(name, value)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return GgufFields(gguf.GGUFReader(path))


@pytest.mark.parametrize("meant", [1e-05, 1e-06, 9.99999e-06, 0.0707, 0.1, 1.0, 10_000.0, 500_000.0, 1e11])
def test_a_number_is_the_decimal_that_was_meant(tmp_path: Path, meant: float) -> None:
    assert _write(tmp_path / "m.gguf", x=meant).number("x") == meant


def test_a_number_keeps_all_the_digits_that_a_float32_has(tmp_path: Path) -> None:
    fields = _write(tmp_path / "m.gguf", theta=11158839.92507748, third=1 / 3, double=1 / 3, double_large=1e300)
    assert fields.number("theta") == 11158840.0  # Hunyuan's
    assert np.float32(fields.number("third")) == np.float32(1 / 3)
    assert fields.number("double") == 1 / 3 and fields.number("double_large") == 1e300


def test_a_field_that_is_missing_is_named_without_quotes(tmp_path: Path) -> None:
    _write(tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match=r"m\.gguf is not a model that kvferry can read: no field llama\.\w+$"):
        convert_gguf(tmp_path / "m.gguf", tmp_path, lambda _fraction: None)
