from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from kvferry.benchmarks.peers.vllm_install import VLLM_VERSION, ensure_vllm
from kvferry.common.errors import ConfigError

API = "def f():\n    agent_config.pthrDelay = 0\n    return 1\n"


def installed(tmp_path: Path, api: str) -> Path:
    """A directory in which pip has nothing left to do; returns its packages."""
    packages = tmp_path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "nixl_cu12").mkdir(parents=True)
    (packages / "nixl_cu12" / "_api.py").write_text(api)
    (tmp_path / "bin").mkdir()
    for name in ("python", "vllm"):
        (tmp_path / "bin" / name).touch()
    return packages


def test_metadata_and_progress_delay_are_put_right_once(tmp_path: Path) -> None:
    packages = installed(tmp_path, API)
    ensure_vllm(tmp_path)
    patched = (packages / "nixl_cu12" / "_api.py").read_text()
    assert '"NIXL_PTHR_DELAY_US", "0"' in patched
    compile(patched, "_api.py", "exec")
    names = {found.name: found.version for found in importlib.metadata.distributions(path=[str(packages)])}
    assert names == {"vllm": f"{VLLM_VERSION}+cpu"}
    ensure_vllm(tmp_path)
    assert (packages / "nixl_cu12" / "_api.py").read_text() == patched


def test_other_nixl_is_refused_rather_than_left_spinning(tmp_path: Path) -> None:
    installed(tmp_path, "agent_config.delay = 0\n")
    with pytest.raises(ConfigError, match="pthrDelay"):
        ensure_vllm(tmp_path)
