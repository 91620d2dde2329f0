"""Folders and open files of what is kept.

What belongs to a task that nobody waits for goes by its name: its answer is NAME.own in the folder of answers, where
clients' keys become names without a suffix, and tasks/NAME is there until it has ended, whoever computes it, and while
nobody does.
"""

from __future__ import annotations

import fcntl
import os
import resource
from pathlib import Path

from ...common.errors import ConfigError

TASKS = "tasks"  # the folder's name, in that of the answers
_OF_TASK = ".own"


def make_folder(path: Path) -> None:
    """Make a folder for this user alone, in that of the answers. Raises ConfigError where that cannot be."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"answers_dir: cannot make {path}: {error.strerror or error}") from error


def make_usable(setting: str, path: Path, *inner: Path, written: Path) -> None:
    """Make a folder and others in it, for this user alone, and try to write to one of them. Raises ConfigError."""
    try:
        for folder in (path, *inner):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = written / f"probe-{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{setting}: cannot use {path}: {error.strerror or error}") from error


def share_of_open_files(share: int) -> int:
    """Return how many files of a kind may be open at once, one in `share` of all: connections need the others."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // share)


def open_locked(path: Path, flags: int = 0) -> int | None:
    """Open a file that is ours until it is closed; None: somebody else has it. Raises OSError, and leaves none open."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return fd


def is_there(path: Path) -> bool:
    """Tell whether there is such a file. Raises OSError where nobody can say: it is not taken for lost."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def answer_of_task(name: str) -> str:
    """Return the name of a task's answer."""
    return f"{name}{_OF_TASK}"


def is_under_way(answer: Path) -> bool:
    """Tell whether an answer is that of a task which has not ended, by its path. Raises OSError."""
    return answer.suffix == _OF_TASK and is_there(answer.parent / TASKS / answer.stem)
