from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvferry.common.errors import ConfigError
from kvferry.tools.load import server_process
from kvferry.tools.load.cores import process_tree, processes
from kvferry.tools.load.server_process import free_port, running

HEALTHY = """
import http.server, sys
http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind="127.0.0.1")
"""
# A server that ignores the request to end and has a child that does so too.
STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) > 1:
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
    child.stdout.read(1)
print("x", flush=True)
signal.pause()
"""


def test_a_free_port_is_none_that_a_connection_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a connection of anybody may have it before the server listens there."""
    ports = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if ports.exists():
        first, last = map(int, ports.read_text().split())
        assert all(not first <= free_port() <= last for _ in range(100))
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        monkeypatch.setattr(server_process, "_LEAST_PORT", taken)
        monkeypatch.setattr(server_process, "_first_of_connections", lambda: taken + 1)
        assert free_port() != taken


def test_healthy_server_is_awaited_and_ended(tmp_path: Path) -> None:
    port = free_port()
    with running("web", [sys.executable, "-c", HEALTHY, str(port)], tmp_path) as server:
        server.wait_until_healthy(f"http://127.0.0.1:{port}/", timeout_s=30)
        assert server.pid in processes()
    assert server.pid not in processes()
    assert "GET /" in (tmp_path / "web.log").read_text()


def test_settings_of_whoever_starts_a_server_are_not_the_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KVFERRY_API_KEY", "KVFERRY_LOG_LEVEL", "KVFERRY_CACHE", "KVFERRY_FAILPOINTS", "OTHER"):
        monkeypatch.setenv(name, "ours")
    show = "import os; print(sorted((k, v) for k, v in os.environ.items() if k[:7] == 'KVFERRY' or k == 'OTHER'))"
    with running("shown", [sys.executable, "-c", show], tmp_path, {"KVFERRY_API_KEY": "its own"}) as server:
        assert server.wait(30) == 0
    kept = [("KVFERRY_API_KEY", "its own"), *((f"KVFERRY_{name}", "ours") for name in ("CACHE", "FAILPOINTS"))]
    assert (tmp_path / "shown.log").read_text() == f"{[*kept, ('OTHER', 'ours')]}\n"


def test_server_that_ends_early_is_reported_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with (
        running("bad", command, tmp_path) as server,
        pytest.raises(ConfigError, match="bad ended with 1:\nno such model"),
    ):
        server.wait_until_healthy("http://127.0.0.1:1/", timeout_s=30)


def test_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with (
        running("deaf", [sys.executable, "-c", "input()"], tmp_path, {"X": "y"}) as server,
        pytest.raises(ConfigError, match="deaf"),
    ):
        server.wait_until_healthy("http://127.0.0.1:1/", timeout_s=0)


OWNER = """
import signal, sys, time
from pathlib import Path
from kvferry.tools.load.server_process import running
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it may have been ignored, as nohup does
command = [sys.executable, "-c", "import signal; print('x', flush=True); signal.pause()"]
with running("child", command, Path(sys.argv[1])) as child:
    while not child.log_path.read_bytes():
        time.sleep(0.01)
    print(child.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_a_server_ends_with_whoever_started_it(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert pid in processes()
        owner.send_signal(number)
        try:
            owner.wait(30)
        finally:
            owner.kill()
    give_up_s = time.monotonic() + 30
    while (left := processes().get(pid)) is not None and not left.is_zombie and time.monotonic() < give_up_s:
        time.sleep(0.01)
    assert left is None or left.is_zombie


def test_a_program_that_is_not_there_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="absent: cannot start no-such-program"),
        running("absent", ["no-such-program"], tmp_path),
    ):
        pass


def test_logs_that_cannot_be_written_are_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="logs cannot be written to"), running("x", ["true"], tmp_path / "file"):
        pass


def test_a_process_is_another_where_it_began_later_and_the_same_whatever_its_name(tmp_path: Path) -> None:
    with running("x", [sys.executable, "-c", "import signal; signal.pause()"], tmp_path) as server:
        real = processes()[server.pid]
        earlier = replace(real, start_ticks=real.start_ticks - 1)  # it has ended, and its number was given again
        before = replace(real, name="before-exec")
        assert server_process._alive([real, earlier, before]) == [real, before]
    assert not server_process._alive([real])


def test_whole_tree_is_killed_when_it_does_not_end(tmp_path: Path) -> None:
    with running("stubborn", [sys.executable, "-c", STUBBORN, STUBBORN], tmp_path, term_s=0.2) as server:
        while not server.log_path.read_bytes():
            pass
        tree = process_tree([server.pid], processes())
        assert len(tree) == 2
    left = processes()
    assert not [process for process in tree if process.pid in left and not left[process.pid].is_zombie]
