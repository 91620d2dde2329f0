"""How threads share out the tiles of a product."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kvferry.engine.cpu import compiler


@pytest.mark.slow
def test_each_tile_is_taken_once_however_unequal_the_threads(tmp_path: Path) -> None:
    try:
        command = compiler.find_compiler()
    except compiler.NativeUnavailable as reason:
        pytest.skip(str(reason))
    source = Path(compiler.__file__).parent / "native"
    program = tmp_path / "team"
    flags = ["-std=c++20", "-O2", "-pthread", f"-I{source}", "-o", str(program)]
    subprocess.run([*command, *flags, str(Path(__file__).with_name("team.cpp"))], check=True, timeout=300)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True, timeout=300)
    failures, stolen = map(int, done.stdout.split())
    assert failures == 0
    assert stolen > 0, "the fast ones take nothing from the slow ones"
