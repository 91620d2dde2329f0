from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.benchmarks.shared.shapes import SHAPES, write_checkpoint, write_shape
from kvferry.common.errors import ConfigError
from kvferry.models.config import ModelConfig
from kvferry.models.tokenizer import Tokenizer

from ...engine_driver import Driver, make_engine


@pytest.mark.parametrize("name", SHAPES)
def test_shape_is_a_model_directory_without_weights(name: str, tmp_path: Path) -> None:
    model = ModelConfig.from_dir(write_shape(tmp_path / "new", name, 1234))
    assert (model.max_model_len, model.dtype) == (1234, "bfloat16")
    assert not list((tmp_path / "new").glob("*.safetensors"))


def test_tokenizer_of_a_shape_knows_every_byte_and_bears_unknown_ids(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write_shape(tmp_path, "llama-tiny", 64))
    text = "Zwölf, 12\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([511]) == ""


def test_unknown_shape_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose from llama-3-8b"):
        write_shape(tmp_path, "llama-9", 64)


def test_checkpoint_loads_and_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    answers = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        engine = make_engine(write_checkpoint(tmp_path / name, "llama-tiny", 256, seed))
        driver = Driver(engine)
        answers.append(driver.generate([driver.add([5, 6, 7])]))
    assert answers[0] == answers[1] != answers[2]
