"""How long /live takes, seen from a process of its own: the attackers' load is not in the figure, but for the cores.

    python -m kvferry.benchmarks.fuzz_poller HOST PORT   polls until its standard input ends, then prints milliseconds

A poll that is not answered within POLL_LIMIT_S counts with that time.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvferry.common.channel import Address

POLL_EVERY_S = 0.01
POLL_LIMIT_S = 5.0
_REQUEST = b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n"


@dataclass(slots=True)
class Polls:
    """Filled in when the polling has ended."""

    latencies_ms: list[float] = field(default_factory=list)
    num_failed: int = 0  # refused, reset or not 200


@contextmanager
def polling(address: Address) -> Iterator[Polls]:
    """Poll while the block runs."""
    command = [sys.executable, "-m", "kvferry.benchmarks.fuzz_poller", address.host, str(address.port)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    polls = Polls()
    try:
        child.stdout.readline()  # it has begun
        yield polls
    finally:
        output, _ = child.communicate(timeout=30.0)
        found = json.loads(output or b'{"latencies_ms": [], "num_failed": 1}')
        polls.latencies_ms, polls.num_failed = found["latencies_ms"], found["num_failed"]


def poll_until_told(address: tuple[str, int]) -> Polls:
    polls = Polls()
    sock: socket.socket | None = None
    while not select.select([sys.stdin], [], [], POLL_EVERY_S)[0]:
        start_s = time.perf_counter()
        try:
            if sock is None:
                sock = socket.create_connection(address, POLL_LIMIT_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(_REQUEST)
            is_well = _read(sock).startswith(b"HTTP/1.1 200 ")
        except OSError:
            is_well = False
        polls.latencies_ms.append(round((time.perf_counter() - start_s) * 1e3, 3))
        if not is_well:
            polls.num_failed += 1
            if sock is not None:
                sock.close()
            sock = None
    return polls


def _read(sock: socket.socket) -> bytes:
    """One answer, or what came of it."""
    answer = b""
    while not answer.endswith(b'"live"}') and (part := sock.recv(4096)):
        answer += part
    return answer


def main() -> int:
    print("begun", flush=True)
    polls = poll_until_told((sys.argv[1], int(sys.argv[2])))
    print(json.dumps({"latencies_ms": polls.latencies_ms, "num_failed": polls.num_failed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
