"""The routers whose overhead is measured, each in front of stub workers that answer at once or at a pace.

    kvferry          `python -m kvferry.router`, one prefill and some decode workers (workers.py)
    sglang-router    sglang's, round robin, in front of as many stub servers (openai_stub.py)

The router has the first core for itself; the stub and whoever measures share the second.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kvferry.benchmarks.overhead.steps import MODEL
from kvferry.common.config import API_KEY_VARIABLE, SECRET_VARIABLE
from kvferry.common.router_config import RouterConfig
from kvferry.models.tokenizer import Tokenizer
from kvferry.tools.load.cores import process_tree, processes
from kvferry.tools.load.server_process import free_port, running

_START_S = 60.0
_MODEL_LEN = 8192
_KEY = "overhead-key"
_SECRET = "overhead-secret-of-the-fabric"
_NUM_LETTERS = 26


@dataclass(slots=True, frozen=True)
class Setup:
    """What the routers are started with."""

    model_dir: Path
    log_dir: Path
    peer_venv: Path
    router_core: int
    load_core: int
    num_workers: int  # decode workers; a peer's servers


@dataclass(slots=True)
class Target:
    """A router that answers. `records` is there when its block has ended."""

    port: int
    pid: int
    headers: dict[str, str]
    stream_of: Callable[[str], str]  # an answer's id -> the stub's name of it
    records: dict[str, tuple[float, list[float]]] = field(default_factory=dict)  # own seconds, when tokens left

    def cpu_s(self) -> float:
        """Of the router and its children, so far."""
        return sum(process.cpu_s for process in process_tree([self.pid], processes()))


StartRouter = Callable[[Setup, float], AbstractContextManager[Target]]


@contextmanager
def kvferry_router(setup: Setup, step_ms: float) -> Iterator[Target]:
    http, control = free_port(), free_port()
    config = RouterConfig(
        port=http,
        control_port=control,
        model_dir=setup.model_dir,
        served_model_name=MODEL,
        max_model_len=_MODEL_LEN,
    )
    env = {API_KEY_VARIABLE: _KEY, SECRET_VARIABLE: _SECRET}
    records = setup.log_dir / "records.json"
    worker = [sys.executable, "-m", "kvferry.benchmarks.overhead.workers", str(control), "--model-len", str(_MODEL_LEN)]
    worker += ["--letters", _letters(setup.model_dir), "--decode-workers", str(setup.num_workers)]
    worker += ["--step-ms", str(step_ms), "--records", str(records)]
    command = [sys.executable, "-m", "kvferry.router", "--config-json", config.model_dump_json()]
    with _on_core(setup.router_core, setup.load_core), running("router", command, setup.log_dir, env) as router:
        router.wait_until_healthy(f"http://127.0.0.1:{http}/live", _START_S)
        os.sched_setaffinity(0, {setup.load_core})
        target = Target(http, router.pid, {"authorization": f"Bearer {_KEY}"}, lambda name: f"{name[5:]}-0")
        with running("workers", worker, setup.log_dir, env):
            router.wait_until_healthy(f"http://127.0.0.1:{http}/ready", _START_S)
            yield target
        target.records = json.loads(records.read_text())


@contextmanager
def sglang_router(setup: Setup, step_ms: float) -> Iterator[Target]:
    http, metrics = free_port(), free_port()
    ports = [str(free_port()) for _ in range(setup.num_workers)]
    records = setup.log_dir / "records.json"
    stub = [sys.executable, "-m", "kvferry.benchmarks.overhead.openai_stub", *ports, "--step-ms", str(step_ms)]
    command = [str(setup.peer_venv / "bin" / "python"), "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
    command += ["--port", str(http), "--prometheus-port", str(metrics), "--log-level", "warn"]
    command += ["--policy", "round_robin", "--worker-urls", *(f"http://127.0.0.1:{port}" for port in ports)]
    with running("stub", [*stub, "--records", str(records)], setup.log_dir) as server:
        os.sched_setaffinity(server.pid, {setup.load_core})
        server.wait_until_healthy(f"http://127.0.0.1:{ports[0]}/health", _START_S)
        with _on_core(setup.router_core, setup.load_core), running("router", command, setup.log_dir) as router:
            router.wait_until_healthy(f"http://127.0.0.1:{http}/readiness", _START_S)
            os.sched_setaffinity(0, {setup.load_core})
            target = Target(http, router.pid, {}, lambda name: name)
            yield target
    target.records = json.loads(records.read_text())


ROUTERS: dict[str, StartRouter] = {"kvferry": kvferry_router, "sglang-router": sglang_router}


@contextmanager
def _on_core(core: int, afterwards: int) -> Iterator[None]:
    """What is started in the block begins on this core, with all of its threads."""
    os.sched_setaffinity(0, {core})
    with contextlib.ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, {afterwards})
        yield


def _letters(model_dir: Path) -> str:
    """Token ids that are one letter each."""
    tokenizer = Tokenizer.from_dir(model_dir)
    ids = [tokenizer.encode(chr(ord("a") + number), False)[0] for number in range(_NUM_LETTERS)]
    return ",".join(map(str, ids))
