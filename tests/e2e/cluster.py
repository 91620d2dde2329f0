"""A whole kvferry on loopback for tests: `kvferry serve` as a process, with its workers below it."""

from __future__ import annotations

import contextlib
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from kvferry.common.config import SECRET_VARIABLE
from kvferry.common.errors import ConfigError
from kvferry.launch.running import ask, runtime_dir, socket_of
from kvferry.tools.chaos.programs import program_name
from kvferry.tools.load.server_process import free_port, tied

from ..forks import Fork, Forks
from .forked_command import IMPORTS, NAME, WITH_NIXL, WITH_UCXX

START_LIMIT_S = 240.0  # these bounds are for machines that are slow and busy: what works never waits so long
STOP_LIMIT_S = 60.0
COMMAND_LIMIT_S = 180.0
WAIT_LIMIT_S = 120.0
FORKS = Forks(*IMPORTS, WITH_NIXL)
UCX_FORKS = Forks(*IMPORTS, WITH_UCXX)  # for agents of another copy of UCX than NIXL's
_POLL_SHARE = 0.2  # of what was waited already, until the next look
_MAX_POLL_S = 0.5


@dataclass
class Cluster:
    """A running server. `log` holds what it and its children print."""

    process: subprocess.Popen[bytes] | Fork
    base_url: str
    log: Path
    client: httpx.Client
    workers: list[Fork] = field(default_factory=list)  # those without a launcher

    def post(self, path: str, body: dict[str, object]) -> dict[str, object]:
        """A successful answer's body; the server's own error otherwise."""
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
        result: dict[str, object] = answer.json()
        return result

    def metric(self, name: str, *labels: str) -> float:
        """The sum of a metric's samples whose labels contain all of `labels`; without labels there may be none yet."""
        text = self.client.get("/metrics").text
        family = name.removesuffix("_sum").removesuffix("_count")
        assert f"# TYPE {family} " in text, f"{name} is no metric"
        samples = [line.rpartition(" ") for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        values = [float(value) for key, _, value in samples if all(label in key for label in labels)]
        assert values or not labels, f"{name} has no sample with {labels}"
        return sum(values)

    def status(self) -> dict[str, Any]:
        """What `kvferry status` knows of it; empty before its launcher takes commands."""
        path = socket_of(runtime_dir(os.environ), self.process.pid)
        try:
            [answer] = ask(path, {"command": "status"}, limit_s=STOP_LIMIT_S)
        except ConfigError:
            return {}
        return answer

    @property
    def admin_urls(self) -> list[str]:
        """Of each router."""
        return list(self.status()["admin"])

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`kvferry status`, `restart` ... of this deployment; it must succeed."""
        port = self.base_url.rpartition(":")[2]
        argv = [sys.executable, "-m", "kvferry", *words, "--port", port]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_LIMIT_S)
        assert done.returncode == 0, done.stderr
        return done

    def children(self, word: str = "") -> list[psutil.Process]:
        """The server's processes whose command line contains `word`."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        found += [psutil.Process(worker.pid) for worker in self.workers if worker.poll() is None]
        running = []
        for child in found:
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                if word in " ".join(child.cmdline()):
                    running.append(child)
        return running

    def programs(self, name: str = "") -> list[psutil.Process]:
        """The routers and workers whose names begin so: a worker's is its id, `p-0` or `d-0`."""
        running = []
        for child in self.children():
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                if (own := program_name(child)) and own.startswith(name):
                    running.append(child)
        return running


def wait_until(condition: object, what: str, limit_s: float = WAIT_LIMIT_S) -> None:
    """Poll a condition; fail with `what` when it does not come true."""
    assert callable(condition)
    began = time.monotonic()
    while (waited_s := time.monotonic() - began) < limit_s:
        if condition():
            return
        # The longer it takes, the rarer: a look at /metrics costs those who are waited for their time.
        time.sleep(min(0.02 + _POLL_SHARE * waited_s, _MAX_POLL_S))
    raise AssertionError(f"{what} did not come true within {limit_s} s")


@contextlib.contextmanager
def serve(
    model_dir: Path | None,
    log: Path,
    *flags: str,
    env: dict[str, str] | None = None,
    is_fork: bool = True,
    forks: Forks = FORKS,
    tls: ssl.SSLContext | None = None,
) -> Iterator[Cluster]:
    """Start `kvferry serve` and wait until it is ready; afterwards nothing of it may be left.

    `is_fork`: its processes have their imports from that of `forks` (forked_command.py), else it is the command. That
    alone can start itself anew, to hide keys among its flags. `tls`: how clients come to it.
    """
    port = free_port()
    words = ["serve", *([str(model_dir)] if model_dir else []), "--port", str(port), *flags]
    environment = {**os.environ, **(env or {})}
    with log.open("wb") as output:
        process: subprocess.Popen[bytes] | Fork
        if is_fork:
            process = forks.Popen(
                [sys.executable, "-m", NAME, *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        else:
            process = subprocess.Popen(
                tied([sys.executable, "-m", "kvferry", *words]),  # a test run that is killed leaves nothing behind
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
    base_url = f"{'http' if tls is None else 'https'}://127.0.0.1:{port}"
    with httpx.Client(base_url=base_url, timeout=240.0, verify=tls or True) as client:
        cluster = Cluster(process, base_url, log, client)
        try:
            _wait_ready(cluster)
            wait_until(lambda: cluster.status().get("state") == "serving", "every worker", START_LIMIT_S)
            yield cluster
        finally:
            _stop(cluster)


@contextlib.contextmanager
def serve_by_hand(
    model_dir: Path,
    log: Path,
    workers: Mapping[str, str],
    *flags: str,
    shared: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
) -> Iterator[Cluster]:
    """A router and workers (id to role), each by a command of its own: nobody watches them or starts them again.

    `flags` are for the workers, `shared` are for the router as well.
    """
    port, control = free_port(), free_port()
    own = {
        "router": ["router", "--port", str(port), "--control-port", str(control)],
        **{
            name: [role, "--router", f"127.0.0.1:{control}", "--worker-id", name, *flags]
            for name, role in workers.items()
        },
    }
    model = (str(model_dir), "--served-model-name", "tiny")
    commands = [[sys.executable, "-m", NAME, command, *model, *shared, *words] for command, *words in own.values()]
    environment = {SECRET_VARIABLE: "a secret for these tests", **(env or {})}
    with run_all(commands, log, f"http://127.0.0.1:{port}", env=environment) as cluster:
        yield cluster


@contextlib.contextmanager
def run_all(
    commands: Sequence[Sequence[str]], log: Path, base_url: str, *, env: Mapping[str, str] | None = None
) -> Iterator[Cluster]:
    """Run a router's program and those of its workers until the block ends; they are ready when it begins.

    Each is a fork of the process that has the imports.
    """
    processes: list[Fork] = []
    environment = {**os.environ, **(env or {})}
    with log.open("wb") as output, httpx.Client(base_url=base_url, timeout=240.0) as client:
        try:
            for command in commands:
                processes.append(FORKS.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
            cluster = Cluster(processes[0], base_url, log, client, processes[1:])
            _wait_ready(cluster)
            yield cluster
        finally:
            for process in reversed(processes):
                process.send_signal(signal.SIGCONT)
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait(STOP_LIMIT_S)


def _wait_ready(cluster: Cluster) -> None:
    def is_ready() -> bool:
        ended = [process.args for process in (cluster.process, *cluster.workers) if process.poll() is not None]
        assert not ended, f"{ended} ended: {cluster.log.read_text()[-4000:]}"
        with contextlib.suppress(httpx.TransportError):
            return cluster.client.get("/ready").status_code == 200
        return False

    try:
        wait_until(is_ready, "readiness", START_LIMIT_S)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{cluster.log.read_text()[-4000:]}") from error


def _stop(cluster: Cluster) -> None:
    children = [] if cluster.process.poll() is not None else cluster.children()
    cluster.process.send_signal(signal.SIGTERM)
    try:
        cluster.process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        cluster.process.kill()
        cluster.process.wait()
        raise AssertionError(f"the server did not stop: {cluster.log.read_text()[-4000:]}") from None
    _, alive = psutil.wait_procs(children, timeout=5.0)
    assert not alive, f"left behind: {alive}"
