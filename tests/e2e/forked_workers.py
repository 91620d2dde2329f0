"""Run `python forked_workers.py CONFIG...`: workers as forks of one process with their imports, as a launcher's are.

Torch's imports alone take a second of a core for each. A worker's other ranks are forks as well, of a process that is
forked before the worker has threads. SIGTERM goes to all workers; this program ends when all have ended, or with the
first one that ends unasked, and then takes the others with it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from kvferry.common.exits import exit_process
from kvferry.common.imports import kept_imports
from kvferry.engine.ranks import group
from kvferry.tests.e2e.forked_command import WITH_NIXL, WORKER_IMPORTS
from kvferry.tests.forks import Forks
from kvferry.worker.process import main


def fork(config: str) -> int:
    """Start a worker; returns its process id."""
    if pid := os.fork():
        return pid
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if json.loads(config)["engine"]["tensor_parallel_size"] > 1:
        vars(group)["subprocess"] = Forks.here()
    sys.argv = ["kvferry.worker", "--config-json", config]
    exit_process(main())


def run(configs: list[str]) -> int:
    """Run a worker of each until all have ended; returns the first exit code that is not 0."""
    running: set[int] = set()
    told = False

    def send(number: int) -> None:
        for pid in running:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        send(number)

    signal.signal(signal.SIGTERM, pass_on)
    for config in configs:
        running.add(fork(config))
    if told:
        send(signal.SIGTERM)
    first = 0
    while running:
        pid, status = os.wait()
        running.remove(pid)
        first = first or os.waitstatus_to_exitcode(status)
        if not told:
            told, first = True, first or 1
            send(signal.SIGKILL)
    return first


if __name__ == "__main__":
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a fork would be without the others of its pool
    with kept_imports():
        for module in (*WORKER_IMPORTS, WITH_NIXL):
            importlib.import_module(module)
    exit_process(run(sys.argv[1:]) & 0xFF)
