"""Stand-ins for router and worker: they keep the launcher's contract and do nothing else.

    python launch_stubs.py router|worker --config-json JSON --lifeline-fd N [--http-fd N]

What a stub should do wrong comes in the model's name, so that every life of it does the same.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.wire.lifeline import Lifeline

if TYPE_CHECKING:  # a hundred of these processes are started: each would take half a second to import pydantic
    from kvferry.wire.credentials import SharedSecret


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def whole_lines(path: Path) -> list[str]:
    """Somebody may be writing the last one."""
    return path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []


def note(config: dict[str, Any], name: str, **facts: object) -> None:
    """Append a line about this life to a file beside the model, for the test to read."""
    line = {"name": name, "pid": os.getpid(), "config": config, "env": dict(os.environ), **facts}
    with (Path(config["model_dir"]) / "lives.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def end(config: dict[str, Any], number: int) -> None:
    """As it is told to."""
    folder = Path(config.get("model_dir") or config["engine"]["model_dir"])
    line = json.dumps({"name": config.get("worker_id", "router"), "signal": number})
    with (folder / "signals.jsonl").open("a") as file:
        file.write(line + "\n")
    os._exit(0)


def run_router(config: dict[str, Any], lifeline: Lifeline, http_fd: int) -> None:
    """It has as ready whoever began a life last, by the file of lives; it wishes what another file says."""
    note(config, "router", http_fd=http_fd)
    sock = socket.socket(fileno=http_fd)
    lifeline.ready(
        http=f"127.0.0.1:{sock.getsockname()[1]}", control=f"127.0.0.1:{config['control_port'] or 4242}"
    )  # nothing connects
    beat(lifeline)
    folder = Path(config["model_dir"])
    lives, wishes, heard = folder / "lives.jsonl", folder / "wishes.jsonl", folder / "heard.jsonl"

    def hear(event: dict[str, Any]) -> None:
        append(heard, {"pid": os.getpid(), **event})
        if event["event"] == "reload":
            lifeline.send({**event, "event": "reloaded", "error": ""})

    lifeline.listen(hear)
    told, num_wished = None, 0
    while True:
        for wish in whole_lines(wishes)[num_wished:]:
            num_wished += 1
            lifeline.send(json.loads(wish))
        workers = {life["name"]: life["pid"] for life in map(json.loads, whole_lines(lives))}
        workers.pop("router")
        if workers != told:
            lifeline.send({"event": "pools", "reasons": [], "workers": workers})
        told = workers
        threading.Event().wait(0.05)


def run_worker(config: dict[str, Any], lifeline: Lifeline) -> None:
    engine = config["engine"]
    fault = engine["served_model_name"]
    with contextlib.suppress(FileNotFoundError):  # what goes wrong from some life on
        fault = (Path(engine["model_dir"]) / "fault").read_text()
    if fault == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    follower = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    facts = {"routers": config["routers"], "calibration_s": config["calibration_s"]}
    note(engine, config["worker_id"], follower=follower.pid, **facts)
    if fault == "unknown model":
        lifeline.failed("no such model")
        sys.exit(2)
    if fault == "broke":
        lifeline.broke("rank 1 ended")
        sys.exit(1)
    if fault == "crash":
        sys.exit(3)
    lifeline.progress("loading", 0.5)
    answer = {"event": "reloaded", "error": "the file is gone" if fault == "no reload" else ""}
    lifeline.listen(lambda event: lifeline.send(answer) if event["event"] == "reload" else None)
    lifeline.ready(incarnation=os.getpid())
    if fault != "hang":
        beat(lifeline)
    threading.Event().wait()


def beat(lifeline: Lifeline) -> None:
    def run() -> None:
        while True:
            lifeline.beat()
            threading.Event().wait(0.1)

    threading.Thread(target=run, daemon=True).start()


async def serve_worker(config: Any, secret: SharedSecret, lifeline: Lifeline) -> int:
    """What an actor runs instead of `kvferry.worker.serve_worker`."""
    import ray

    facts = {"host": config.host, "routers": config.routers, "secret": secret.said.decode(), "role": config.role}
    facts["niceness"] = os.getpriority(os.PRIO_PROCESS, 0)
    node = ray.get_runtime_context().get_node_id()
    note(json.loads(config.engine.model_dump_json()), config.worker_id, node=node, **facts)
    fault = config.engine.served_model_name
    with contextlib.suppress(FileNotFoundError):
        fault = (Path(config.engine.model_dir) / "fault").read_text()
    if fault == "unknown model":
        lifeline.failed("no such model")
        return 2
    if fault == "killed":
        asyncio.get_running_loop().call_later(0.2, os.kill, os.getpid(), signal.SIGKILL)
    else:
        lifeline.ready()
    await asyncio.Event().wait()
    return 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("--config-json")
    parser.add_argument("--lifeline-fd", type=int)
    parser.add_argument("--http-fd", type=int)
    arguments = parser.parse_args()
    config = json.loads(arguments.config_json)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: end(config, number))
    lifeline = Lifeline.from_fds(arguments.lifeline_fd, None)
    assert lifeline is not None
    if arguments.kind == "router":
        run_router(config, lifeline, arguments.http_fd)
    else:
        run_worker(config, lifeline)


if __name__ == "__main__":
    main()
