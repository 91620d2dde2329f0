"""What transfers stand on leaves signals to the worker: by SIGHUP it reads its secret again."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import os, signal, sys
from kvferry.transfer.backends.choose import open_backend, set_ucx_defaults
told = []
signal.signal(signal.SIGHUP, lambda *_: told.append("told"))
set_ucx_defaults("127.0.0.1")
backend = open_backend(sys.argv[1], "d-0.1.0.0")
os.kill(os.getpid(), signal.SIGHUP)
print(*told, flush=True)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "package"), [("nixl", "nixl_cu12"), ("ucx", "ucxx")])
def test_a_worker_that_has_an_agent_still_hears_a_hangup(name: str, package: str) -> None:
    pytest.importorskip(package, exc_type=ImportError)
    done = subprocess.run([sys.executable, "-c", _PROGRAM, name], capture_output=True, text=True, check=True)
    assert "told" in done.stdout.splitlines()
