"""Commands find the deployment that is meant, whatever else runs or is just ending."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
import typer

from kvferry.cli.operate import drain, reload, restart, running_admins, status
from kvferry.common.errors import ConfigError, KVFerryError
from kvferry.launch.running import check_pid_file, make_runtime_dir, pid_file, read_pid, runtime_dir, socket_of

STATUS = {
    "ok": True,
    "pid": 1,
    "http": "http://127.0.0.1:8001",
    "admin": [],
    "model": "tiny",
    "state": "serving",
    "processes": [],
}


ADMIN = "http://127.0.0.1:8003"
REFUSAL = {
    "pid": os.getppid(),
    "http": "http://127.0.0.1:8002",
    "admin": [ADMIN],
    "ok": False,
    "error": "the key file is wrong",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    found = runtime_dir({"XDG_RUNTIME_DIR": str(tmp_path)})
    found.mkdir(parents=True, exist_ok=True)
    return found


def listen(path: Path, answer: bytes) -> Iterator[None]:
    """Take one command at a time and say this, or nothing, before the connection ends."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with closing(connection), suppress(BrokenPipeError):  # who only looks whether somebody listens
                    connection.recv(4096)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def ending(folder: Path) -> Iterator[None]:
    """A deployment that closes its socket without an answer."""
    yield from listen(socket_of(folder, os.getppid()), b"")


@pytest.fixture
def serving(folder: Path) -> Iterator[None]:
    yield from listen(socket_of(folder, os.getpid()), json.dumps(STATUS).encode() + b"\n")


@pytest.fixture
def left_over(folder: Path) -> Path:
    """The socket of a launcher that was killed; another process has its id by now."""
    path = socket_of(folder, os.getppid())
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    return path


@pytest.fixture
def other(folder: Path) -> Iterator[None]:
    """A second deployment that serves; what it is asked for besides its status fails."""
    yield from listen(socket_of(folder, os.getppid()), json.dumps(STATUS | REFUSAL).encode() + b"\n")


@pytest.mark.usefixtures("ending", "serving")
def test_a_deployment_that_is_just_ending_hides_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as end:
        status(port=8001)
    assert end.value.exit_code == 0
    assert "http://127.0.0.1:8001: serving" in capsys.readouterr().out


@pytest.mark.usefixtures("ending", "serving")
def test_no_command_is_for_another_deployment_than_the_one_that_does_not_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a flag it may be the one that is meant."""
    wanted = (
        rf"2 deployments run: http://127\.0\.0\.1:8001 \(process 1\), process {os.getppid()}, which does not answer; "
        "choose one with --port or --pid-file"
    )
    for command in (reload, restart, drain):
        with pytest.raises(ConfigError, match=wanted):
            command()
    with pytest.raises(ConfigError, match="choose one with --admin"):
        running_admins()
    with pytest.raises(typer.Exit) as end:
        status()
    assert end.value.exit_code == 0
    told = capsys.readouterr()
    assert "http://127.0.0.1:8001: serving" in told.out
    assert told.err == "another deployment: the deployment ended before it had answered\n"
    with pytest.raises(typer.Exit):
        status(port=8001)
    assert capsys.readouterr().err == "", "it is not the one that is meant"


@pytest.mark.parametrize(("of_rank", "told"), [(None, "the mean\n"), (1.2, "the mean, the busiest rank 1.20 times")])
def test_how_evenly_experts_are_chosen_is_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str], of_rank: float | None, told: str
) -> None:
    known = STATUS | {"experts": {"imbalance": 1.8, "rank_imbalance": of_rank}}
    with contextmanager(listen)(socket_of(folder, os.getpid()), json.dumps(known).encode() + b"\n"):
        with pytest.raises(typer.Exit):
            status()
    assert f"a layer's busiest one is chosen 1.80 times as often as {told}" in capsys.readouterr().out


@pytest.mark.usefixtures("ending")
def test_one_that_does_not_answer_is_told_where_there_is_no_other() -> None:
    with pytest.raises(ConfigError, match="ended before it had answered"):
        status()


def test_one_that_cannot_say_how_it_is_is_told(folder: Path) -> None:
    failure = json.dumps({"ok": False, "error": "KeyError: 'tp'"}).encode() + b"\n"
    with contextmanager(listen)(socket_of(folder, os.getpid()), failure):
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} cannot say how it is: KeyError: 'tp'"):
            reload()


@pytest.mark.usefixtures("folder")
def test_without_a_deployment_a_command_says_so() -> None:
    with pytest.raises(ConfigError, match="no deployment of port 8001 runs on this machine"):
        reload(port=8001)


@pytest.mark.usefixtures("serving")
def test_status_names_the_port_that_nobody_serves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        status(port=8009)
    assert ended.value.exit_code == 3
    assert capsys.readouterr().out == "no deployment of port 8009 runs on this machine\n"


@pytest.mark.usefixtures("serving")
def test_sockets_in_a_folder_of_somebody_else_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match="no deployment of this user runs on this machine"):
        running_admins()


@pytest.mark.usefixtures("serving", "other")
def test_of_several_deployments_one_has_to_be_named() -> None:
    with pytest.raises(ConfigError, match=r"2 deployments run: (?=.*8001)(?=.*8002).*--port or --pid-file"):
        drain()


@pytest.mark.usefixtures("serving", "other")
def test_who_asks_one_of_several_admin_listeners_is_told_their_addresses_and_the_flag() -> None:
    wanted = rf"2 deployments run: .*8002 \(process \d+, admin {ADMIN}\).*; choose one with --admin$"
    with pytest.raises(ConfigError, match=wanted):
        running_admins()


@pytest.mark.usefixtures("serving")
def test_a_deployment_without_an_admin_listener_is_told_how_to_get_one() -> None:
    with pytest.raises(ConfigError, match="no admin listener: start it with --admin-port"):
        running_admins()


@pytest.mark.usefixtures("other")
def test_what_a_deployment_could_not_do_is_an_error() -> None:
    with pytest.raises(KVFerryError, match="reload: the key file is wrong"):
        reload()
    with pytest.raises(KVFerryError, match="not everything was restarted"):
        restart()
    with pytest.raises(KVFerryError, match="drain: the key file is wrong"):
        drain()


@pytest.mark.usefixtures("left_over")
def test_a_socket_that_a_killed_launcher_left_is_no_deployment() -> None:
    with pytest.raises(typer.Exit) as ended:
        status(port=None)
    assert ended.value.exit_code == 3


@pytest.mark.usefixtures("left_over", "serving")
def test_a_left_over_socket_hides_no_deployment(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        status(port=None)
    assert ended.value.exit_code == 0
    assert "http://127.0.0.1:8001" in capsys.readouterr().out


def test_sockets_of_ended_processes_are_swept_when_the_next_deployment_starts(left_over: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    gone = socket_of(left_over.parent, ended.pid)
    gone.touch()
    left_over.parent.chmod(0o700)
    make_runtime_dir(os.environ)
    assert not gone.exists()
    assert left_over.exists()  # its process is there, whosever it is


@pytest.mark.parametrize("pid", [os.getpid(), os.getppid()], ids=["this process", "another one"])
def test_a_pid_file_of_a_killed_launcher_keeps_nobody_from_starting(folder: Path, tmp_path: Path, pid: int) -> None:
    """In a container every life of a launcher is process 1; elsewhere another process may have its id."""
    file = tmp_path / "pid"
    file.write_text(f"{pid}\n")
    path = socket_of(folder, pid)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    check_pid_file(file, folder)
    path.unlink()
    with contextmanager(listen)(path, b""), pytest.raises(ConfigError, match=rf"is of process {pid}, which serves"):
        check_pid_file(file, folder)


def test_a_pid_file_of_a_deployment_that_hangs_is_its_own(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    file.write_text(f"{os.getpid()}\n")
    path = socket_of(folder, os.getpid())
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as waiting:
        server.bind(str(path))
        server.listen(0)
        waiting.connect(str(path))  # nobody accepts it, and there is room for no other
        with pytest.raises(ConfigError, match="which serves"):
            check_pid_file(file, folder)


def test_a_pid_file_that_another_start_took_meanwhile_is_left_to_it(folder: Path, tmp_path: Path) -> None:
    """A model may be fetched between the first look at the file and the moment at which it is written."""
    file, other = tmp_path / "pid", os.getppid()
    check_pid_file(file, folder)
    file.write_text(f"{other}\n")
    with contextmanager(listen)(socket_of(folder, other), b""), pytest.raises(ConfigError, match="which serves"):
        with pid_file(file):
            pass
    assert read_pid(file) == other


def test_a_temporary_folder_in_which_nothing_can_be_written_is_left_for_no_other() -> None:
    """As one that is full: another folder's deployments are not the ones that were meant."""
    full = {"TMPDIR": "/proc"}
    assert runtime_dir(full).parent == Path("/proc")
    with pytest.raises(ConfigError, match=r"cannot make /proc/.*; set XDG_RUNTIME_DIR to a folder of yours"):
        make_runtime_dir(full)
    assert runtime_dir({"TMPDIR": "/nowhere"}).parent == Path("/tmp")


def test_a_folder_whose_name_is_too_long_for_a_socket_is_refused_with_what_helps(tmp_path: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path / ("a" * 100))}
    with pytest.raises(ConfigError, match="too long a name for a socket's folder; set XDG_RUNTIME_DIR to a shorter"):
        make_runtime_dir(env)
    room = 107 - len(str(socket_of(tmp_path / "kvferry", os.getpid())))
    longest = tmp_path / ("a" * (room - 1))  # and a slash
    with closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.bind(str(socket_of(make_runtime_dir({"XDG_RUNTIME_DIR": str(longest)}), os.getpid())))


def test_a_pid_file_may_be_in_the_home_of_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves `--pid-file=~/pid` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pid").write_text(f"{os.getpid()}\n")
    assert read_pid(Path("~/pid")) == os.getpid()
    with pytest.raises(ConfigError, match=r"cannot read ~nobody-here/pid: No such file or directory"):
        read_pid(Path("~nobody-here/pid"))
