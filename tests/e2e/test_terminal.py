"""What somebody at a terminal sees: a quiet start, a line for each request, a farewell. Elsewhere: JSON lines only."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from kvferry.tools.load.server_process import free_port

from ..checkpoints import write_checkpoint
from .cluster import START_LIMIT_S, Cluster, serve

FLAGS = ("--served-model-name", "tiny", "--dtype", "float32", "--kv-cache-memory-bytes", "16MiB", "--device", "cpu")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")  # colours, the cursor


class Terminal:
    """A terminal of 120 columns in which `kvferry serve` runs."""

    def __init__(self, *words: str) -> None:
        pid, self._fd = pty.fork()
        if pid == 0:
            os.environ |= {"TERM": "xterm", "COLUMNS": "120"}
            os.execv(sys.executable, [sys.executable, "-m", "kvferry", "serve", *words])
        self.pid, self.raw = pid, ""

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in _CONTROL.sub("", self.raw).split("\n")]

    def read_until(self, is_there: Callable[[], object], limit_s: float = START_LIMIT_S) -> None:
        end = time.monotonic() + limit_s
        while not is_there():
            assert time.monotonic() < end, self.raw
            if select.select([self._fd], [], [], 0.1)[0]:
                self._read()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other end has gone
            self.raw += os.read(self._fd, 65536).decode()

    def type(self, text: bytes) -> None:
        os.write(self._fd, text)

    def wait(self) -> int:
        """The exit code, when all that it said is read."""
        while select.select([self._fd], [], [], 5.0)[0]:
            before = self.raw
            self._read()
            if self.raw == before:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self._fd)


@contextlib.contextmanager
def terminal(*words: str) -> Iterator[Terminal]:
    shown = Terminal(*words)
    try:
        yield shown
    finally:
        shown.close()


@pytest.mark.slow
def test_a_terminal_shows_bars_then_a_greeting_a_line_for_a_request_and_a_farewell(tmp_path: Path) -> None:
    model_dir = write_checkpoint(tmp_path / "tiny")
    base_url = f"http://127.0.0.1:{(port := free_port())}"
    with terminal(str(model_dir), "--port", str(port), *FLAGS) as shown:
        shown.read_until(lambda: "Ctrl-C ends it" in shown.raw and "of France?" in shown.raw)
        bars, _, greeting = _CONTROL.sub("", shown.raw).partition("kvferry serves ")
        assert greeting.startswith(f"tiny at {base_url}/v1 (1 prefill, 1 decode). Ctrl-C ends it. Try:")
        rows = {line.strip() for line in bars.split("\n") if line.strip() and "━" not in line}
        # Only bars came before; where this machine has no native kernels each worker warns of it.
        assert all("cpu_kernels" in row for row in rows), rows
        assert "{" not in bars
        body = {"prompt": "hi", "max_tokens": 3, "ignore_eos": True}
        assert httpx.post(f"{base_url}/v1/completions", json=body, timeout=240.0).status_code == 200
        shown.read_until(lambda: " request 200 length: " in shown.raw)
        [line] = [line for line in shown.lines if " request 200 length: " in line]
        assert re.search(r"^\d\d:\d\d:\d\d request 200 length: \d+ -> 3 tokens, ttft \d+, total \d+ ms, \S{32}$", line)
        before = len(shown.lines)
        shown.type(b"\x03")
        shown.read_until(lambda: "everything has ended" in shown.raw)
        assert shown.wait() == 0
        assert not [line for line in shown.lines[before - 1 :] if re.search(r"warning|error|lost|Traceback", line)]
        assert shown.lines[-2:] == ["everything has ended", ""]


def _lines(cluster: Cluster) -> list[str]:
    return cluster.log.read_text().splitlines()


@pytest.mark.slow
def test_elsewhere_every_line_is_json_and_with_text_none_is(tmp_path: Path) -> None:
    model_dir = write_checkpoint(tmp_path / "tiny")
    with serve(model_dir, tmp_path / "json", *FLAGS, "--prefill", "0", is_fork=False) as cluster:
        cluster.post("/v1/completions", {"prompt": "hi", "max_tokens": 2})
    events = [json.loads(line)["event"] for line in _lines(cluster)]
    assert {"serving", "request_finished", "everything has ended"} <= set(events)
    with serve(model_dir, tmp_path / "text", *FLAGS, "--log-format", "text", "--prefill", "0") as cluster:
        cluster.post("/v1/completions", {"prompt": "hi", "max_tokens": 2})
    assert not [line for line in _lines(cluster) if line.startswith("{")]
    assert any(line.startswith("kvferry serves tiny at ") for line in _lines(cluster))


def test_what_completion_offers_are_the_options_of_the_program() -> None:
    env = {**os.environ, "_KVFERRY_COMPLETE": "complete_bash", "COMP_WORDS": "kvferry bench --max-c", "COMP_CWORD": "2"}
    done = subprocess.run([sys.executable, "-m", "kvferry"], env=env, capture_output=True, text=True, timeout=240.0)
    assert "--max-concurrency" in done.stdout.split(), done.stderr
