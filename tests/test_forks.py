"""A fork of the tests' is the program that a new interpreter would be, but for its imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .forks import Forks

TELL = """
import json, os, random, signal, sys
import numpy, torch
if "hear" in sys.argv:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
with open("/proc/self/cmdline", "rb") as file:
    title = file.read().rstrip(b"\\0").decode()
facts = {
    "args": sys.argv[1:],
    "name": __name__,
    "env": dict(os.environ),
    "open": sorted(int(name) for name in os.listdir("/proc/self/fd")),
    "group": os.getpgid(0) == os.getpid(),
    "session": os.getsid(0) == os.getpid(),
    "random": [random.random(), float(numpy.random.random()), torch.initial_seed()],
    "threads": len(os.listdir("/proc/self/task")),
    "title": title,
    "stdin": sys.stdin.readline() if "hear" in sys.argv else "",
}
print(json.dumps(facts), flush=True)
print("an error", file=sys.stderr)
if "hear" in sys.argv:
    sys.stdin.read()
if "raise" in sys.argv:
    raise RuntimeError("as it was told")
sys.exit(int(sys.argv[-1]) if sys.argv[-1].isdigit() else 0)
"""


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks("torch", "numpy.random")
    yield forks
    forks.close()


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "tell.py"
    path.write_text(TELL)
    return str(path)


def run(forks: Forks | type[subprocess.Popen[bytes]], folder: Path, *words: str, **options: Any) -> dict[str, Any]:
    """Return what a program says, how it ended, and what it wrote as errors."""
    with (folder / "out").open("wb") as out, (folder / "errors").open("wb") as errors:
        start: Any = forks.Popen if isinstance(forks, Forks) else forks
        process = start([sys.executable, *words], stdout=out, stderr=errors, stdin=subprocess.DEVNULL, **options)
        code = process.wait(120.0)
    told: dict[str, Any] = json.loads((folder / "out").read_text())
    return {**told, "code": code, "errors": (folder / "errors").read_text()}


@pytest.mark.parametrize("end", ["0", "5", "raise"])
def test_a_fork_sees_and_ends_as_a_new_process_would(forks: Forks, tmp_path: Path, program: str, end: str) -> None:
    options: dict[str, Any] = {"env": {"PATH": os.environ["PATH"], "OURS": "1"}, "start_new_session": True}
    fork = run(forks, tmp_path, program, "a word", end, **options)
    fresh = run(subprocess.Popen, tmp_path, program, "a word", end, **options)
    assert fork["code"] == {"0": 0, "5": 5, "raise": 1}[end]
    same = ("args", "name", "open", "group", "session", "code")
    assert {name: fork[name] for name in same} == {name: fresh[name] for name in same}
    assert fork["env"] == options["env"] and fork["threads"] == 1
    assert fork["title"] == f"python {program} a word {end}"
    assert fork["errors"].startswith("an error\n") and (
        end != "raise" or "RuntimeError: as it was told" in fork["errors"]
    )


def test_forks_share_no_random_numbers(forks: Forks, tmp_path: Path, program: str) -> None:
    first, second = (run(forks, tmp_path, program)["random"] for _ in range(2))
    assert all(mine != other for mine, other in zip(first, second, strict=True))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 7), (signal.SIGKILL, -9)])
def test_signals_reach_a_fork_and_its_end_is_told(forks: Forks, program: str, number: int, code: int) -> None:
    pipes: dict[str, Any] = {"stdin": forks.PIPE, "stdout": forks.PIPE, "stderr": forks.DEVNULL}
    process = forks.Popen([sys.executable, program, "hear"], text=True, process_group=0, **pipes)
    other = forks.Popen([sys.executable, program, "hear"], text=True, **pipes)
    for each in (process, other):
        assert each.stdin is not None and each.stdout is not None
        each.stdin.write("a line\n")
        each.stdin.flush()
        told = json.loads(each.stdout.readline())
        assert told["stdin"] == "a line\n" and told["group"] == (each is process) and told["open"] == [0, 1, 2, 3]
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    os.kill(process.pid, number)
    assert process.wait(120.0) == process.poll() == process.returncode == code
    process.kill()  # of no effect: it has ended
    assert other.poll() is None
    for each in (process, other):
        each.communicate()
    assert other.returncode == 0


def test_a_module_is_run_as_a_program_and_errors_go_with_its_output(forks: Forks, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        process = forks.Popen([sys.executable, "-m", "json.tool", "--no-such"], stdout=log, stderr=forks.STDOUT)
        assert process.wait(120.0) == 2
    assert "--no-such" in (tmp_path / "log").read_text()


def test_programs_end_as_unknown_whose_server_has_gone(tmp_path: Path) -> None:
    (program := tmp_path / "wait.py").write_text("import sys\nsys.stdin.read()\n")
    forks = Forks()
    pipes: dict[str, Any] = {"stdin": forks.PIPE, "stdout": forks.PIPE, "stderr": forks.DEVNULL}
    process = forks.Popen([sys.executable, str(program)], text=True, **pipes)
    forks.close()
    assert process.poll() is None
    process.communicate()
    assert process.returncode == -signal.SIGHUP
