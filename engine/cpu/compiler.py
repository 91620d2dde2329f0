"""Compiles the C++ of `native/`, for one instruction set at a time. Standard library alone: builds of wheels run it.

    kernels-SET-SOURCE-COMPILER.so     SOURCE: a hash of source and flags; COMPILER: of what the compiler says it is

The source is written once: its vectors (`native/machine/vectors.hpp`) and its inner loop
(`native/products/linear.hpp`) are those of the set that the flags allow. A file appears by one rename, so that any
number of processes may build it at once; where the folder can be locked, one does and the others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections import ChainMap
from collections.abc import Callable, Iterator
from pathlib import Path

PREBUILT = Path(__file__).parent / "prebuilt"  # filled in a wheel
_SOURCE = Path(__file__).parent / "native"
_ZIG = "ziglang"  # a Python package, which setup/install.py brings where there is no compiler
_COMPILERS = ("c++", "g++", "clang++", _ZIG)
# One order of sums and one rounding for each: a product and a sum are contracted where the source says so alone.
_FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-pthread", "-w")
_LINK = ("-O3", "-fPIC", "-pthread", "-shared", "-s")
# Whatever C++ library is loaded already may be older than the compiler's, and elsewhere there may be none.
_STATIC = ("-static-libstdc++", "-static-libgcc")
_FLOAT32 = "-DKVFERRY_FLOAT32"
_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"}
_NEON = frozenset({"asimddp", "atomics"})
X86_SETS = {  # what a processor needs, by Linux's names; the best set first
    "amx": _AVX512 | {"amx_tile", "amx_int8", "amx_bf16"},
    "avx512_bf16": _AVX512,
    "avx2": _AVX2,
}
X86_FLOAT32_SETS = {"avx2_float32": _AVX2}  # libraries of models in float32
ARM_SETS = {"neon_bf16": _NEON | {"bf16", "i8mm"}, "neon": _NEON}
ARM_FLOAT32_SETS = {"neon_float32": _NEON}
IS_ARM = platform.machine() == "aarch64"
SETS = ARM_SETS if IS_ARM else X86_SETS  # of this machine's kind
FLOAT32_SETS = ARM_FLOAT32_SETS if IS_ARM else X86_FLOAT32_SETS
ALL_SETS = ChainMap(X86_SETS, X86_FLOAT32_SETS, ARM_SETS, ARM_FLOAT32_SETS)
_ARM = "-march=armv8.2-a"
_ARM_OF_ZIG = "-mcpu=generic"  # which knows processors alone, and takes the same extensions
_EXTENSIONS = {"asimddp": "dotprod", "atomics": "lse"}  # ARM's features by compilers' names, where these are others
# A compiler that hangs keeps a start waiting for so long; zig's first use takes a minute or two.
_BUILD_TIMEOUT_S = 600.0
_BUILDS_WITHIN_S = 3600.0  # longer than any build: what is older in a folder that is locked was left behind

# What an old compiler, or one without its libraries, has not.
_TRIAL = """
#include <bit>
#include <string>
#include <thread>
extern "C" unsigned trial(unsigned number) {
    std::thread thread([&] { number += unsigned(std::to_string(number).size()); });
    thread.join();
    return std::bit_width(number);
}
"""


class NativeUnavailable(Exception):
    """The reason why this machine, or this model, does without C++."""


class CannotKeep(NativeUnavailable):
    """The reason why no library is kept in a folder."""


def find_compiler() -> tuple[str, ...]:
    """Find the command that is tried first. Raises NativeUnavailable."""
    return find_compilers()[0]


def find_compilers() -> list[tuple[str, ...]]:
    """Find the commands that compile: the first may be too old. Raises NativeUnavailable where none is there."""
    found: list[tuple[str, ...]] = []
    for name in _COMPILERS:
        if path := shutil.which(name):
            found.append((path,))
        elif name == _ZIG and importlib.util.find_spec(_ZIG) is not None:
            target = f"{'aarch64' if IS_ARM else 'x86_64'}-linux-gnu.2.28"  # any glibc since 2018
            found.append((sys.executable, "-m", _ZIG, "c++", "-target", target))
    if not found:
        raise NativeUnavailable(f"no C++ compiler is installed ({', '.join(_COMPILERS)})")
    return found


def prebuilt(isa: str) -> Path | None:
    """Find the library that came with this very source."""
    return next(PREBUILT.glob(f"kernels-{isa}-{_source_hash(isa)}-*.so"), None)


def compiled(
    isa: str,
    compiler: tuple[str, ...],
    folder: Path,
    *,
    accepts: Callable[[Path], bool] = Path.is_file,
    is_portable: bool = False,
) -> Path:
    """Return the library for an instruction set, which is now compiled unless one is there that the caller accepts.

    `is_portable`: it needs no C++ library where it is loaded, or is not made. Raises NativeUnavailable; CannotKeep
    where a file cannot be written.
    """
    library = library_path(isa, compiler, folder)
    try:
        if not accepts(library):
            with _turn_in(folder):
                if not accepts(library):
                    _build(compiler, isa, library, is_portable=is_portable)
    except OSError as error:
        raise CannotKeep(f"{library} cannot be built: {error}") from error
    return library


def try_out(isa: str, compiler: tuple[str, ...]) -> None:
    """Compile a few lines as the library would be. Raises NativeUnavailable."""
    try:
        with tempfile.TemporaryDirectory() as there:
            source = Path(there, "trial.cpp")
            source.write_text(_TRIAL)
            _make(compiler, isa, [str(source)], Path(there))
    except OSError as error:
        raise NativeUnavailable(f"{compiler[0]} cannot be tried: {error}") from error


def library_path(isa: str, compiler: tuple[str, ...], folder: Path) -> Path:
    """Return where the library is, once it is compiled. Raises NativeUnavailable for a compiler that does not run."""
    return folder / f"kernels-{isa}-{_source_hash(isa)}-{_hash(_run([*compiler, '--version']).encode())}.so"


def _flags(isa: str) -> list[str]:
    features = sorted(ALL_SETS[isa])
    if ALL_SETS[isa] >= _NEON:
        machine = ["+".join([_ARM, *(_EXTENSIONS.get(name, name) for name in features)])]
    else:
        machine = [f"-m{name.replace('avx512_', 'avx512').replace('_', '-')}" for name in features]
    return [*_FLAGS, *machine, *([_FLOAT32] if isa in X86_FLOAT32_SETS | ARM_FLOAT32_SETS else [])]


def _source_hash(isa: str) -> str:
    return _hash(_sources(), " ".join([*_flags(isa), *_LINK, *_STATIC]).encode())


@functools.cache
def _sources() -> bytes:
    files = sorted(path for path in _SOURCE.rglob("*") if path.suffix in (".cpp", ".hpp"))
    return b"".join(path.read_bytes() for path in files)


def _hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


@contextlib.contextmanager
def _turn_in(folder: Path) -> Iterator[None]:
    """Wait until no other process compiles into the folder: half a minute of a core is then spent once."""
    folder.mkdir(parents=True, exist_ok=True)
    locked = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(locked, fcntl.LOCK_EX)
            _sweep(folder)
        yield
    finally:
        os.close(locked)  # which unlocks it, as the end of the process does


def _sweep(folder: Path) -> None:
    """Delete what processes left that were killed while they compiled."""
    for path in folder.glob(".kernels-*"):
        if time.time() - path.stat().st_mtime > _BUILDS_WITHIN_S:
            shutil.rmtree(path, ignore_errors=True)


def _build(compiler: tuple[str, ...], isa: str, library: Path, *, is_portable: bool = False) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=f".{library.stem}.") as folder:
        source = ["-I", str(_SOURCE), str(_SOURCE / "decoder.cpp")]
        made = _make(compiler, isa, source, Path(folder), is_portable=is_portable)
        with open(made, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            os.fchmod(file.fileno(), mode & ~(stat.S_IWGRP | stat.S_IWOTH))
            os.fsync(file.fileno())  # the rename must not outlive the bytes in a power cut
        os.replace(made, library)


def _make(compiler: tuple[str, ...], isa: str, source: list[str], folder: Path, *, is_portable: bool = False) -> str:
    """Compile and link the source in this folder."""
    part, whole = os.path.join(folder, "part.o"), os.path.join(folder, "whole.so")
    flags = [flag.replace(_ARM, _ARM_OF_ZIG) if _ZIG in compiler else flag for flag in _flags(isa)]
    _run([*compiler, *flags, "-c", "-o", part, *source])
    try:
        _run([*compiler, *_LINK, *_STATIC, "-o", whole, part])  # apart: zig has one C++ library for all sets then
    except NativeUnavailable:
        if is_portable:
            raise
        _run([*compiler, *_LINK, "-o", whole, part])  # some systems have what is static in a package of its own
    return whole


def _run(command: list[str]) -> str:
    """Run the command and return its output. Raises NativeUnavailable."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        raise NativeUnavailable(f"{command[0]} failed: {error.stderr.strip()[-500:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{command[0]} failed: {error}") from error
    return done.stdout
