from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from time import perf_counter

import pytest

from kvferry.common.errors import ConfigError
from kvferry.tools.load.cores import CoreWatch, Process, pin_to_cores, process_tree, processes, wait_until_quiet

BUSY = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\ninput()"


@pytest.fixture
def busy_child() -> Iterator[subprocess.Popen[bytes]]:
    """A child that used 0.2 s of CPU and then waits."""
    child = subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    yield child
    child.communicate(b"\n")


def test_own_process_is_in_the_table() -> None:
    me = processes()[os.getpid()]
    assert me.parent_pid == os.getppid()
    assert me.cpu_s > 0


def test_tree_has_the_descendants_of_its_roots_alone() -> None:
    table = {pid: Process(pid, parent, "x", 0.0, False, 0) for pid, parent in [(1, 0), (2, 1), (3, 2), (4, 1), (5, 4)]}
    assert [process.pid for process in process_tree([2, 5, 99], table)] == [2, 5, 3]


def test_work_of_a_server_counts_for_it(busy_child: subprocess.Popen[bytes]) -> None:
    watch = CoreWatch(lambda: [busy_child.pid])
    watch.start()
    assert busy_child.stdout is not None
    busy_child.stdout.read(1)
    use = watch.stop()
    assert use.server > 0
    assert use.foreign >= 0


def test_time_used_before_the_phase_does_not_count(busy_child: subprocess.Popen[bytes]) -> None:
    assert busy_child.stdout is not None
    busy_child.stdout.read(1)  # its work is done
    watch = CoreWatch(lambda: [busy_child.pid])
    watch.start()
    assert watch.stop().server == 0


def test_server_that_is_gone_is_no_error() -> None:
    watch = CoreWatch(lambda: [2**22 + 1])
    watch.start()
    assert watch.stop().server == 0


def test_awaited_child_counts_for_the_client() -> None:
    watch = CoreWatch(list)
    watch.start()
    start_s = perf_counter()
    subprocess.run([sys.executable, "-c", BUSY], input=b"\n", capture_output=True, check=True)
    use = watch.stop()
    assert use.client * (perf_counter() - start_s) > 0.15  # the child used 0.2 s, told in ticks of 10 ms


def test_wait_for_a_quiet_machine_ends_when_its_time_is_up() -> None:
    wait = wait_until_quiet(0.0, sample_s=0.01)
    assert wait.waited_s >= 0.0
    assert wait.busy_cores >= 0


def test_more_cores_than_there_are_cannot_be_pinned() -> None:
    available = os.sched_getaffinity(0)
    with pytest.raises(ConfigError, match=f"this process may use {len(available)}"):
        pin_to_cores(len(available) + 1)
    assert pin_to_cores(len(available)) == tuple(sorted(available))
