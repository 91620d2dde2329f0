"""Hosts that share nothing but a network: one namespace each, joined by a bridge in a namespace of its own.

Processes of two hosts do not see each other: they could copy into each other's memory, whatever the network does.
Two hosts are cut from each other without either being told: each is given a hardware address of the other that nobody
has, so that what it sends is lost on the way. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from .cluster import STOP_LIMIT_S, wait_until

NEEDS_NAMESPACES = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
)
_NOBODY = "02:00:00:00:00:fe"


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"ip {' '.join(words)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Network:
    """Hosts by name, with their addresses."""

    addresses: Mapping[str, str]
    prefix: str

    def space(self, host: str) -> str:
        return f"{self.prefix}-{host}"

    def command(self, host: str, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.space(host), *words]

    def add_interface(self, host: str, address: str) -> None:
        """One more, which leads nowhere."""
        _ip("-n", self.space(host), "link", "add", "other0", "type", "veth", "peer", "name", "other1")
        _ip("-n", self.space(host), "addr", "add", f"{address}/24", "dev", "other0")
        _ip("-n", self.space(host), "link", "set", "other0", "up")

    def cut(self, one: str, other: str) -> None:
        """Nothing that either sends reaches the other."""
        for here, there in ((one, other), (other, one)):
            how = ("lladdr", _NOBODY, "dev", "eth0", "nud", "permanent")
            _ip("-n", self.space(here), "neigh", "replace", self.addresses[there], *how)

    def heal(self, one: str, other: str) -> None:
        for here, there in ((one, other), (other, one)):
            _ip("-n", self.space(here), "neigh", "del", self.addresses[there], "dev", "eth0")

    def unplug(self, host: str) -> None:
        _ip("-n", self.space("bridge"), "link", "set", host, "down")

    def plug(self, host: str) -> None:
        _ip("-n", self.space("bridge"), "link", "set", host, "up")

    @contextlib.contextmanager
    def running(
        self, host: str, log: Path, *words: str, env: Mapping[str, str] | None = None
    ) -> Iterator[psutil.Process]:
        """`kvferry WORDS` on a host. What this process told UCX (to stay on the loopback) is not for it."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
        # The first process of a namespace takes no signals from itself: a shell stands in for it.
        apart = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", '"$@"; exit', "sh")
        with (
            log.open("wb") as output,
            subprocess.Popen(
                self.command(host, *apart, sys.executable, "-m", "kvferry", *words),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**inherited, **(env or {})},
            ) as outer,
        ):
            try:
                wait_until(lambda: _below(outer.pid) is not None, f"{host}'s process")
                process = _below(outer.pid)
                assert process is not None
                yield process
            finally:
                _end(outer)


def _below(pid: int) -> psutil.Process | None:
    """The process that the shell has started."""
    found = psutil.Process(pid).children(recursive=True)
    return next((process for process in found if process.name() not in ("unshare", "sh")), None)


def _end(outer: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = _below(outer.pid)
        if process is not None:
            process.resume()
            process.terminate()
    try:
        outer.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        outer.kill()  # and with it the shell, and all that is below


@contextlib.contextmanager
def network(addresses: Mapping[str, str]) -> Iterator[Network]:
    """A namespace for each host; a pair of virtual cables leads from each into the bridge."""
    net = Network(addresses, f"kvf{os.getpid()}")
    bridge = net.space("bridge")
    names = [bridge, *map(net.space, addresses)]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "br0", "up")
        for host, address in addresses.items():
            space = net.space(host)
            _ip("link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", host, "netns", bridge)
            _ip("-n", bridge, "link", "set", host, "master", "br0", "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
        yield net
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
