"""What others notice of an attack, seen from a process of its own: the attackers' load is not in the figures, but for
the cores.

    python -m kvferry.benchmarks.fuzz.poller HOST PORT   until its standard input ends; then prints what it saw

/live is polled every 10 ms; a poll that is not answered within POLL_LIMIT_S counts with that time. Beside it another
tenant reads one stream after the other: one that has not all of its tokens, or no end, is broken.
"""

from __future__ import annotations

import http.client
import json
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from kvferry.benchmarks.fuzz.target import VICTIM_KEY
from kvferry.wire.address import Address

POLL_EVERY_S = 0.01
POLL_LIMIT_S = 5.0
_STREAM_TOKENS = 100  # a second of the worker's steps
_STREAM_LIMIT_S = 60.0
_REQUEST = b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n"


@dataclass(slots=True)
class Polls:
    """Filled in when the polling has ended."""

    latencies_ms: list[float] = field(default_factory=list)
    num_failed: int = 0  # refused, reset or not 200
    num_streams: int = 0  # of the other tenant
    broken: list[str] = field(default_factory=list)  # how those ended that did not end well


@contextmanager
def polling(address: Address) -> Iterator[Polls]:
    """Poll while the block runs."""
    command = [sys.executable, "-m", "kvferry.benchmarks.fuzz.poller", address.host, str(address.port)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    polls = Polls()
    try:
        child.stdout.readline()  # it has begun
        yield polls
    finally:
        output, _ = child.communicate(timeout=2 * _STREAM_LIMIT_S)
        for name, value in json.loads(output or b'{"num_failed": 1}').items():
            setattr(polls, name, value)


def read_streams(address: tuple[str, int], polls: Polls, is_over: threading.Event) -> None:
    """The other tenant's, until told; the last one is read to its end."""
    body = {"prompt": "victim", "max_tokens": _STREAM_TOKENS, "ignore_eos": True, "stream": True}
    headers = {"content-type": "application/json", "authorization": f"Bearer {VICTIM_KEY}"}
    while not is_over.is_set():
        connection = http.client.HTTPConnection(*address, timeout=_STREAM_LIMIT_S)
        polls.num_streams += 1
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
            if (
                answer.status != 200
                or not text.endswith(b"data: [DONE]\n\n")
                or b'"finish_reason":"length"' not in text
            ):
                polls.broken.append(f"{answer.status}: {text[-200:]!r}")
        except (OSError, http.client.HTTPException) as error:
            polls.broken.append(repr(error))
        finally:
            connection.close()


def poll_until_told(address: tuple[str, int], polls: Polls) -> None:
    """Poll at least once, however short the attack was."""
    sock: socket.socket | None = None
    is_over = False
    while not is_over:
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
        is_over = bool(select.select([sys.stdin], [], [], POLL_EVERY_S)[0])


def _read(sock: socket.socket) -> bytes:
    """One answer, or what came of it."""
    answer = b""
    while not answer.endswith(b'"live"}') and (part := sock.recv(4096)):
        answer += part
    return answer


def main() -> int:
    print("begun", flush=True)
    address, polls, is_over = (sys.argv[1], int(sys.argv[2])), Polls(), threading.Event()
    victim = threading.Thread(target=read_streams, args=(address, polls, is_over))
    victim.start()
    poll_until_told(address, polls)
    is_over.set()
    victim.join()
    print(json.dumps(asdict(polls)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
