"""Stand-ins for router and worker: they keep the launcher's contract and do nothing else.

    python launch_stubs.py router|worker --config-json JSON --lifeline-fd N

What a stub should do wrong comes in the model's name, so that every life of it does the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from kvferry.common.lifeline import Lifeline


class Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        pass


def note(config: dict[str, Any], name: str, **facts: object) -> None:
    """Append a line about this life to a file beside the model, for the test to read."""
    line = {"name": name, "pid": os.getpid(), "config": config, "env": dict(os.environ), **facts}
    with (Path(config["model_dir"]) / "lives.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def run_router(config: dict[str, Any], lifeline: Lifeline) -> None:
    server = ThreadingHTTPServer((config["host"], config["port"]), Ready)
    note(config, "router")
    control = config["control_port"] or 4242  # nothing connects
    lifeline.ready(http=f"127.0.0.1:{server.server_port}", control=f"127.0.0.1:{control}")
    beat(lifeline)
    server.serve_forever()


def run_worker(config: dict[str, Any], lifeline: Lifeline) -> None:
    engine = config["engine"]
    fault = engine["served_model_name"]
    if fault == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    follower = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    note(engine, config["worker_id"], follower=follower.pid, routers=config["routers"])
    if fault == "unknown model":
        lifeline.failed("no such model")
        sys.exit(2)
    if fault == "crash":
        sys.exit(3)
    lifeline.progress("loading", 0.5)
    lifeline.ready()
    if fault != "hang":
        beat(lifeline)
    threading.Event().wait()


def beat(lifeline: Lifeline) -> None:
    def run() -> None:
        while True:
            lifeline.beat()
            threading.Event().wait(0.1)

    threading.Thread(target=run, daemon=True).start()


async def serve_worker(config: Any, secret: bytes, lifeline: object) -> int:
    """What an actor runs instead of `kvferry.worker.serve_worker`."""
    import ray

    facts = {"host": config.host, "routers": config.routers, "secret": secret.decode(), "role": config.role}
    node = ray.get_runtime_context().get_node_id()
    note(json.loads(config.engine.model_dump_json()), config.worker_id, node=node, **facts)
    await asyncio.Event().wait()
    return 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("--config-json")
    parser.add_argument("--lifeline-fd", type=int)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    run = run_router if arguments.kind == "router" else run_worker
    run(json.loads(arguments.config_json), Lifeline.from_fd(arguments.lifeline_fd))


if __name__ == "__main__":
    main()
