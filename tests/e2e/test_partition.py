"""The network between hosts fails under load, and comes back: streams go on, and no late byte lands where it matters.

Router, a prefill and two decode workers in network namespaces, KV by TCP. Skipped where namespaces are not permitted.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil
import pytest

from kvferry.tools.chaos.events import RequestEvent
from kvferry.tools.chaos.requests import Ask
from kvferry.tools.chaos.serve_system import Sample, parse_metrics
from kvferry.tools.load.tiny_model import write_tiny_model

from .cluster import START_LIMIT_S, wait_until
from .drill import Drill
from .history_client import DONE, FLOWING
from .namespaces import NEEDS_NAMESPACES, Network, network

pytestmark = [pytest.mark.slow, NEEDS_NAMESPACES]

HOSTS = {"r": "198.51.100.1", "p": "198.51.100.2", "d0": "198.51.100.3", "d1": "198.51.100.4"}  # TEST-NET-2: nobody's
PORT, CONTROL_PORT = 8000, 7001
KEY = "key"
CLIENT = "kvferry.tests.e2e.history_client"
_decode_event = msgspec.json.Decoder(RequestEvent).decode


@dataclass
class HostsDrill(Drill):
    """The client is on the router's host."""

    net: Network = field(kw_only=True)
    client: subprocess.Popen[bytes] = field(kw_only=True)  # history_client.py
    logs: list[Path] = field(kw_only=True)
    prefill: psutil.Process = field(kw_only=True)

    def _ask(self, job: str | Sequence[Ask]) -> Iterator[bytes]:
        """Yield the lines of the client's answer."""
        assert self.client.stdin is not None and self.client.stdout is not None
        self.client.stdin.write(msgspec.json.encode(job) + b"\n")
        self.client.stdin.flush()
        yield from iter(self.client.stdout.readline, b"")
        raise AssertionError(f"the client has ended\n{self.log_tail()}")

    def send(self, asks: Sequence[Ask], when_flowing: Callable[[], None]) -> dict[int, list[RequestEvent]]:
        events: dict[int, list[RequestEvent]] = {one.number: [] for one in asks}
        for line in self._ask(list(asks)):
            if line == DONE:
                break
            if line == FLOWING:
                when_flowing()
            else:
                event = _decode_event(line)
                events[event.request].append(event)
        return events

    def get(self, path: str) -> tuple[int, str]:
        return msgspec.json.decode(next(self._ask(path)), type=tuple[int, str])

    def metrics(self) -> list[Sample]:
        return parse_metrics(self.get("/metrics")[1])

    def log_tail(self) -> str:
        return "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in self.logs)


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostsDrill]:
    folder: Path = tmp_path_factory.mktemp("partition")
    model_dir, failpoints = str(write_tiny_model(folder / "tiny")), folder / "failpoints"
    secret = folder / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef")
    secret.chmod(0o600)
    shared = ["--served-model-name", "tiny", "--secret-file", str(secret), "--deterministic"]
    router = ["--host", HOSTS["r"], "--port", str(PORT), "--api-key", KEY]
    router += ["--control-host", HOSTS["r"], "--control-port", str(CONTROL_PORT)]
    engine = ["--router", f"{HOSTS['r']}:{CONTROL_PORT}", "--kv-cache-memory-bytes", "8MiB", "--num-threads", "1"]
    env = Drill.environment(failpoints)
    with network(HOSTS) as net, contextlib.ExitStack() as stack:
        logs = [folder / f"{host}.log" for host in HOSTS]
        processes = {}
        for (host, address), log in zip(HOSTS.items(), logs, strict=True):
            role = {"r": "router", "p": "prefill"}.get(host, "decode")
            own = router if host == "r" else [*engine, "--worker-id", host, "--host", address]
            words = [role, model_dir, *shared, *own]
            processes[host] = stack.enter_context(net.running(host, log, *words, env=env))
        command = net.command("r", sys.executable, "-m", CLIENT, f"http://{HOSTS['r']}:{PORT}", KEY)
        client = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        drill = HostsDrill(failpoints, 3, net=net, client=client, logs=logs, prefill=processes["p"])
        wait_until(lambda: drill.get("/ready")[0] == 200, "readiness", START_LIMIT_S)
        drill.settle()
        drill.learn()
        yield drill


@pytest.fixture(autouse=True)
def rest(drill: HostsDrill) -> Iterator[None]:
    """Afterwards all three workers are there, all blocks are free, and everything works."""
    yield
    drill.settle()
    drill.check(drill.stream())
    drill.settle()


@pytest.mark.parametrize("ends", [("r", "d0"), ("p", "d0"), ("r", "p")], ids=" and ".join)
def test_streams_go_on_when_two_hosts_cannot_reach_each_other(drill: HostsDrill, ends: tuple[str, str]) -> None:
    try:
        drill.check(drill.stream(when_flowing=lambda: drill.net.cut(*ends)))
        drill.check(drill.stream())  # sent while the cut lasts
    finally:
        drill.net.heal(*ends)


def test_streams_go_on_when_a_decode_worker_is_unplugged(drill: HostsDrill) -> None:
    try:
        drill.check(drill.stream(when_flowing=lambda: drill.net.unplug("d0")))
    finally:
        drill.net.plug("d0")


@pytest.mark.parametrize("heals_first", [True, False], ids=["the link heals", "the link stays dead"])
def test_what_was_written_into_a_dead_link_lands_in_no_block_that_is_used_again(
    drill: HostsDrill, heals_first: bool
) -> None:
    """The prefill worker stands between its look at the lease and its post while the link goes; then it posts.

    Quarantine ends by the writer's own word once the link is back, or by a fence while it is not.
    """
    cuts = [("p", "d0"), ("p", "d1")]

    def cut_and_continue() -> None:
        wait_until(lambda: drill.has_acted, "a prefill worker in the middle of a handoff")
        wait_until(lambda: drill.prefill.status() == psutil.STATUS_STOPPED, "its stop")
        for cut in cuts:
            drill.net.cut(*cut)
        drill.prefill.resume()

    drill.arm("transfer.write=stop")
    try:
        drill.check(drill.stream_beside(cut_and_continue))
        if not heals_first:
            wait_until(lambda: drill.total("kvferry_fences_total") > 0, "a fence")
            drill.settle()
            drill.check(drill.stream())
    finally:
        for cut in cuts:
            drill.net.heal(*cut)
    for _ in range(3):  # blocks are used again while the late bytes come
        drill.check(drill.stream())
