"""A process that is being started ends by a signal, a container's first process as any other."""

from __future__ import annotations

import gc
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from kvferry.common.imports import kept_imports

LIMIT_S = 60.0
PROGRAM = """
import signal
from kvferry.common.imports import {name}
{call}
print("up", flush=True)
signal.pause()
"""
NEEDS_NAMESPACES = pytest.mark.skipif(shutil.which("unshare") is None, reason="process namespaces need util-linux")


@NEEDS_NAMESPACES
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_process_of_a_container_ends_by_a_signal_while_it_starts(number: signal.Signals) -> None:
    _check(number, "ended_by_interrupts", "ended_by_interrupts()")


@NEEDS_NAMESPACES
def test_a_command_that_is_the_first_process_ends_by_sigterm_behind_its_imports() -> None:
    _check(signal.SIGTERM, "interruptible_imports", "with interruptible_imports(): pass")


def _check(number: signal.Signals, name: str, call: str) -> None:
    words = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", PROGRAM.format(name=name, call=call)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as outside:
        assert outside.stdout is not None and outside.stderr is not None
        if outside.stdout.readline() != "up\n":
            pytest.skip(outside.stderr.read().strip())
        [first] = psutil.Process(outside.pid).children()
        first.send_signal(number)
        try:
            assert outside.wait(LIMIT_S) == 128 + number
        finally:
            outside.kill()


def test_garbage_is_collected_again_behind_imports() -> None:
    with kept_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.unfreeze()
