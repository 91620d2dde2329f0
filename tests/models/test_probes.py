"""Probes are kept by checkpoint and form, and compared with one another."""

from __future__ import annotations

import os
from pathlib import Path

from kvferry.models.probes import keep_probe, kept_probes, probe_distance

from ..checkpoints import write_checkpoint

PLAIN, INT8, INT4 = (-1.0, -2.0), (-1.0, -2.125), (-1.5, -2.25)


def test_what_is_kept_is_found_until_the_checkpoint_changes(tmp_path: Path) -> None:
    model_dir, cache = write_checkpoint(tmp_path / "m", tokenizer=False), tmp_path / "cache"
    assert kept_probes(model_dir, ["plain"], cache=cache) == {}
    keep_probe(model_dir, "plain", (0.0,), cache=cache)
    keep_probe(model_dir, "plain", PLAIN, cache=cache)
    keep_probe(model_dir, "int4", INT4, cache=cache)
    assert kept_probes(model_dir, ["plain", "int4", "int8"], cache=cache) == {"plain": PLAIN, "int4": INT4}
    os.utime(model_dir / "config.json", ns=(1, 1))
    assert kept_probes(model_dir, ["plain"], cache=cache) == {}


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    model_dir = write_checkpoint(tmp_path / "m", tokenizer=False)
    (tmp_path / "file").write_text("")
    keep_probe(model_dir, "plain", PLAIN, cache=tmp_path / "file")
    assert kept_probes(model_dir, ["plain"], cache=tmp_path / "file") == {}
    (tmp_path / "probes").mkdir()
    keep_probe(model_dir, "plain", PLAIN, cache=tmp_path)
    next((tmp_path / "probes").iterdir()).write_text("{")
    assert kept_probes(model_dir, ["plain"], cache=tmp_path) == {}


def test_the_distance_is_that_of_the_forms_that_differ_most() -> None:
    assert probe_distance([]) is probe_distance([PLAIN]) is probe_distance([PLAIN, ()]) is None
    assert probe_distance([PLAIN, INT8]) == 0.0625
    assert probe_distance([PLAIN, INT8, INT4]) == 0.375
