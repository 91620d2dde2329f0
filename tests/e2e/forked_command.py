"""Run `python -m kvferry.tests.e2e.forked_command WORD...`: `kvferry WORD...` by a process that has all imports.

    a process with the imports (tests/forks.py) ─> this program ─> the launcher's fork server ─> router and workers
                                                       └─> a process with the imports, of which that is a fork

Nothing else differs from the command: what starts is watched, told and ended by the product. Else each start of a
deployment imports the product three times and torch once, which is four seconds of a core.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import runpy
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from setproctitle import setproctitle

from kvferry.common.exits import exit_process
from kvferry.engine.ranks import group
from kvferry.tests.forks import Fork, Forks
from kvferry.worker import process as worker

NAME = "kvferry.tests.e2e.forked_command"
# What a worker and its other ranks import, now or later.
WORKER_IMPORTS = (
    *("kvferry.worker.process", "kvferry.worker.build", "kvferry.worker.worker"),
    *("kvferry.engine.follower", "kvferry.worker.follower"),
    *("kvferry.engine.nn.attention.paged_torch", "kvferry.engine.nn.attention.tiled", "safetensors"),
    "kvferry.transfer.backends.nixl",
)
# And a launcher and a router, where FastAPI imports pydantic.v1.
IMPORTS = (
    *("kvferry.cli", "kvferry.launch.preflight", "kvferry.launch.progress", "kvferry.launch.command_socket"),
    *("kvferry.launch.local", "kvferry.launch.on_ray"),
    *("kvferry.router.process", "pydantic.v1", "tokenizers", *WORKER_IMPORTS),
)
WITH_NIXL, WITH_UCXX = "kvferry.tests.transfer.loaded_nixl", "kvferry.tests.transfer.loaded_ucxx"  # one of them
_FORK_SERVER = "kvferry.launch.forking.server"
_PR_SET_PDEATHSIG = 1


class _Child:
    """A fork as asyncio's subprocess: what a launcher needs of its fork server."""

    def __init__(self, fork: Fork) -> None:
        self._fork = fork
        self.pid = fork.pid

    @property
    def returncode(self) -> int | None:
        return self._fork.poll()

    def kill(self) -> None:
        self._fork.kill()

    async def wait(self) -> int:
        loop, has_ended = asyncio.get_running_loop(), asyncio.Event()
        if self._fork.poll() is None:
            loop.add_reader(self._fork, has_ended.set)
            await has_ended.wait()
            loop.remove_reader(self._fork)
        return self._fork.wait()


def forking(forks: Forks) -> Callable[..., Awaitable[Any]]:
    """Return asyncio's `create_subprocess_exec`, but that a launcher's fork server is a fork itself."""
    start = asyncio.create_subprocess_exec

    async def create_subprocess_exec(*command: str, **options: Any) -> Any:
        if command[1:3] != ("-m", _FORK_SERVER):
            return await start(*command, **options)
        return _Child(forks.Popen(command, **options))

    return create_subprocess_exec


def _fork_ranks(main: Callable[[], int]) -> Callable[[], int]:
    """Return a worker's program whose other ranks are forks of what it was before it had threads."""

    def main_with_forks() -> int:
        config = json.loads(sys.argv[1 + sys.argv.index("--config-json")])
        if config["engine"]["tensor_parallel_size"] > 1:
            vars(group)["subprocess"] = Forks.here()
        return main()

    return main_with_forks


def _become(path: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
    """Be another program of Python from here on, as `os.execve` would have it."""
    setproctitle(" ".join(argv))
    os.environ.clear()
    os.environ.update(env)
    sys.argv = list(argv[2:])
    runpy.run_module(argv[2], run_name="__main__")
    exit_process(0)


def run(words: Sequence[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # a test run that is killed leaves nothing behind
    setproctitle(" ".join(["python", "-m", "kvferry", *words]))
    vars(worker)["main"] = _fork_ranks(worker.main)
    if words[0] == "serve":
        vars(asyncio)["create_subprocess_exec"] = forking(Forks.here())
    else:
        vars(os)["execve"] = _become
    sys.argv = ["kvferry", *words]
    runpy.run_module("kvferry", run_name="__main__")


if __name__ == "__main__":
    run(sys.argv[1:])
