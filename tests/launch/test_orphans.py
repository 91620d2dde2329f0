"""Orphans whose parent a launcher has become leave no zombies, and its own children are left to who waits for them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kvferry.launch.orphans import Orphans

PR_SET_CHILD_SUBREAPER = 36
PARENT = "import os; pid = os.fork(); print(pid) if pid else os._exit(3)"


@pytest.fixture
def orphan() -> Iterator[int]:
    """A process that has ended, as has its parent: this process is its parent then, as a container's first one is."""
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield int(subprocess.run([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, check=True).stdout)
    finally:
        assert libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


def is_zombie(pid: int) -> bool:
    """Wait until the process has ended."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def test_an_orphan_that_has_ended_is_taken_at_the_second_look(orphan: int) -> None:
    orphans = Orphans()
    assert is_zombie(orphan)
    orphans.look()
    assert is_zombie(orphan)
    orphans.look()
    assert not is_zombie(orphan)
    orphans.look()


def test_a_child_that_somebody_waits_for_has_its_exit_code() -> None:
    orphans = Orphans()
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"]) as child:
        assert is_zombie(child.pid)
        orphans.look()
        assert child.wait() == 7
    orphans.look()
