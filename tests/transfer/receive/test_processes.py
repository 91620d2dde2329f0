"""A process of this host is known by its mark, seen to end, and never taken for another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from kvferry.transfer.receive.processes import own_mark, watch
from kvferry.wire.grants import ProcessMark

_CHILD = (
    "import sys; from kvferry.transfer.receive.processes import own_mark; m = own_mark(); "
    "print(m.host, m.pid, m.started, flush=True); sys.stdin.read()"
)


class Child:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        host, pid, started = self.process.stdout.readline().split()
        self.mark = ProcessMark(host, int(pid), int(started))

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(autouse=True)
def _needs_marks() -> None:
    if not own_mark().host:
        pytest.skip("processes cannot be told apart here")


def test_a_killed_process_is_seen_to_end_even_if_it_was_stopped_and_nobody_has_reaped_it() -> None:
    child = Child()
    life = watch([child.mark])
    assert life is not None
    seen = [life.has_ended]
    child.process.send_signal(signal.SIGSTOP)
    seen.append(life.has_ended)
    child.process.kill()
    os.waitid(os.P_PID, child.process.pid, os.WEXITED | os.WNOWAIT)
    seen.append(life.has_ended)
    assert seen == [False, False, True]
    life.close()
    child.end()


def test_a_writer_of_several_processes_lives_until_the_last_has_ended() -> None:
    children = [Child(), Child()]
    life = watch([child.mark for child in children])
    assert life is not None
    children[0].end()
    assert not life.has_ended
    children[1].end()
    assert life.has_ended


def test_processes_of_other_hosts_are_not_watched() -> None:
    elsewhere = msgspec.structs.replace(own_mark(), host="another boot/1")
    assert watch([elsewhere]) is None
    assert watch([]) is None
    assert watch([msgspec.structs.replace(elsewhere, host="")]) is None
    mixed = watch([elsewhere, own_mark()])
    assert mixed is not None and not mixed.has_ended
    mixed.close()
    mixed.close()


def test_another_process_with_the_same_number_is_not_taken_for_it() -> None:
    mark = own_mark()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ProcessLookupError, match=f"process {mark.pid}"):
        watch([mark, msgspec.structs.replace(mark, started=mark.started - 1)])
    assert os.listdir("/proc/self/fd") == before, "no descriptor is left open"


def test_a_name_with_brackets_does_not_change_a_mark() -> None:
    mark, comm = own_mark(), Path(f"/proc/self/task/{os.getpid()}/comm")
    name = comm.read_text()
    comm.write_text("a) b")
    try:
        assert own_mark() == mark
    finally:
        comm.write_text(name.rstrip("\n"))


def test_a_number_that_no_process_can_have_is_not_found() -> None:
    with pytest.raises(ProcessLookupError, match=str(2**31)):
        watch([msgspec.structs.replace(own_mark(), pid=2**31)])


def test_a_process_that_has_ended_before_is_not_found() -> None:
    child = Child()
    child.end()
    with pytest.raises(ProcessLookupError):
        watch([child.mark])
