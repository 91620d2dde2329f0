"""The decode end of a measured handoff: a child process with the decode worker's own transfer code and no engine.

It obeys the orders of `orders.py`; grants, opens, arrivals and releases go through the real receiver.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import process_time

import torch

import kvferry
from kvferry.benchmarks.handoff.cases import arrange
from kvferry.benchmarks.handoff.orders import (
    CONFIG,
    MAX_PACKET_BYTES,
    SECRET,
    Begin,
    Books,
    Held,
    Order,
    Ready,
    Reserve,
    Reserved,
    Take,
    Taken,
    Usage,
    Used,
)
from kvferry.benchmarks.handoff.pages import checksum, finish, make_pages
from kvferry.common.clock import SystemClock
from kvferry.common.request import RequestSpec, SamplingParams, pack_ids
from kvferry.kvcache.blocks import BlockPool
from kvferry.transfer.backends.choose import open_backend, set_ucx_defaults
from kvferry.transfer.backends.host_memory import Marker
from kvferry.transfer.links import KVServer
from kvferry.transfer.receive.receiver import KVReceiver
from kvferry.transfer.thread import TransferThread
from kvferry.wire.codec import Decoder, encode
from kvferry.wire.fields import Message
from kvferry.wire.handoff import KVArrived, KVClosed, KVOpen, KVRenew
from kvferry.wire.results import Grant

_TICK_S = 0.1

_orders: Decoder[Order] = Decoder(Order)


class DecodeEnd:
    """Lives on the event loop's thread; arrivals come from the transfer thread."""

    def __init__(self, begin: Begin, fail: Callable[[BaseException], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._begin = begin
        self._lock = threading.Lock()
        self._marker = Marker()
        self._pages = make_pages(begin.spec, begin.num_blocks, begin.device)
        self._pool = BlockPool(begin.num_blocks, begin.spec.block_size)
        self._incarnation = secrets.randbits(63)
        self._backend = open_backend(begin.backend, f"d-0.{self._incarnation:x}.0.0")
        self._region = self._backend.register(self._pages, rank=0, tp_size=1, generation=0)
        self._server = KVServer("d-0", SECRET, self._on_message, self._on_lost)
        self._thread = TransferThread(self._backend, on_arrived=self._on_arrived, on_failure=fail)

    async def start(self) -> Ready:
        address = await self._server.start("127.0.0.1", 0)
        self._receiver = KVReceiver(
            worker_id="d-0",
            incarnation=self._incarnation,
            spec=self._begin.spec,
            tp_size=1,
            pool=self._pool,
            regions=(self._region,),
            kv_address=str(address),
            config=CONFIG,
            clock=SystemClock(),
            version=kvferry.__version__,
            transport=self._backend.name,
            to_router=lambda router_id, message: None,
            to_peer=lambda session, message: self._call_soon(lambda: self._server.send(session, message)),
        )
        self._thread.start()
        self._tick()
        return Ready(region=self._region, mark=self._marker.mark)

    def _call_soon(self, function: Callable[[], None]) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(function)

    @contextmanager
    def _changing(self) -> Iterator[KVReceiver]:
        """As a decode worker does it: one lock, and notifications are polled while somebody may write."""
        with self._lock:
            yield self._receiver
            self._thread.watch(self._receiver.has_open)

    def _tick(self) -> None:
        with self._changing() as receiver:
            receiver.tick()
        self._loop.call_later(_TICK_S, self._tick)

    def _on_message(self, session: str, message: Message) -> None:
        assert isinstance(message, KVOpen | KVRenew | KVClosed)
        with self._changing() as receiver:
            receiver.on_message(session, message)

    def _on_lost(self, session: str) -> None:
        with self._changing() as receiver:
            receiver.on_session_lost(session)

    def _on_arrived(self, agent: str, message: KVArrived) -> None:
        with self._changing() as receiver:
            receiver.on_arrived(0, message)

    def obey(self, order: Reserve | Take | Books | Usage) -> Message:
        match order:
            case Reserve():
                return self._reserve(order)
            case Take():
                return self._take(order)
            case Books():
                with self._lock:
                    return Held(num_live=self._receiver.num_live)
            case Usage():
                return Used(cpu_s=process_time())

    def _reserve(self, order: Reserve) -> Message:
        spec = RequestSpec(
            request_id=order.request_id,
            attempt=0,
            prompt=pack_ids([0] * order.num_tokens),
            sampling=SamplingParams(),
            cache_salt=order.request_id.encode(),  # nothing is ever found in the prefix cache
        )
        with self._changing() as receiver:
            arrange(self._pool, order.table, random.Random(order.seed))
            answer = receiver.reserve(spec, "r-0")
        assert isinstance(answer, Grant), answer
        if order.clear:
            for block in answer.grant.block_ids:
                self._pages[:, block] = 0
            finish(self._pages)
        return Reserved(grant=answer.grant)

    def _take(self, order: Take) -> Message:
        with self._changing() as receiver:
            [reservation] = receiver.arrived
            value = checksum(self._pages, reservation.block_ids) if order.with_checksum else 0
            receiver.release(reservation)
            receiver.check()
        return Taken(checksum=value)

    async def close(self) -> None:
        await self._server.close()
        self._thread.close()


async def serve(orders: socket.socket) -> None:
    """Obey until the other end closes."""
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[None] = loop.create_future()

    def fail(error: BaseException) -> None:
        loop.call_soon_threadsafe(failed.set_exception, error)

    async def obey_all() -> None:
        end: DecodeEnd | None = None
        while packet := await loop.sock_recv(orders, MAX_PACKET_BYTES):
            order = _orders.decode(packet)
            if isinstance(order, Begin):
                end = DecodeEnd(order, fail)
                answer: Message = await end.start()
            else:
                assert end is not None, "an order before Begin"
                answer = end.obey(order)
            await loop.sock_sendall(orders, encode(answer))
        if end is not None:
            await end.close()

    obeying = asyncio.ensure_future(obey_all())
    await asyncio.wait([obeying, failed], return_when=asyncio.FIRST_COMPLETED)
    (failed if failed.done() else obeying).result()


def main() -> int:
    torch.set_num_threads(1)
    set_ucx_defaults("127.0.0.1")
    with socket.socket(fileno=int(sys.argv[1])) as orders:
        orders.setblocking(False)
        asyncio.run(serve(orders))
    return 0


if __name__ == "__main__":
    sys.exit(main())
