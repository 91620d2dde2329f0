"""Tests that ask for `isa` run once for each instruction set; AMX over emulated tiles where the processor has none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from kvferry.common.config import CpuIsa
from kvferry.common.errors import ConfigError
from kvferry.engine.cpu import build, compiler
from kvferry.engine.cpu.compiler import SETS, NativeUnavailable
from kvferry.models.default import cache_dir


# To compile what emulates AMX takes a minute of a core, and whoever changes C++ has it compiled each time.
@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name == "amx")) for name in SETS]
)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Have every engine in bfloat16 take this set."""
    name: CpuIsa = request.param
    with pytest.MonkeyPatch.context() as patch:
        try:
            if name == "amx" and "amx" not in build.usable_sets():
                emulate_tiles(patch)
            sets, usable = build.usable_sets(name), build.usable_sets
            patch.setattr(
                build,
                "usable_sets",
                lambda isa="auto", *, is_float32=False: usable(isa, is_float32=True) if is_float32 else sets,
            )
            build.load(cache_dir())
        except (NativeUnavailable, ConfigError) as reason:
            _skip(reason)
        yield name


@pytest.fixture(scope="module")
def native() -> None:
    """Skip what needs the library, where it cannot be built."""
    _load()


@pytest.fixture(scope="module")
def native_float32() -> None:
    """Skip what needs the library of float32, where it cannot be built."""
    _load(is_float32=True)


def _load(*, is_float32: bool = False) -> None:
    try:
        build.load(cache_dir(), is_float32=is_float32)
    except NativeUnavailable as reason:
        _skip(reason)


def _skip(reason: Exception) -> NoReturn:
    pytest.skip(f"no native code on this machine: {reason}")


def emulate_tiles(patch: pytest.MonkeyPatch) -> None:
    """Compile AMX's inner loop over tiles in plain C++, and all else for the best set that the processor has."""
    vectors = next(name for name in build.usable_sets() if name != "amx")
    header, flags = Path(__file__).parent / "tile_unit.hpp", compiler._flags(vectors)
    patch.setitem(SETS, "amx", SETS[vectors])
    plain_flags, source_hash = compiler._flags, compiler._source_hash
    patch.setattr(
        compiler,
        "_flags",
        lambda isa: [*flags, f'-DKVFERRY_TILE_UNIT="{header}"'] if isa == "amx" else plain_flags(isa),
    )

    def hashed(isa: str) -> str:
        return compiler._hash(source_hash(isa).encode(), header.read_bytes()) if isa == "amx" else source_hash(isa)

    patch.setattr(compiler, "_source_hash", hashed)
