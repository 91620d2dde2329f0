"""Work that is done aside: where a core would be idle, or here after all."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIMIT_S = 60.0
_PROGRAM = """
import os, signal, time
from kvferry.router.helpers import aside
{before}
own = os.getpid()

def work():
    if os.getpid() == own:
        return b"here"
    {in_fork}
    return b"aside, %d" % os.sched_getscheduler(0)

print(aside.done_aside(work).decode())
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux runs what is idle behind all others")


def _done(in_fork: str, before: str = "") -> str:
    """Return what a process prints that does some work aside, and check that it leaves no process behind."""
    code = _PROGRAM.format(in_fork=in_fork, before=before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_answer_is_found_where_a_core_is_idle() -> None:
    # On a machine without an idle core it is found here: what never looks takes no core for busy.
    assert _done("pass", "aside._LOOK_S = 60.0") == "aside, 5"


@pytest.mark.parametrize("in_fork", ["os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)", "raise MemoryError"])
def test_what_ends_the_fork_is_done_here(in_fork: str) -> None:
    assert _done(in_fork) == "here"


def test_where_no_core_is_idle_the_work_is_done_here() -> None:
    assert _done("time.sleep(600)") == "here", "it gets nothing of a core"


def test_an_answer_of_any_size_comes_whole() -> None:
    before = "aside._LOOK_S = 60.0; print_, print = print, lambda text: print_(len(text))"
    assert _done('return b"x" * 10_000_000', before) == "10000000"


def test_a_fork_does_not_outlive_its_process() -> None:
    kill = "os.kill(os.getppid(), signal.SIGKILL); time.sleep(600)"
    code = _PROGRAM.format(in_fork=kill, before="aside._LOOK_S = 60.0")
    # The fork has the pipe, too: it ends for us when both are gone.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=LIMIT_S)
    assert done.returncode == -9
