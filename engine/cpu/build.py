"""Builds and loads the C++ of `native/`, once per machine: the decode step for processors with bfloat16 products.

    load(folder) -> the library, built at first use with the system's compiler (a few seconds) and kept in `folder`

The file's name carries a hash of the source, the flags, the compiler and the processor, and it appears by one rename:
any number of processes may start at once, and a changed machine or source builds anew. What the functions mean stands
with the source; their callers' side is `model.py` and `decoder.py`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).parent / "native"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-w")
_CPU_FLAGS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"})
_BUILD_TIMEOUT_S = 120.0  # a compiler that hangs keeps a start waiting for so long


class NativeUnavailable(Exception):
    """The reason why this machine, or this model, does without C++."""


def find_compiler() -> str:
    """Find the compiler that builds for this machine. Raises NativeUnavailable where there is none or no use."""
    if missing := sorted(_CPU_FLAGS - _cpu_flags()):
        raise NativeUnavailable(f"the processor lacks {', '.join(missing)}")
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise NativeUnavailable(f"no C++ compiler is installed ({', '.join(_COMPILERS)})")
    return compiler


def load(folder: Path) -> ctypes.CDLL:
    """Load the library, built if need be. Its calls release the interpreter's lock. Raises NativeUnavailable."""
    compiler, cpu = find_compiler(), _cpu_flags()
    library = folder / f"kernels-{_fingerprint(compiler, cpu)}.so"
    try:
        if not library.is_file():
            _build(compiler, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeUnavailable(f"{library} cannot be built or loaded: {error}") from error


def _cpu_flags() -> frozenset[str]:
    """Return the processor's features by Linux's names; none where it is not x86."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("flags"):
                    return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def _fingerprint(compiler: str, cpu_flags: frozenset[str]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(_SOURCE.iterdir()):
        if path.suffix in (".cpp", ".hpp"):
            digest.update(path.read_bytes())
    for fact in (" ".join(_FLAGS), _run([compiler, "--version"]), " ".join(sorted(cpu_flags))):
        digest.update(fact.encode())
    return digest.hexdigest()


def _build(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=library.parent, prefix=f".{library.stem}.", suffix=".so")
    os.close(handle)
    try:
        _run([compiler, *_FLAGS, "-o", partial, str(_SOURCE / "decoder.cpp")])
        os.replace(partial, library)
    except BaseException:
        os.unlink(partial)
        raise


def _run(command: list[str]) -> str:
    """Run the command and return its output. Raises NativeUnavailable."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        raise NativeUnavailable(f"{command[0]} failed: {error.stderr.strip()[-500:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{command[0]} failed: {error}") from error
    return done.stdout
