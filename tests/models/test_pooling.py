"""The files of sentence-transformers decide how a checkpoint's embeddings are pooled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kvferry.common.errors import ConfigError
from kvferry.common.request import Pooling
from kvferry.models.pooling import read_pooling

PREFIX = "sentence_transformers.models."


def _write(path: Path, pooling: dict[str, object] | None, modules: list[str] | None = None) -> Path:
    if modules is not None:
        entries = [
            {"idx": index, "name": str(index), "path": "1_Pooling" if kind == "Pooling" else "", "type": PREFIX + kind}
            for index, kind in enumerate(modules)
        ]
        (path / "modules.json").write_text(json.dumps(entries))
    if pooling is not None:
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return path


def test_a_model_that_generates_is_pooled_by_its_last_token(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) is Pooling.LAST


def test_code_that_is_not_run_is_told_of_where_vectors_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModelForCausalLM": "modeling_qwen.Qwen2ForCausalLM"}}')
    with capture_logs() as told:
        read_pooling(tmp_path)
        assert not told, "a model that generates"
        read_pooling(_write(tmp_path, {"pooling_mode": "lasttoken"}))
    [entry] = told
    assert entry["log_level"] == "warning" and "auto_map" in entry["reason"]
    (tmp_path / "config.json").write_text("{}")
    with capture_logs() as told:
        read_pooling(tmp_path)
    assert not told


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, Pooling.LAST),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, Pooling.MEAN),
        ({"pooling_mode_cls_token": True, "word_embedding_dimension": 8}, Pooling.CLS),
        ({"pooling_mode": "mean"}, Pooling.MEAN),
    ],
)
def test_the_pooling_modules_file_decides(tmp_path: Path, config: dict[str, object], expected: Pooling) -> None:
    assert read_pooling(_write(tmp_path, config, ["Transformer", "Pooling", "Normalize"])) is expected


@pytest.mark.parametrize(
    ("config", "modules", "named"),
    [
        ({"pooling_mode_max_tokens": True}, None, "pooling_mode_max_tokens"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None, "pooling_mode_cls_token"),
        ({"pooling_mode": "weightedmean"}, None, "weightedmean"),
        ({}, None, "none"),
        (None, ["Transformer", "Pooling", "Dense"], "Dense"),
    ],
)
def test_what_no_worker_does_is_refused_by_name(
    tmp_path: Path, config: dict[str, object] | None, modules: list[str] | None, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        read_pooling(_write(tmp_path, config, modules))


@pytest.mark.parametrize("text", ["{", "{}", '["x"]', '[{"type": "a.Pooling", "path": "../x"}]'])
def test_a_broken_list_of_modules_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(ConfigError, match=r"modules\.json"):
        read_pooling(tmp_path)
