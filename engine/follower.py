"""A tensor-parallel follower, whose process (`follower_process.py`) is spawned by `RankGroup` on rank 0.

1. reads StartFollower, says hello, builds its engine (the collectives join all ranks);
2. makes its handler, if its owner named one;
3. runs what comes, in order: steps through the engine, payloads through the handler;
4. ends on CLOSE, or at once when the socket ends: rank 0 is gone then.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import socket
import threading
from collections.abc import Callable
from typing import Protocol

import msgspec

from ..common.adapter import AdapterTask
from ..common.config import EngineConfig
from ..common.errors import WorkerLost
from ..common.logs import configure_logging
from ..kvcache.disk_files import DiskThread
from ..kvcache.disk_layout import DiskSet
from ..kvcache.disk_tier import DiskTask
from .adapters import AdapterThread
from .disk import open_disk
from .engine import Engine
from .ranks.communicator import join_store
from .ranks.frames import FrameKind, FrameSocket, StartFollower, describe


class FollowerHandler(Protocol):
    """The owner's part beside a follower's engine. All calls come from the thread that runs the steps."""

    def on_user(self, payload: bytes) -> None:
        """Take a payload of `RankGroup.broadcast`, in order with the steps."""
        ...

    def on_layer(self, layer_id: int) -> None:
        """Take in that layer `layer_id` of the running step has written its K and V."""
        ...

    def close(self) -> None:
        """End: the last call."""
        ...


HandlerFactory = Callable[[Engine, bytes, Callable[[bytes], None]], FollowerHandler]


def main(fd: int) -> int:
    frames = FrameSocket(socket.socket(fileno=fd))
    first = frames.receive()
    if first is None:
        return 1
    start = msgspec.msgpack.decode(first[1], type=StartFollower)
    if (logs := start.logs) is not None:
        configure_logging(logs.level, log_format=logs.format, worker_id=logs.worker_id, rank=str(start.tp_rank))
    frames.send(FrameKind.HELLO)
    inbox: queue.SimpleQueue[tuple[FrameKind, bytes]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(frames, inbox), name="frames", daemon=True).start()
    try:
        _follow(start, frames, inbox)
    except Exception as error:  # the boundary of the process: rank 0 raises it as WorkerLost
        kind = FrameKind.BROKE if isinstance(error, WorkerLost) else FrameKind.FAILED
        with contextlib.suppress(OSError):  # rank 0 is gone, as a rule why this one ends
            frames.send(kind, describe(error).encode())
        return 1
    return 0


def _receive(frames: FrameSocket, inbox: queue.SimpleQueue[tuple[FrameKind, bytes]]) -> None:
    while (frame := frames.receive()) is not None:
        inbox.put(frame)
        if frame[0] == FrameKind.CLOSE:
            return
    os._exit(1)  # rank 0 is gone; the main thread may hang in a collective with it


def _follow(start: StartFollower, frames: FrameSocket, inbox: queue.SimpleQueue[tuple[FrameKind, bytes]]) -> None:
    engine = Engine(
        EngineConfig.model_validate_json(start.engine_config),
        tp_rank=start.tp_rank,
        tp_size=start.tp_size,
        num_blocks=start.num_blocks,
        store=join_store(start.store_port, start.tp_size),
    )
    disk: DiskThread | None = None
    adapters = _open_adapters(engine, frames)
    handler = _make_handler(start, engine, lambda payload: frames.send(FrameKind.USER, payload))
    while True:
        kind, payload = inbox.get()
        if kind == FrameKind.STEP:
            engine.follow(payload, handler.on_layer if handler else None)
        elif kind == FrameKind.USER and handler is not None:
            handler.on_user(payload)
        elif kind == FrameKind.OPEN_DISK:
            disk = _open_disk(engine, frames, msgspec.msgpack.decode(payload, type=DiskSet), disk)
        elif kind == FrameKind.DISK and disk is not None:
            engine.host_slots.settle()
            disk.submit(msgspec.msgpack.decode(payload, type=DiskTask))
        elif kind == FrameKind.ADAPTER and adapters is not None:
            adapters.submit(msgspec.msgpack.decode(payload, type=AdapterTask))
        elif kind == FrameKind.CLOSE:
            break
    if disk is not None:
        disk.close()
    if handler is not None:
        handler.close()


def _open_disk(engine: Engine, frames: FrameSocket, wanted: DiskSet, before: DiskThread | None) -> DiskThread:
    """Open the file that goes with rank 0's, in place of the one `before`, and answer whether there was one."""
    if before is not None:
        before.close()
    file = open_disk(engine, wanted)
    frames.send(FrameKind.OPEN_DISK, msgspec.msgpack.encode(not file.is_new))
    return DiskThread(
        file, engine.host_slots.slot, lambda result: frames.send(FrameKind.DISK, msgspec.msgpack.encode(result))
    )


def _open_adapters(engine: Engine, frames: FrameSocket) -> AdapterThread | None:
    if engine.adapters is None:
        return None
    return AdapterThread(engine.adapters, lambda result: frames.send(FrameKind.ADAPTER, msgspec.msgpack.encode(result)))


def _make_handler(start: StartFollower, engine: Engine, send: Callable[[bytes], None]) -> FollowerHandler | None:
    if not start.handler:
        return None
    module, _, name = start.handler.partition(":")
    factory: HandlerFactory = getattr(importlib.import_module(module), name)
    return factory(engine, start.handler_config, send)
