"""Tests of the C++ on CPUs under sanitizers: reads and writes out of bounds, and what the language leaves undefined.

    python -m kvferry.tests.sanitized                        tests/engine/cpu, twenty minutes of two cores
    python -m kvferry.tests.sanitized tests/engine/test_states.py -k draft    others, with arguments of pytest

The library is compiled as ever, by a `c++` in front of the others that adds GCC's sanitizers, into a cache of its own.
Memory of torch is watched too, so that pages, weights and rows have their bounds. Races are looked for by
tests/engine/cpu/test_team.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import kvferry

ROOT = Path(kvferry.__file__).resolve().parent
# A set is compiled in two minutes so, and with -O2 not in six.
_FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
# What runs the tests is not compiled so: the sanitizers' runtime is loaded before all else, but not into the compiler.
_COMPILER = f"""#!/bin/bash
unset LD_PRELOAD
flags=()
for flag in "$@"; do
    case "$flag" in -s | -static-lib*) ;; *) flags+=("$flag") ;; esac
done
exec g++ "${{flags[@]}}" {_FLAGS}
"""
_RUNTIME = ("libasan.so", "libstdc++.so")
# Of compilers and caches, by sanitizers of its own, and by programs that an emulator runs.
_APART = ("test_compiler.py", "test_loading.py", "test_team.py", "test_arm.py")
# Address space is refused to it, of which the runtime takes terabytes.
_UNBOUNDED = "tests/engine/cpu/test_memory.py::test_threads_that_the_system_refuses_are_told_by_name"


def _environment(folder: Path) -> dict[str, str]:
    compiler = folder / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_text(_COMPILER, encoding="utf-8")
    compiler.chmod(0o755)
    found = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in _RUNTIME]
    if missing := [path for path in found if not Path(path).is_absolute()]:
        raise SystemExit(f"g++ has no {' and no '.join(missing)}")
    return os.environ | {
        "PATH": f"{compiler.parent}:{os.environ['PATH']}",
        "KVFERRY_CACHE": str(folder / "cache"),
        "LD_PRELOAD": " ".join(found),
        # The interpreter leaves memory to the end of its process. A test's own output hides what a dying process says.
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={folder / 'report'}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={folder / 'report'}",
    }


def main(arguments: list[str]) -> int:
    """Run the tests; return pytest's exit status, or 1 where a sanitizer has said something."""
    room = ROOT / "tests" / "engine" / "cpu"
    tests = arguments or [str(room), *(f"--ignore={room / name}" for name in _APART), f"--deselect={_UNBOUNDED}"]
    pytest = [sys.executable, "-m", "pytest", "-n", str(os.cpu_count() or 1), "-p", "no:cacheprovider", "-rf", *tests]
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there)
        status = subprocess.run(pytest, cwd=ROOT, env=_environment(folder), check=False).returncode
        for report in sorted(folder.glob("report*")):
            print(report.read_text(encoding="utf-8", errors="replace"))
            status = status or 1
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
