"""What the measuring process asks of the decode end, a child, over a socket pair.

    order   Begin   ─> Ready      allocate and register the pages
            Reserve ─> Reserved   blocks for a prompt, given in a certain order: the grant that a router would pass on
            Take    ─> Taken      the arrived prompt: a checksum of its blocks, which are free again then
            Books   ─> Held       how many reservations there are
            Usage   ─> Used       CPU seconds of the child

One packet, one message. When the socket closes, the child ends.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TypeVar

from kvferry.benchmarks.handoff.cases import Table
from kvferry.common.config import TransferConfig
from kvferry.common.errors import ConfigError
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.transfer.backends.host_memory import HostMark
from kvferry.wire.codec import Decoder, encode
from kvferry.wire.credentials import SharedSecret
from kvferry.wire.fields import Count, Message
from kvferry.wire.grants import GrantInfo, RegionInfo

CONFIG = TransferConfig(open_within_s=20.0)  # orders, unlike a router's tasks, may wait for a checksum
SECRET = SharedSecret(b"the ends of a measurement")
MAX_PACKET_BYTES = 200_000  # of a socket pair with buffers as Linux sets them


class Begin(Message, frozen=True):
    spec: KVCacheSpec
    num_blocks: Count
    backend: str
    device: str


class Ready(Message, frozen=True):
    region: RegionInfo
    mark: HostMark


class Reserve(Message, frozen=True):
    request_id: str
    num_tokens: Count
    table: Table
    seed: Count
    clear: bool  # fill the blocks with zeros, so that the checksum tells what has arrived


class Reserved(Message, frozen=True):
    grant: GrantInfo


class Take(Message, frozen=True):
    with_checksum: bool


class Taken(Message, frozen=True):
    checksum: Count


class Books(Message, frozen=True):
    pass


class Held(Message, frozen=True):
    num_live: Count


class Usage(Message, frozen=True):
    pass


class Used(Message, frozen=True):
    cpu_s: float


Order = Begin | Reserve | Take | Books | Usage
Answer = Ready | Reserved | Taken | Held | Used
_answers: Decoder[Answer] = Decoder(Answer)
_A = TypeVar("_A", Ready, Reserved, Taken, Held, Used)


class DecodeProcess:
    """The child, seen from the measuring process."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "kvferry.benchmarks.handoff.decode", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # libraries greet there
                pass_fds=(theirs.fileno(),),
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def ask(self, order: Order, kind: type[_A]) -> _A:
        """Send an order and wait for its answer. Raises ConfigError when the child has ended."""
        try:
            self._orders.sendall(encode(order))
            packet = self._orders.recv(MAX_PACKET_BYTES)
        except OSError:
            packet = b""
        if not packet:
            raise ConfigError(f"the decode end has ended with code {self._child.wait()}; its error is above")
        answer = _answers.decode(packet)
        assert isinstance(answer, kind), answer
        return answer

    def close(self) -> None:
        self._orders.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
