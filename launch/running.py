"""A running deployment is found by a Unix socket in this user's runtime folder, and by a pid file if it has one.

$XDG_RUNTIME_DIR/kvferry/PID.sock, else /tmp/kvferry-UID/PID.sock, with TMPDIR there; nobody else may enter the folder
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..common.config import environment
from ..common.errors import ConfigError

_MAX_PID_FILE_BYTES = 32
_MAX_SOCKET_BYTES = 107  # of a Unix socket's path, to the kernel


def runtime_dir(env: Mapping[str, str]) -> Path:
    """The folder of the sockets of this user's deployments; it need not exist."""
    if base := env.get("XDG_RUNTIME_DIR"):
        return Path(base) / "kvferry"
    # Not Python's own choice, which leaves a folder that is full for another: a deployment stays where it was.
    named = (env.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    base = next((folder for folder in named if folder and os.path.isdir(folder)), "/tmp")
    return Path(base) / f"kvferry-{os.getuid()}"


def make_runtime_dir(env: Mapping[str, str]) -> Path:
    """Make the folder, for this user alone, and sweep the sockets that killed launchers have left.

    Raises ConfigError where somebody else owns it or may enter it, or its name is too long for a socket's.
    """
    path = runtime_dir(env)
    if len(os.fsencode(socket_of(path, os.getpid()))) > _MAX_SOCKET_BYTES:
        raise ConfigError(f"{path} is too long a name for a socket's folder; set XDG_RUNTIME_DIR to a shorter one")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(f"cannot make {path}: {error.strerror}; set XDG_RUNTIME_DIR to a folder of yours") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(f"{path} is not a folder of this user's alone; set XDG_RUNTIME_DIR to one")
    _sweep(path)
    return path


def _sweep(folder: Path) -> None:
    for path in folder.glob("*.sock"):
        if path.stem.isdigit() and not is_alive(int(path.stem)):
            path.unlink(missing_ok=True)


def socket_of(folder: Path, pid: int) -> Path:
    return folder / f"{pid}.sock"


def running_pids(folder: Path) -> list[int]:
    """Processes of deployments that seem to run: they have a socket, and exist.

    A folder of somebody else's has none: his socket could name any address, and get an operator's key there.
    """
    names = [path.stem for path in folder.glob("*.sock")] if _is_ours(folder) else []
    return sorted(int(name) for name in names if name.isdigit() and is_alive(int(name)))


def _is_ours(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _is_heard(path: Path) -> bool:
    """Say whether somebody listens at the socket; one that hangs does, though it answers nothing."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        try:
            sock.connect(str(path))
        except BlockingIOError:
            return True  # more wait to be heard already than there is room for
        except OSError:
            return False
    return True


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def read_pid(path: Path) -> int:
    """The process that a pid file names, as a command has it: perhaps with `~`. Raises ConfigError."""
    path = Path(os.path.expanduser(path))
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_PID_FILE_BYTES).strip()
    except OSError as error:
        raise ConfigError(f"pid_file: cannot read {path}: {error.strerror}") from error
    if not text.isdigit() or not 0 < int(text) < 2**31:
        raise ConfigError(f"pid_file: {path} holds no process id")
    return int(text)


def check_pid_file(path: Path, folder: Path) -> None:
    """Refuse a file that a running deployment has, or that cannot be written. Raises ConfigError."""
    # Another process may have the id by now: in a container even this one, which is the first there in each life.
    if path.exists() and (pid := read_pid(path)) in running_pids(folder) and _is_heard(socket_of(folder, pid)):
        raise ConfigError(f"pid_file: {path} is of process {pid}, which serves; `kvferry drain` ends it")
    if not os.access(path.parent, os.W_OK):  # the file itself is put there by a rename
        why = "its folder may not be written to" if path.parent.is_dir() else f"there is no folder {path.parent}"
        raise ConfigError(f"pid_file: cannot write {path}: {why}")


@contextlib.contextmanager
def pid_file(path: Path | None) -> Iterator[None]:
    """Keep this process's id in the file while the block runs. Raises ConfigError as `check_pid_file` does."""
    if path is None:
        yield
        return
    check_pid_file(path, runtime_dir(environment()))  # once more: what was done since the first time may take long
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(f"{os.getpid()}\n")
        new.replace(path)
    except OSError as error:
        raise ConfigError(f"pid_file: cannot write {path}: {error.strerror}") from error
    try:
        yield
    finally:
        with contextlib.suppress(ConfigError, OSError):
            if read_pid(path) == os.getpid():
                path.unlink()


class NobodyListens(ConfigError):
    """A socket without a launcher: it was killed, and another process may have its id by now."""


def ask(path: Path, command: dict[str, object], *, limit_s: float | None = None) -> Iterator[dict[str, object]]:
    """Say a command at a deployment's socket and yield each line of the answer (`command_socket` has both).

    Raises NobodyListens; ConfigError where one hangs or ends.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(limit_s)
        try:
            sock.connect(str(path))
            sock.sendall(json.dumps(command).encode() + b"\n")
            with sock.makefile("rb") as lines:
                for line in lines:
                    yield json.loads(line)
        except (ConnectionRefusedError, FileNotFoundError) as error:
            raise NobodyListens(f"process {path.stem} has no deployment: nobody listens at {path}") from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"process {path.stem} does not answer at {path}: {error}") from error


def wait_for_end(pid: int) -> None:
    """Return when the process has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([fd], [], [])
    finally:
        os.close(fd)
