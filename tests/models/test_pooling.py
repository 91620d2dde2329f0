"""The files of sentence-transformers decide how a checkpoint's embeddings are pooled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kvferry.common.errors import ConfigError
from kvferry.common.request import Pooling
from kvferry.models.pooling import EmbeddedTexts, read_embedded_texts, read_pooling

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


def test_a_pooling_that_is_named_and_not_there_is_refused(tmp_path: Path) -> None:
    """Else the vectors would be the last token's, without a word."""
    with pytest.raises(ConfigError, match=r"names 1_Pooling, and there is no .*1_Pooling/config\.json"):
        read_pooling(_write(tmp_path, None, ["Transformer", "Pooling"]))


def test_modules_without_a_pooling_leave_the_usual_folder(tmp_path: Path) -> None:
    assert read_pooling(_write(tmp_path, {"pooling_mode": "mean"}, ["Transformer", "Normalize"])) is Pooling.MEAN


@pytest.mark.parametrize("path", ["1_Pooling/", "1_Pooling"])
def test_a_modules_folder_may_end_in_a_slash(tmp_path: Path, path: str) -> None:
    _write(tmp_path, {"pooling_mode_mean_tokens": True})
    (tmp_path / "modules.json").write_text(json.dumps([{"type": PREFIX + "Pooling", "path": path}]))
    assert read_pooling(tmp_path) is Pooling.MEAN


def test_two_poolings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"modules\.json: embeddings are pooled once, and it names 2 modules"):
        read_pooling(_write(tmp_path, {"pooling_mode": "mean"}, ["Transformer", "Pooling", "Pooling"]))


def test_modules_of_the_checkpoints_own_code_are_told_of(tmp_path: Path) -> None:
    _write(tmp_path, {"pooling_mode": "mean"}, ["Transformer", "Pooling"])
    with capture_logs() as told:
        read_pooling(tmp_path)
    assert not told
    entries = [{"type": "custom_st.Transformer", "path": ""}, {"type": PREFIX + "Pooling", "path": "1_Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    with capture_logs() as told:
        assert read_pooling(tmp_path) is Pooling.MEAN
    [entry] = told
    assert entry["log_level"] == "warning" and "modules.json: custom_st.Transformer is code" in entry["reason"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("config.json", "{}", EmbeddedTexts()),
        ("sentence_bert_config.json", "{}", EmbeddedTexts()),
        ("sentence_bert_config.json", '{"max_seq_length": null, "do_lower_case": false}', EmbeddedTexts()),
        ("sentence_bert_config.json", '{"max_seq_length": 512, "do_lower_case": true}', EmbeddedTexts(512, True)),
        ("sentence_xlm-roberta_config.json", '{"max_seq_length": 8}', EmbeddedTexts(8)),
    ],
)
def test_the_texts_that_a_model_has_learnt(tmp_path: Path, name: str, text: str, expected: EmbeddedTexts) -> None:
    (tmp_path / name).write_text(text)
    assert read_embedded_texts(tmp_path) == expected


@pytest.mark.parametrize(
    "text", ['{"max_seq_length": 0}', '{"max_seq_length": "8"}', '{"max_seq_length": true}', '{"do_lower_case": 1}']
)
def test_texts_that_are_said_otherwise_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "sentence_bert_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"sentence_bert_config\.json: (max_seq_length|do_lower_case) must be"):
        read_embedded_texts(tmp_path)
