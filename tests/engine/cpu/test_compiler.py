"""Instruction sets are chosen by what the processor has, and a library is compiled once for each."""

from __future__ import annotations

import ctypes
import errno
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog

from kvferry.common.errors import ConfigError
from kvferry.engine.cpu import build, compiler
from kvferry.engine.cpu.compiler import (
    ARM_FLOAT32_SETS,
    ARM_SETS,
    X86_FLOAT32_SETS,
    X86_SETS,
    NativeUnavailable,
)
from kvferry.models.default import cache_dir

from .widened import WIDENED

COPYING_COMPILER = """
import os, sys
if "-o" in sys.argv:
    library = open(os.environ["MADE"], "rb").read()
    with open(sys.argv[sys.argv.index("-o") + 1], "xb") as file:
        for begin in range(0, len(library), 65536):
            file.write(library[begin : begin + 65536])
            file.flush()
            os.sched_yield()
"""


def _features(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the processor have these."""
    monkeypatch.setattr(build, "processor_features", lambda: frozenset(names))


@pytest.fixture
def _on_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SETS", X86_SETS)
    monkeypatch.setattr(build, "FLOAT32_SETS", X86_FLOAT32_SETS)


@pytest.fixture
def _on_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SETS", ARM_SETS)
    monkeypatch.setattr(build, "FLOAT32_SETS", ARM_FLOAT32_SETS)


def _no_lock(file: int, how: int) -> None:
    raise OSError(errno.ENOLCK, "this file system has none")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("has_locks", [True, False])
def test_concurrent_first_uses_build_one_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool
) -> None:
    """Without locks they race for the file: a stand-in for the compiler takes what the real one made, bit by bit."""
    if not has_locks:
        monkeypatch.setattr("fcntl.flock", _no_lock)
    made = compiler.compiled(WIDENED, compiler.find_compiler(), cache_dir() / "native")
    builds: list[str] = []
    build_library = compiler._build

    def counted(command: tuple[str, ...], isa: str, library: Path, *, is_portable: bool) -> None:
        builds.append(isa)
        build_library(command, isa, library, is_portable=is_portable)

    monkeypatch.setattr(compiler, "_build", counted)
    stand_in = tmp_path / "cxx"
    stand_in.write_text(f"#!{sys.executable}\n{COPYING_COMPILER}")
    stand_in.chmod(0o755)
    monkeypatch.setenv("MADE", str(made))
    monkeypatch.setattr(compiler, "_COMPILERS", (str(stand_in),))
    failures: list[BaseException] = []

    def load() -> None:
        try:
            build.load(tmp_path / "new", WIDENED)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    [library] = (tmp_path / "new" / "native").iterdir()
    assert library.name != made.name and library.read_bytes() == made.read_bytes()
    assert len(builds) == 1 or not has_locks


@pytest.mark.usefixtures("_on_x86")
def test_without_a_compiler_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _features(monkeypatch, *X86_SETS["avx2"])
    monkeypatch.setattr(compiler, "_COMPILERS", ("no-such-compiler",))
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler is installed \(no-such-compiler\)"):
        build.load(tmp_path)


@pytest.mark.usefixtures("_on_x86")
def test_a_processor_without_any_set_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _features(monkeypatch, "avx", "f16c", "sse2")
    with pytest.raises(NativeUnavailable, match="the processor lacks avx2, fma"):
        build.load(tmp_path)


@pytest.mark.usefixtures("_on_x86")
def test_a_failing_compiler_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _features(monkeypatch, *X86_SETS["avx512_bf16"])
    failing = tmp_path / "cxx"
    failing.write_text(f"#!{sys.executable}\nimport sys\nif '-o' in sys.argv:\n    sys.exit('no such target')\n")
    failing.chmod(0o755)
    monkeypatch.setattr(compiler, "_COMPILERS", (str(failing),))
    assert shutil.which(str(failing))
    with pytest.raises(NativeUnavailable, match="no such target"):
        build.load(tmp_path / "cache")
    assert not list((tmp_path / "cache" / "native").iterdir())


@pytest.mark.usefixtures("native")
def test_a_compiler_that_is_too_old_leaves_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of GCC 9 and before, which several long-lived systems have as `c++`: here beside a newer one."""
    made = compiler.compiled(WIDENED, compiler.find_compiler(), cache_dir() / "native")
    old, new = tmp_path / "old-cxx", tmp_path / "new-cxx"
    old.write_text(
        f"#!{sys.executable}\nimport sys\nif '-o' in sys.argv:\n    sys.exit(\"unrecognized option '-std=c++20'\")\n"
    )
    new.write_text(f"#!{sys.executable}\n{COPYING_COMPILER}")
    for stand_in in (old, new):
        stand_in.chmod(0o755)
    monkeypatch.setenv("MADE", str(made))
    monkeypatch.setattr(compiler, "_COMPILERS", (str(old), str(new)))
    assert Path(build.load(tmp_path / "cache", WIDENED)._name).parent == tmp_path / "cache" / "native"
    monkeypatch.setattr(compiler, "_COMPILERS", (str(old), "no-such-compiler"))
    with pytest.raises(NativeUnavailable, match=r"old-cxx failed: unrecognized option '-std=c\+\+20'"):
        build.load(tmp_path / "none", WIDENED)


@pytest.mark.usefixtures("native")
def test_a_compiler_is_tried_before_it_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [able] = compiler.find_compilers()[:1]
    assert build.describe(tmp_path, WIDENED) == f"{WIDENED}, built by {' '.join(able)}"
    assert not list(tmp_path.iterdir())
    failing = tmp_path / "cxx"
    failing.write_text(f"#!{sys.executable}\nimport sys\nif '-o' in sys.argv:\n    sys.exit('no such header')\n")
    failing.chmod(0o755)
    monkeypatch.setattr(compiler, "_COMPILERS", (str(failing), *compiler._COMPILERS))
    assert build.describe(tmp_path, WIDENED) == f"{WIDENED}, built by {' '.join(able)}"
    monkeypatch.setattr(compiler, "_COMPILERS", (str(failing),))
    with pytest.raises(NativeUnavailable, match="cxx failed: no such header"):
        build.describe(tmp_path, WIDENED)


# --- which set --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_on_x86")
@pytest.mark.parametrize(
    ("features", "sets"),
    [
        (X86_SETS["amx"], ["amx", "avx512_bf16", "avx2"]),
        (X86_SETS["avx512_bf16"], ["avx512_bf16", "avx2"]),
        (X86_SETS["avx512_bf16"] - {"avx512_bf16"}, ["avx2"]),
        (X86_SETS["avx2"] | {"amx_bf16"}, ["avx2"]),
    ],
)
def test_the_best_set_comes_first(features: frozenset[str], sets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _features(monkeypatch, *features)
    assert build.usable_sets() == sets
    assert build.usable_sets("avx2") == ["avx2"]
    assert build.describe(cache_dir(), "avx2").startswith("avx2, ")


@pytest.mark.usefixtures("_on_arm")
@pytest.mark.parametrize(
    ("features", "sets"),
    [
        (ARM_SETS["neon_bf16"] | {"fp", "asimd", "sve"}, ["neon_bf16", "neon"]),
        (ARM_SETS["neon"] | {"fp", "asimd", "i8mm"}, ["neon"]),
    ],
)
def test_the_best_set_of_arm_comes_first(
    features: frozenset[str], sets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _features(monkeypatch, *features)
    assert build.usable_sets() == sets
    assert build.usable_sets("neon") == ["neon"]
    assert build.usable_sets(is_float32=True) == build.usable_sets("neon", is_float32=True) == ["neon_float32"]
    with pytest.raises(ConfigError, match="cpu_isa: avx2 needs avx2, f16c, fma, which this processor lacks; use auto"):
        build.usable_sets("avx2")


@pytest.mark.usefixtures("_on_arm")
def test_what_an_old_processor_of_arm_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _features(monkeypatch, "fp", "asimd", "crc32")
    with pytest.raises(NativeUnavailable, match="the processor lacks asimddp, atomics"):
        build.load(tmp_path)
    with pytest.raises(ConfigError, match="cpu_isa: neon_bf16 needs asimddp, atomics, bf16, i8mm, which"):
        build.usable_sets("neon_bf16")


@pytest.mark.usefixtures("_on_arm")
def test_bfloat16_is_not_asked_for_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    _features(monkeypatch, *ARM_SETS["neon_bf16"])
    with pytest.raises(ConfigError, match="neon_bf16 computes bfloat16 alone; for float32 use auto or neon"):
        build.usable_sets("neon_bf16", is_float32=True)


def test_each_compiler_is_told_of_arms_extensions_as_it_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> str:
        commands.append(command)
        Path(command[command.index("-o") + 1]).touch()
        return ""

    monkeypatch.setattr(compiler, "_run", run)
    for command in (("g++",), ("python", "-m", "ziglang", "c++")):
        compiler._build(command, "neon_bf16", tmp_path / "library.so")
    [by_gcc, _, by_zig, _] = commands
    assert "-march=armv8.2-a+dotprod+lse+bf16+i8mm" in by_gcc
    assert "-mcpu=generic+dotprod+lse+bf16+i8mm" in by_zig


@pytest.mark.usefixtures("_on_x86")
def test_a_set_that_the_processor_lacks_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _features(monkeypatch, *X86_SETS["avx512_bf16"])
    for ask in (lambda isa: build.describe(tmp_path, isa), lambda isa: build.load(tmp_path, isa)):
        with pytest.raises(ConfigError, match="cpu_isa: amx needs amx_bf16, amx_int8, amx_tile, which this processor"):
            ask("amx")


@pytest.mark.usefixtures("_on_x86")
def test_tiles_that_the_kernel_refuses_leave_the_next_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _features(monkeypatch, *X86_SETS["amx"])
    monkeypatch.setattr(build, "find_compilers", lambda: [("c++",)])

    def loaded_set(cache: Path, isa: str, command: tuple[str, ...]) -> SimpleNamespace:
        def may_run() -> bool:
            return isa != "amx"

        return SimpleNamespace(name=isa, kvferry_may_run=may_run)

    monkeypatch.setattr(build, "load_kept", loaded_set)
    loaded: object = build.load(tmp_path)
    assert isinstance(loaded, SimpleNamespace) and loaded.name == "avx512_bf16"
    with pytest.raises(NativeUnavailable, match="the kernel does not let this process use amx"):
        build.load(tmp_path, "amx")


@pytest.mark.usefixtures("_on_x86")
def test_an_old_compiler_leaves_the_next_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _features(monkeypatch, *X86_SETS["amx"])

    asked: list[str] = []

    def load(folder: Path, isa: str) -> ctypes.CDLL:
        asked.append(isa)
        if isa == "amx":
            raise NativeUnavailable("c++ failed: unrecognized option -mamx-tile")
        return ctypes.CDLL(None)

    monkeypatch.setattr(build, "_load", load)
    with structlog.testing.capture_logs() as logs:
        build.load(tmp_path)
        build.load(tmp_path, "avx512_bf16")
    assert asked == ["amx", "avx512_bf16", "avx512_bf16"]
    [told] = logs
    assert (told["log_level"], told["loaded"]) == ("warning", "avx512_bf16")
    assert told["reasons"] == ["c++ failed: unrecognized option -mamx-tile"]


# --- what came with the package ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("native")
def test_a_prebuilt_library_of_this_source_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = build.usable_sets()[-1]
    path = compiler.compiled(name, compiler.find_compiler(), cache_dir() / "native")
    monkeypatch.setattr(compiler, "PREBUILT", tmp_path)
    monkeypatch.setattr(compiler, "_COMPILERS", ())
    with pytest.raises(NativeUnavailable, match="no C"):
        build.load(tmp_path / "none", WIDENED)
    shutil.copyfile(path, tmp_path / path.name)
    assert build.load(tmp_path / "none", WIDENED)._name == str(tmp_path / path.name)
    assert build.describe(cache_dir(), WIDENED) == f"{WIDENED}, prebuilt"
    (tmp_path / path.name).rename(tmp_path / f"kernels-{WIDENED}-0123456789ab-0123456789ab.so")  # of another source
    with pytest.raises(NativeUnavailable, match="no C"):
        build.load(tmp_path / "none", WIDENED)
