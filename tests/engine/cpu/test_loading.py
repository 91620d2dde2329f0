"""A compiled library is loaded from wherever the cache is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvferry.engine.cpu import build, compiler
from kvferry.engine.cpu.compiler import NativeUnavailable
from kvferry.models.default import cache_dir

from .widened import WIDENED


def test_a_cache_in_the_working_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader looks for a name without a folder in the system's folders alone."""
    try:
        made = compiler.compiled(WIDENED, compiler.find_compiler(), cache_dir() / "native")
    except NativeUnavailable as reason:
        pytest.skip(f"no native code on this machine: {reason}")
    (tmp_path / "native").mkdir()
    shutil.copyfile(made, tmp_path / "native" / made.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVFERRY_CACHE", ".")
    assert build.load(cache_dir(), WIDENED)._name == str(tmp_path / "native" / made.name)
