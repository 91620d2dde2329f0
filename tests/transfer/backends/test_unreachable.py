"""A host that swallows what it is sent, as behind a firewall: who writes there goes on to write elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvferry.tests.e2e.namespaces import NEEDS_NAMESPACES, Network, network

pytestmark = [pytest.mark.slow, NEEDS_NAMESPACES]

HOSTS = {"p": "198.51.100.1", "d0": "198.51.100.2", "d1": "198.51.100.3"}  # TEST-NET-2: nobody's
SHAPE = [2, 4, 2, 2, 16, 16]


class Peer:
    """`backend_peer.py` on a host of its own."""

    def __init__(self, net: Network, host: str, name: str) -> None:
        script = str(Path(__file__).parent / "backend_peer.py")
        self.popen = subprocess.Popen(
            net.command(host, sys.executable, script, name, f"{host}.1.0.0", json.dumps(SHAPE)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "UCX_TLS": "tcp", "UCX_NET_DEVICES": "eth0", "OMP_NUM_THREADS": "1"},
        )
        self.region = str(self.read()["region"])

    def tell(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def read(self) -> dict[str, object]:
        assert self.popen.stdout is not None
        line = next(line for line in self.popen.stdout if line.startswith("{"))
        value: dict[str, object] = json.loads(line)
        return value

    def ask(self, line: str) -> dict[str, object]:
        self.tell(line)
        return self.read()

    def end(self) -> None:
        self.popen.kill()
        self.popen.communicate()


@pytest.fixture
def net() -> Iterator[Network]:
    with network(HOSTS) as net:
        yield net


@pytest.fixture(params=["nixl", "ucx"])
def peers(net: Network, request: pytest.FixtureRequest) -> Iterator[dict[str, Peer]]:
    pytest.importorskip("ucxx" if request.param == "ucx" else "nixl_cu12", exc_type=ImportError)
    peers: dict[str, Peer] = {}
    try:
        for host in HOSTS:
            peers[host] = Peer(net, host, request.param)
        yield peers
    finally:
        for peer in peers.values():
            peer.end()


def test_nobody_waits_for_a_connection_that_is_not_answered(net: Network, peers: dict[str, Peer]) -> None:
    writer, lost, other = peers["p"], peers["d0"], peers["d1"]
    net.cut("p", "d0")
    assert writer.ask(f"post {lost.region}") == {"state": "posted"}
    other.tell("wait")
    assert writer.ask(f"post {other.region}") == {"state": "posted"}
    assert writer.ask("poll")["state"] == "done"
    assert other.read()["notifications"]
    net.heal("p", "d0")
    lost.tell("wait")
    assert writer.ask(f"post {lost.region}") == {"state": "posted"}
    assert writer.ask("poll")["state"] == "done"
    assert lost.read()["notifications"]
