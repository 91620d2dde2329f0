from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvferry.benchmarks.shared.long_model import with_positions
from kvferry.common.errors import ConfigError


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64, "hidden_size": 8}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_model_with_enough_positions_is_taken_as_it_is(model_dir: Path, tmp_path: Path) -> None:
    assert with_positions(model_dir, 64, tmp_path / "made") == model_dir
    assert not (tmp_path / "made").exists()


def test_longer_model_has_the_same_weights_and_another_config(model_dir: Path, tmp_path: Path) -> None:
    made = with_positions(model_dir, 512, tmp_path / "made")
    assert made.name == "tiny-512"
    assert json.loads((made / "config.json").read_text()) == {"max_position_embeddings": 512, "hidden_size": 8}
    assert (made / "model.safetensors").resolve() == model_dir / "model.safetensors"
    assert json.loads((model_dir / "config.json").read_text())["max_position_embeddings"] == 64


def test_second_call_makes_it_anew_in_the_same_place(model_dir: Path, tmp_path: Path) -> None:
    first = with_positions(model_dir, 512, tmp_path / "made")
    (model_dir / "config.json").write_text(json.dumps({"max_position_embeddings": 64, "hidden_size": 16}))
    assert with_positions(model_dir, 512, tmp_path / "made") == first
    assert json.loads((first / "config.json").read_text())["hidden_size"] == 16


def test_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config.json"):
        with_positions(tmp_path, 512)
