"""The other process of the backend tests: registers pages, describes them, then obeys lines of standard input.

in   wait              poll until a notification has come
in   clear             fill the pages with zeros
in   fill              fill them with ones
in   number            fill page n with n, and say so
in   progress          let what is on its way come in, if anything does
in   rotate N          replace the agent
in   cut               break every TCP connection of this process, as a network does
in   post REGION       begin to write every page onto the same page over there, and make no progress
in   poll              progress until that write has ended
out                    after each, one line of JSON with the notifications, the number of bytes that are not zero and a
                       hash of the pages; the region at the start and after `rotate`; the write's state; what was cut
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import time

import msgspec
import torch

from kvferry.common.errors import TransferError
from kvferry.transfer.backends.base import Piece, TransferHandle, TransferState, page_rows
from kvferry.transfer.backends.choose import open_backend, set_ucx_defaults
from kvferry.wire.grants import RegionInfo

_ROUNDS = 1500  # of progress without anything to wait for


class Peer:
    def __init__(self, name: str, agent: str, shape: list[int]) -> None:
        self.pages = torch.zeros(shape, dtype=torch.float32)
        self.backend = open_backend(name, agent)
        self.region = self.backend.register(self.pages, rank=0, tp_size=1, generation=0)
        self.handle: TransferHandle | None = None

    def obey(self, command: str, argument: str) -> dict[str, object]:
        if command in ("clear", "fill"):
            self.pages.fill_(float(command == "fill"))
        elif command == "number":
            num_pages = self.pages.shape[0] * self.pages.shape[1]
            self.pages.view(num_pages, -1)[:] = torch.arange(num_pages)[:, None]
        elif command == "rotate":
            self.region = self.backend.rotate(int(argument))
            return {"region": msgspec.msgpack.encode(self.region).hex()}
        elif command == "cut":
            return {"num_cut": cut_connections()}
        elif command == "post":
            return {"state": self.post(msgspec.msgpack.decode(bytes.fromhex(argument), type=RegionInfo))}
        elif command == "poll":
            return {"state": self.poll()}
        found: list[tuple[str, str]] = []
        rounds = 0
        while (command == "wait" and not found) or (command == "progress" and rounds < _ROUNDS):
            found += [(sender, payload.hex()) for sender, payload in self.backend.notifications()]
            rounds += 1
            time.sleep(0.0005)
        rows = page_rows(self.pages)
        return {
            "notifications": found,
            "digest": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
            "num_written": int(rows.count_nonzero()),
        }

    def post(self, region: RegionInfo) -> str:
        every_page = list(range(self.pages.shape[0] * self.pages.shape[1]))
        try:
            self.backend.connect(region, (Piece(0, 0, region.page_bytes),))
            self.handle = self.backend.write(region.agent, every_page, every_page, b"arrived")
        except TransferError as error:
            self.handle = None
            return f"raised: {error}"
        return "posted"

    def poll(self) -> str:
        state = TransferState.FAILED
        rounds = 0
        while self.handle is not None and rounds < 10 * _ROUNDS:
            state = self.backend.poll(self.handle)
            self.backend.notifications()
            if state is not TransferState.PENDING:
                self.backend.release(self.handle)
                self.handle = None
            rounds += 1
            time.sleep(0.0005)
        return state.value


def cut_connections() -> int:
    """Return how many there were."""
    num_cut = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(number))) as found:
            if found.family == socket.AF_INET and found.type == socket.SOCK_STREAM and found.getpeername():
                found.shutdown(socket.SHUT_RDWR)
                num_cut += 1
    return num_cut


def main(name: str, agent: str, shape: list[int]) -> None:
    set_ucx_defaults("127.0.0.1")
    torch.set_num_threads(1)
    peer = Peer(name, agent, shape)
    answer({"region": msgspec.msgpack.encode(peer.region).hex()})
    for line in iter(sys.stdin.readline, ""):
        command, _, argument = line.strip().partition(" ")
        answer(peer.obey(command, argument))
    peer.backend.close()


def answer(value: dict[str, object]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
