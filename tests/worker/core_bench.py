"""A worker's core without its sockets and its engine: what it asks for is noted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvferry.common.adapter import AdapterLoader
from kvferry.common.config import TransferConfig
from kvferry.kvcache.blocks import BlockPool
from kvferry.kvcache.prefix_cache import PrefixCache
from kvferry.transfer.send.counters import SendCounters
from kvferry.wire.fields import Message
from kvferry.worker.core import WorkerCore
from kvferry.worker.effects import CoreConfig

from ..decode.bench import BLOCK, REGION, SPEC
from ..fake_clock import FakeClock


class Outside:
    """Implements `Effects` and a `Shipping` with nothing to ship; `done`: what was asked for, by name."""

    def __init__(self) -> None:
        self.done: list[tuple[str, tuple[object, ...]]] = []
        self.sent: list[tuple[str, Message]] = []
        self.num_shipments = 0

    def to_router(self, router_id: str, message: Message) -> None:
        self.sent.append((router_id, message))

    def leaving(self) -> Callable[[], None]:
        return lambda: None

    def open(self, *args: object) -> int:
        self.done.append(("open", args))
        return self.count("open")

    def counters(self) -> SendCounters:
        return SendCounters(self.num_shipments, 0, 0, 0)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: self.done.append((name, args))

    def told(self, name: str) -> list[tuple[object, ...]]:
        """Return with what it was asked for this, each time."""
        return [args for done, args in self.done if done == name]

    def count(self, name: str) -> int:
        return len(self.told(name))


def make_core(outside: Outside, clock: FakeClock, num_blocks: int, adapters: AdapterLoader | None = None) -> WorkerCore:
    """Return the core of a decode worker with one router, R."""
    pool = BlockPool(num_blocks, BLOCK)
    config = CoreConfig(
        worker_id="d",
        incarnation=1,
        version="0",
        served_model="m",
        role="decode",
        spec=SPEC,
        tp_size=1,
        kv_address="x:1",
        incoming="local",
        outgoing="local",
        transfer=TransferConfig(),
        eos_token_ids=frozenset(),
        max_model_len=1000,
        max_num_batched_tokens=64,
        max_num_seqs=8,
    )
    everything: Any = outside  # what is not told of is done by `__getattr__`
    core = WorkerCore(
        config,
        pool=pool,
        cache=PrefixCache(pool, spec=SPEC),
        clock=clock,
        effects=everything,
        shipping=everything,
        reading=everything,
        regions=(REGION,),
        adapters=adapters,
    )
    core.on_router_joined("R")
    return core
