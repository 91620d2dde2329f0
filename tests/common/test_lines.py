"""Lines to a reader that stands still are waited for by nobody, and those that it can have come out whole."""

from __future__ import annotations

import fcntl
import io
import json
import os
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvferry.common.lines import Lines, drain

LIMIT_S = 60.0
PIPE_BYTES = 4096
BEGIN = """
import atexit, os, sys, threading
import structlog
from kvferry.common.exits import exit_process
from kvferry.common.logs import configure_logging
configure_logging("info", worker_id="d-0")
log = structlog.get_logger()
"""
MANY = """
for number in range(20_000):
    log.info("line", number=number)
print("said", flush=True)
sys.stdin.readline()
"""


class Program:
    """A program that logs into a pipe, which is read when a test says so."""

    def __init__(self, text: str) -> None:
        pipe = subprocess.PIPE
        words = [sys.executable, "-c", BEGIN + text]
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe)
        self._limit = threading.Timer(LIMIT_S, self.process.kill)  # whoever waits for a line sees an end
        self._limit.start()

    def said(self) -> bytes:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def line(self) -> dict[str, Any]:
        assert self.process.stderr is not None
        line: dict[str, Any] = json.loads(self.process.stderr.readline())
        return line

    def lines(self) -> list[dict[str, Any]]:
        assert self.process.stderr is not None
        return [json.loads(line) for line in self.process.stderr]

    def close(self) -> None:
        self._limit.cancel()
        self.process.kill()
        self.process.communicate()


def ran(text: str) -> Iterator[Program]:
    program = Program(text)
    yield program
    program.close()


@pytest.fixture
def program(request: pytest.FixtureRequest) -> Iterator[Program]:
    yield from ran(request.param)


@pytest.mark.parametrize("program", [MANY + 'log.info("last")'], indirect=True)
def test_nobody_waits_for_a_reader_and_what_was_lost_is_counted_when_it_reads_again(program: Program) -> None:
    assert program.said() == b"said\n", "it stands still, as its reader does"
    numbers, line = [], program.line()
    while line["event"] == "line":
        numbers.append(line["number"])
        line = program.line()
    assert numbers == sorted(set(numbers)) and numbers[0] == 0
    assert (line["event"], line["level"], line["worker_id"]) == ("log_lines_lost", "warning", "d-0")
    program.go_on()
    assert len(numbers) + line["count"] == 20_000
    assert [later["event"] for later in program.lines()] == ["last"]


SLOW = """
import time
from kvferry.common import lines
lines._LAST_WORDS_S = 30.0  # on a machine that is busy
write = os.write
def write_slowly(fd, line):
    if b"lines_lost" in line:
        time.sleep(0.1)
    return write(fd, line)
os.write = write_slowly
"""


@pytest.mark.parametrize("program", [SLOW + MANY + "exit_process(0)"], indirect=True)
def test_a_process_that_ends_tells_first_what_was_lost(program: Program) -> None:
    assert program.said() == b"said\n"
    program.go_on()
    *lines, last = program.lines()
    assert last["event"] == "log_lines_lost" and len(lines) + last["count"] == 20_000


LONG = """
for _ in range(400):
    log.info("line", exc_info=ValueError("x" * 100_000))
print("said", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("program", [LONG], indirect=True)
def test_of_long_lines_fewer_wait(program: Program) -> None:
    assert program.said() == b"said\n"
    num_kept, line = 0, program.line()
    while line["event"] == "line":
        num_kept, line = num_kept + 1, program.line()
    assert (line["event"], line["count"]) == ("log_lines_lost", 400 - num_kept)
    assert num_kept * 100_000 < 2 << 20


@pytest.mark.parametrize("program", [MANY + "exit_process(3)", MANY], indirect=True)
def test_a_process_ends_though_nobody_reads_its_lines(program: Program) -> None:
    assert program.said() == b"said\n"
    program.go_on()
    assert program.process.wait() in (0, 3)


FEW = """
def tell():
    for number in range(2_000):
        log.info("line", number=number)
"""


@pytest.mark.parametrize(
    "program",
    [
        FEW + "tell()",
        FEW + "tell(); exit_process(0)",
        FEW + "tell(); sys.exit(1)",
        FEW + 'tell(); raise ValueError("broken")',
        FEW + "atexit.register(tell)",
    ],
    indirect=True,
)
def test_however_a_process_ends_its_last_lines_are_out(program: Program) -> None:
    lines = program.lines()
    assert [line["number"] for line in lines if line["event"] == "line"] == list(range(2_000))
    assert {line["event"] for line in lines[2_000:]} <= {"uncaught_exception"}
    assert len(lines) == 2_000 + (program.process.wait() == 1 and "ValueError" in str(lines[-1]))


NO_THREAD = """
def refuse(thread):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
log.info("line")
os._exit(5)
"""


@pytest.mark.parametrize("program", [NO_THREAD], indirect=True)
def test_where_the_system_has_no_room_for_a_thread_a_line_is_written_all_the_same(program: Program) -> None:
    assert [line["event"] for line in program.lines()] == ["line"]
    assert program.process.wait() == 5


FORK = """
log.info("parent")
pid = os.fork()
log.info("child" if pid == 0 else "parent")
if pid == 0:
    exit_process(0)
os.waitpid(pid, 0)
exit_process(0)
"""


@pytest.mark.parametrize("program", [FORK], indirect=True)
def test_a_fork_writes_its_own_lines_and_none_of_its_parents(program: Program) -> None:
    assert sorted(line["event"] for line in program.lines()) == ["child", "parent", "parent"]


CLOSED = """
sys.stdout = sys.stderr = None
exit_process(4)
"""


@pytest.mark.parametrize("program", [CLOSED], indirect=True)
def test_a_process_without_standard_streams_ends_with_its_code(program: Program) -> None:
    assert program.process.wait() == 4


@pytest.mark.parametrize("is_blocking", [True, False])
def test_a_line_that_a_pipe_has_no_room_for_comes_out_whole(is_blocking: bool) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, is_blocking)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    with open(reader, encoding="utf-8") as read, open(writer, "w", encoding="utf-8") as stream:
        Lines(stream).write("x" * 500_000 + "\n")
        Lines(stream).write("\udc80 and the next\n")
        while fcntl.ioctl(reader, termios.FIONREAD, bytes(4)) != struct.pack("i", PIPE_BYTES):
            time.sleep(0.01)
        time.sleep(0.1)  # in which it finds that there is no room
        Lines(stream).write("the last\n")
        lines = ("x" * 500_000, "\\udc80 and the next", "the last")
        assert list(iter(read.readline, "the last\n")) == [f"{line}\n" for line in lines[:2]]


def test_lines_for_a_reader_that_has_gone_are_dropped() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        Lines(stream).write("nobody reads it\n")
        drain()


def test_what_nobody_reads_at_its_other_end_takes_a_line_at_once(tmp_path: Path) -> None:
    memory = io.StringIO()
    Lines(memory).write("a line\n")
    assert memory.getvalue() == "a line\n"
    with (tmp_path / "log").open("w", encoding="utf-8") as file:
        lines = Lines(file)
        lines.write("a line\n")
        lines.flush()
        assert (tmp_path / "log").read_text() == "a line\n"
