"""A process of ours that has ended its work ends, though a thread of it is within a call that does not return."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvferry.common.config import WorkerConfig
from kvferry.common.router_config import RouterConfig

from ..engine_driver import engine_config

PROGRAM = """
import asyncio, runpy, sys
from kvferry.{room} import process

async def serve(*args, **kwargs):  # a file of a mount that hangs is being opened
    asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    return 3

process.serve_{room} = serve
runpy.run_module("kvferry.{room}", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", ["router", "worker"])
def test_a_thread_that_hangs_keeps_no_process(tmp_path: Path, room: str) -> None:
    configs = {
        "router": RouterConfig(port=0, model_dir=tmp_path, served_model_name="tiny"),
        "worker": WorkerConfig(worker_id="d-0", role="decode", engine=engine_config(tmp_path), routers=("h:1",)),
    }
    command = [sys.executable, "-c", PROGRAM.format(room=room), "--config-json", configs[room].model_dump_json()]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            assert process.wait(timeout=60) == 3
        finally:
            process.kill()
