"""The library of each ARM instruction set, run by an emulator: it computes what AVX2's does, of the same inputs.

Needed are a cross compiler (Debian: g++-aarch64-linux-gnu) and QEMU (qemu-user), which are on few machines. On an ARM
machine all other tests of this folder run on its own sets.
"""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvferry.common.processor import processor_features
from kvferry.engine.cpu import compiler
from kvferry.engine.cpu.compiler import ALL_SETS

_CROSS = "aarch64-linux-gnu-g++"
_EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
_TIMEOUT_S = 900
# Processors that have just what a set needs, if QEMU knows one; a library that needs more is killed on it.
_PROCESSORS = {"neon": "neoverse-n1", "neon_float32": "neoverse-n1", "neon_bf16": "neoverse-v1"}
# Of the largest value. BFDOT rounds each product by itself: a sum of a few hundred differs by its last bits, which a
# model's roundings to bfloat16 make a unit in the last place of some, 2^-8 of them.
_PRODUCTS, _LOGITS = 2e-6, 2**-7

Result = npt.NDArray[np.uint32] | bool

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sets")


@pytest.mark.parametrize(("isa", "other"), [("neon", "avx2"), ("neon_float32", "avx2_float32")])
def test_widened_products_and_all_else_are_the_bits_of_avx2(isa: str, other: str, programs: Path) -> None:
    for name, ours, theirs in _pairs(isa, other, programs):
        assert _are_equal(ours, theirs), name


def test_products_of_bfloat16_are_near_and_all_else_is_the_bits_of_avx2(programs: Path) -> None:
    differing = set()
    for name, ours, theirs in _pairs("neon_bf16", "avx2", programs):
        if _are_equal(ours, theirs):
            continue
        assert not isinstance(ours, bool) and not isinstance(theirs, bool), name
        a, b = (values.view(np.float32).astype(np.float64) for values in (ours, theirs))
        assert np.isfinite(a).all(), name
        assert abs(a - b).max() <= abs(b).max() * (_LOGITS if "logits" in name else _PRODUCTS), name
        differing.add(name.split(" of ")[0])
    assert differing == {"product", "strips", "exact logits", "fast logits"}


def _pairs(isa: str, other: str, folder: Path) -> list[tuple[str, Result, Result]]:
    """Return what either set makes of the same: a name, one's result, the other's. Both keep their own promises."""
    if not ALL_SETS[other] <= processor_features():
        pytest.skip(f"this processor lacks {other}")
    emulator = next(filter(shutil.which, _EMULATORS), None)
    if emulator is None or shutil.which(_CROSS) is None:
        pytest.skip(f"there is no {_EMULATORS[0]} or no {_CROSS}: apt install qemu-user g++-aarch64-linux-gnu")
    known = subprocess.run([emulator, "-cpu", "help"], capture_output=True, text=True, check=False).stdout.split()
    processor = _PROCESSORS[isa] if _PROCESSORS[isa] in known else "max"
    ours = _results((emulator, "-cpu", processor), (_CROSS, "-static"), isa, folder)
    theirs = _results((), compiler.find_compiler(), other, folder)
    assert [name for name, _ in ours] == [name for name, _ in theirs] and len(ours) > 30
    for name, result in (*ours, *theirs):
        assert result is not False, f"{name}: not the same bits"
    return [(name, a, b) for (name, a), (_, b) in zip(ours, theirs, strict=True)]


@cache
def _results(emulator: tuple[str, ...], command: tuple[str, ...], isa: str, folder: Path) -> list[tuple[str, Result]]:
    """Compile and run `sets.cpp`; return its lines."""
    here, source, program = Path(__file__).parent, Path(compiler.__file__).parent / "native", folder / isa
    flags = [flag for flag in compiler._flags(isa) if flag != "-fPIC"]
    includes = [f"-I{source}", f"-I{here}"]
    subprocess.run(
        [*command, *flags, *includes, "-o", str(program), str(here / "sets.cpp")], check=True, timeout=_TIMEOUT_S
    )
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)
    return [_result(line) for line in done.stdout.splitlines()]


def _result(line: str) -> tuple[str, Result]:
    name, _, told = line.partition(": ")
    if told in ("same", "other"):
        return name, told == "same"
    return name, np.array([int(bits, 16) for bits in told.split()], np.uint32)


def _are_equal(ours: Result, theirs: Result) -> bool:
    """To the bit, zeros' signs too; but one NaN is as good as another."""
    if isinstance(ours, bool) or isinstance(theirs, bool):
        return ours is theirs
    return bool(((ours == theirs) | (_is_nan(ours) & _is_nan(theirs))).all())


def _is_nan(values: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    return np.isnan(values.view(np.float32))
