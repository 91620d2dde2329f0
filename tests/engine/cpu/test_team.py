"""How threads share out the tiles of a product."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kvferry.engine.cpu import compiler

SANITIZED = ("-g1", "-fsanitize=thread")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), SANITIZED], ids=["fast", "with races looked for"])
def test_each_tile_is_taken_once_however_unequal_the_threads(tmp_path: Path, more: tuple[str, ...]) -> None:
    try:
        command = compiler.find_compiler()
    except compiler.NativeUnavailable as reason:
        pytest.skip(str(reason))
    source = Path(compiler.__file__).parent / "native"
    program = tmp_path / "team"
    flags = ["-std=c++20", "-O2", "-pthread", *more, f"-I{source}", "-o", str(program)]
    command = (*command, *flags, str(Path(__file__).with_name("team.cpp")))
    built = subprocess.run(command, check=not more, stderr=subprocess.PIPE, timeout=300)
    if built.returncode:
        pytest.skip("the compiler has no thread sanitizer")
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not know this kernel's memory")
    assert done.returncode == 0, done.stderr
    failures, stolen = map(int, done.stdout.split())
    assert failures == 0
    assert stolen > 0, "the fast ones take nothing from the slow ones"
