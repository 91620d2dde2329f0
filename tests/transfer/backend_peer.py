"""The other process of the backend tests: registers pages, describes them, then obeys lines of standard input.

in   wait    poll until a notification has come
in   clear   fill the pages with zeros
out          after each, one line of JSON with the notifications and a hash of the pages; the region at the start
"""

from __future__ import annotations

import hashlib
import json
import sys
import time

import msgspec
import torch

from kvferry.transfer.base import page_rows
from kvferry.transfer.choose import open_backend, set_ucx_defaults


def main(name: str, agent: str, shape: list[int]) -> None:
    set_ucx_defaults(loopback_only=True)
    torch.set_num_threads(1)
    pages = torch.zeros(shape, dtype=torch.float32)
    backend = open_backend(name, agent)
    region = backend.register(pages, rank=0, tp_size=1, generation=0)
    answer({"region": msgspec.msgpack.encode(region).hex()})
    for line in iter(sys.stdin.readline, ""):
        if line.strip() == "clear":
            pages.zero_()
        found: list[tuple[str, str]] = []
        while line.strip() == "wait" and not found:
            found = [(sender, payload.hex()) for sender, payload in backend.notifications()]
            time.sleep(0.0005)
        answer({"notifications": found, "digest": hashlib.sha256(page_rows(pages).numpy().tobytes()).hexdigest()})
    backend.close()


def answer(value: dict[str, object]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
