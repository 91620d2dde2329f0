"""`kvferry serve` takes signals, and what it inherits from whoever starts it does not keep it from serving."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvferry.cli.serve import _run
from kvferry.common.logs import configure_logging
from kvferry.launch.progress import LogDisplay

from .checkpoints import write_checkpoint

LIMIT_S = 240.0
MEND = """
import json, os, signal, sys
from kvferry.cli.inherited import mend_inheritance
mend_inheritance()
found = {
    "streams": [sys.stdin is not None, sys.stdout is not None, sys.stderr is not None],
    "are_inherited": [os.get_inheritable(fd) for fd in range(3)],
    "next": open(sys.argv[1]).fileno(),
    "end": os.waitstatus_to_exitcode(os.waitpid(os.posix_spawn("/bin/false", ["false"], {}), 0)[1]),
    "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
}
for stream in (sys.stdout, sys.stderr):
    print("a word", file=stream, flush=True)
open(sys.argv[1], "w").write(json.dumps(found))
"""


def close_streams() -> None:
    for fd in range(3):
        os.close(fd)


def close_some() -> None:
    os.close(1)


def ignore_ends() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def block_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD})


@pytest.mark.parametrize("inherits", [close_streams, close_some, ignore_ends, block_signals])
def test_what_a_process_inherits_is_mended(tmp_path: Path, inherits: Callable[[], None]) -> None:
    (out := tmp_path / "found").touch()
    subprocess.run([sys.executable, "-c", MEND, str(out)], preexec_fn=inherits, check=True, timeout=LIMIT_S)
    found = json.loads(out.read_text())
    assert found["streams"] == found["are_inherited"] == [True] * 3
    assert found["next"] > 2 and found["end"] == 1 and not found["blocked"]


@pytest.mark.slow
def test_a_dry_run_needs_no_standard_error(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "kvferry", "serve", str(write_checkpoint(tmp_path / "tiny")), "--dry-run"]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "preexec_fn": lambda: os.close(2), "timeout": LIMIT_S}
    done = subprocess.run([*words, "--kv-cache-memory-bytes", "16MiB"], check=False, **options)
    assert done.returncode == 0 and b"tiny" in done.stdout


class Stub:
    """A launcher that cannot reload."""

    def __init__(self) -> None:
        self.has_ended = asyncio.Event()
        self.num_reloads = 0

    async def run(self) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        await self.has_ended.wait()

    async def reload(self) -> list[str]:
        self.num_reloads += 1
        if self.num_reloads == 2:
            self.has_ended.set()
            return []
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGHUP)
        raise LookupError("no such key")

    def stop(self) -> None: ...
    def drain(self) -> None: ...


async def test_a_reload_that_breaks_is_told_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    stream, launcher = io.StringIO(), Stub()
    configure_logging("info", stream=stream)
    async with asyncio.timeout(LIMIT_S):
        await _run(launcher, None, LogDisplay(is_text=False))  # type: ignore[arg-type]
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    [failed] = [line for line in lines if line["level"] == "error"]
    assert failed["event"] == "reload_failed" and failed["error"] == "LookupError: no such key"
    assert "Traceback" in failed["exception"]
