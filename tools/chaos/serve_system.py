"""`kvferry serve` as the system under test of the fault benchmarks: its metrics, its log, its processes.

Times are wall-clock seconds, as the log's are: what happened in another process is compared with what we did.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from time import perf_counter

import psutil

from ...common.errors import ConfigError
from ..load.cores import process_tree, processes
from ..load.http_client import HttpClient, HttpError
from ..load.server_process import ServerProcess, free_port, running
from .programs import program_name

_START_TIMEOUT_S = 120.0
_SAMPLE = re.compile(r"^([\w:]+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(slots=True, frozen=True)
class Sample:
    """One line of /metrics."""

    name: str
    labels: dict[str, str]
    value: float


@dataclass(slots=True, frozen=True)
class LogLine:
    """One event that a process of the system logged."""

    event: str
    at_s: float  # wall clock
    fields: dict[str, object]


@dataclass(slots=True)
class System:
    """A system that answers."""

    base_url: str
    model: str
    process: ServerProcess
    _log_offset: int = 0
    _lines: list[LogLine] = field(default_factory=list)

    def admin_urls(self) -> list[str]:
        """Return where each router's admin listener is: as many as there are routers. Raises ConfigError."""
        port = self.base_url.rpartition(":")[2]
        command = [sys.executable, "-m", "kvferry", "status", "--json", "--port", port]
        told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if told.returncode:
            raise ConfigError(f"kvferry status --port {port}: {told.stderr or told.stdout}")
        [deployment] = json.loads(told.stdout)
        return [str(url) for url in deployment["admin"]]

    async def samples(self, client: HttpClient, path: str = "/metrics") -> list[Sample]:
        head, body = await client.read("GET", path)
        if head.status != 200:
            raise ConfigError(f"{path} answered {head.status}")
        return parse_metrics(body.decode())

    async def held_blocks(self, client: HttpClient) -> dict[str, float]:
        """Return, by worker, the blocks that are neither free nor cached."""
        held: dict[str, float] = {}
        for sample in await self.samples(client):
            if sample.name == "kvferry_blocks" and sample.labels["state"] not in ("free", "cached"):
                worker = sample.labels["worker"]
                held[worker] = held.get(worker, 0.0) + sample.value
        return held

    async def wait_until_free(self, client: HttpClient, timeout_s: float) -> float | None:
        """Seconds until no worker holds a block and no request is left in the router; None: not within the time."""
        began_s = perf_counter()
        while (waited_s := perf_counter() - began_s) < timeout_s:
            samples = await self.samples(client)
            busy = [s for s in samples if s.name in ("kvferry_queued_requests", "kvferry_num_requests_running")]
            if not any((await self.held_blocks(client)).values()) and not any(s.value for s in busy):
                return waited_s
            await asyncio.sleep(0.005)
        return None

    def lines(self, event: str, since_s: float, worker_id: str | None = None) -> list[LogLine]:
        """The lines of an event that were logged from `since_s` on, of one worker if it is named."""
        self._read_log()
        found = [line for line in self._lines if line.event == event and line.at_s >= since_s]
        return [line for line in found if worker_id in (None, line.fields.get("worker_id"))]

    async def wait_for_line(self, event: str, since_s: float, worker_id: str, timeout_s: float) -> LogLine:
        began_s = perf_counter()
        while perf_counter() - began_s < timeout_s:
            if found := self.lines(event, since_s, worker_id):
                return found[0]
            await asyncio.sleep(0.01)
        raise ConfigError(f"no line {event} of {worker_id} within {timeout_s:g} s")

    def _read_log(self) -> None:
        text = whole_lines(self.process.log_path, self._log_offset)
        self._log_offset += len(text)
        self._lines += filter(None, map(parse_log_line, text.splitlines()))

    def program_pids(self, name: str) -> list[int]:
        """Return the processes that run now, of the worker with this id or of the routers, `router`."""
        found = []
        for process in process_tree([self.process.pid], processes()):
            with suppress(psutil.Error):  # ended meanwhile
                own = program_name(psutil.Process(process.pid)) or ""
                if own == name or own.startswith(f"{name}-"):
                    found.append(process.pid)
        return found

    def program_pid(self, name: str) -> int:
        """Return one of these. Raises ConfigError while there is none."""
        if not (found := self.program_pids(name)):
            raise ConfigError(f"no process of {name}")
        return found[0]

    def resident_mib(self) -> float:
        """Return the memory of all processes of the system together; shared pages count in each."""
        total = 0
        for process in process_tree([self.process.pid], processes()):
            try:
                total += int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            except OSError:
                continue
        return total * 4096 / 2**20


def parse_metrics(text: str) -> list[Sample]:
    """The samples of Prometheus' text format."""
    found = (_SAMPLE.match(line) for line in text.splitlines() if not line.startswith("#"))
    return [Sample(m[1], dict(_LABEL.findall(m[2] or "")), float(m[3])) for m in found if m is not None]


def whole_lines(path: Path, offset: int) -> bytes:
    """Return the lines that a log which grows has behind so many bytes, up to the last whole one."""
    with path.open("rb") as log:
        log.seek(offset)
        text = log.read()
    return text[: text.rfind(b"\n") + 1]


def parse_log_line(line: bytes) -> LogLine | None:
    """None: no event of ours."""
    try:
        fields = json.loads(line)
        return LogLine(fields["event"], datetime.fromisoformat(fields["timestamp"]).timestamp(), fields)
    except (ValueError, KeyError, TypeError):
        return None


@contextmanager
def serving(
    name: str,
    model_dir: Path,
    flags: Sequence[str],
    log_dir: Path,
    *,
    program: Sequence[str] = (sys.executable, "-m", "kvferry", "serve"),
) -> Iterator[System]:
    """The system while the block runs."""
    port = free_port()
    command = [*program, str(model_dir), *flags, "--served-model-name", model_dir.name]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with running(name, command, log_dir) as process:
        url = f"http://127.0.0.1:{port}"
        process.wait_until_healthy(f"{url}/health", _START_TIMEOUT_S)
        yield System(url, model_dir.name, process)


async def until_ready(system: System, timeout_s: float = 30.0) -> None:
    """Every worker is there: the router counts as many ready ones as were started."""
    client = HttpClient(system.base_url)
    began_s = perf_counter()
    try:
        while perf_counter() - began_s < timeout_s:
            try:
                head, _ = await client.read("GET", "/ready")
                if head.status == 200:
                    return
            except HttpError:
                pass
            await asyncio.sleep(0.05)
    finally:
        client.close()
    raise ConfigError(f"not ready within {timeout_s:g} s")
