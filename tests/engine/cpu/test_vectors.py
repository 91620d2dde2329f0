"""Functions of vectors, in each set that this processor has: at the ends of what a float32 can be, and between them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kvferry.common.processor import processor_features
from kvferry.engine.cpu import compiler
from kvferry.engine.cpu.compiler import ALL_SETS

PRINTED = """\
exp2 inf: inf
exp2 3e+38: inf
exp2 200: inf
exp2 -inf: 0
exp2 -3e+38: 0
sigmoid -inf: 0
sigmoid inf: 1
tanh -inf: -1
tanh inf: 1
silu -3e+38: -0
silu inf: inf
gelu_tanh -1e+20: -0
gelu_tanh inf: inf
silu_rough -3e+38: -0
silu_rough inf: inf
rough exp2, silu within 3e-4: 1 1
rows across: 16
"""


@pytest.mark.parametrize("isa", ALL_SETS)
def test_functions_are_what_they_say(tmp_path: Path, isa: str) -> None:
    try:
        command = compiler.find_compiler()
    except compiler.NativeUnavailable as reason:
        pytest.skip(str(reason))
    if not ALL_SETS[isa] <= processor_features():
        pytest.skip(f"this processor lacks {isa}")
    source, program = Path(compiler.__file__).parent / "native", tmp_path / "vectors"
    flags = [flag for flag in compiler._flags(isa) if flag != "-fPIC"]
    here = str(Path(__file__).with_name("vectors.cpp"))
    subprocess.run([*command, *flags, f"-I{source}", "-o", str(program), here], check=True, timeout=300)
    assert subprocess.run([str(program)], capture_output=True, text=True, check=True, timeout=60).stdout == PRINTED
