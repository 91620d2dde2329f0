"""Tensor parallelism: one process for each rank, rank 0 leading.

    rank 0  RankGroup.start      spawns ranks 1.., each with a socket pair; `connect` joins the collectives
            group.send_step      the step's plan, before rank 0 runs it itself
            group.broadcast      the owner's own payloads, in order with the steps
    rank i  follower.py          reads its socket: a step -> Engine.follow, a payload -> its handler

Frames are one byte of kind, a length and bytes; nothing is pickled. A follower whose socket ends exits at once, so
ranks die together. Collectives run over loopback on CPU (gloo) and over NCCL on CUDA. What a payload means is its
owner's concern; sampling happens on rank 0 alone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

import msgspec

from ...common.adapter import AdapterResult
from ...common.config import EngineConfig
from ...common.errors import KVFerryError, WorkerLost
from ...kvcache.disk_tier import DiskResult
from ...models.config import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch._C._distributed_c10d import AllreduceOptions, Store, Work

LOOPBACK = "127.0.0.1"
COLLECTIVE_TIMEOUT_S = 60.0  # a rank that is silent for so long within one collective is lost
LOAD_TIMEOUT_S = 1800.0  # a rank may read its weights for so much longer than another one
_LOOK_S = 0.01  # between two looks whether all ranks have come
_START_TIMEOUT_S = 120.0  # interpreter and torch imports of a follower on a busy machine
_CLOSE_TIMEOUT_S = 5.0  # for a rank to end by itself before it is killed
_FRAME = struct.Struct("<BI")


class FrameKind(IntEnum):
    START = 0  # to a follower: StartFollower
    STEP = 1  # to a follower: a StepPlan
    USER = 2  # both ways: the owner's bytes
    CLOSE = 3  # to a follower: end in good order
    HELLO = 4  # from a follower: it runs
    FAILED = 5  # from a follower: why it ends
    DISK = 6  # to a follower: a DiskTask; from it: the DiskResult
    ADAPTER = 7  # to a follower: an AdapterTask; from it: the AdapterResult


class StartFollower(msgspec.Struct, frozen=True, kw_only=True):
    """All that a follower needs to build its engine."""

    engine_config: str  # EngineConfig as JSON
    tp_rank: int
    tp_size: int
    store_port: int
    num_blocks: int | None
    handler: str  # "module:function" that makes its FollowerHandler; empty: none
    handler_config: bytes


class FrameSocket:
    """Whole frames over a stream socket. One thread receives; any thread may send."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._send_lock = threading.Lock()

    def set_timeout(self, seconds: float | None) -> None:
        """Set how long `receive` waits within a frame before it takes the other side for gone."""
        self._sock.settimeout(seconds)

    def send(self, kind: FrameKind, payload: bytes = b"") -> None:
        """Raises OSError when the other side is gone."""
        with self._send_lock:
            self._sock.sendall(_FRAME.pack(kind, len(payload)) + payload)

    def receive(self) -> tuple[FrameKind, bytes] | None:
        """Return the next frame; None at the end of the stream, also in the middle of a frame."""
        try:
            head = self._exactly(_FRAME.size)
            if head is None:
                return None
            kind, length = _FRAME.unpack(head)
            payload = self._exactly(length)
        except OSError:
            return None
        return None if payload is None else (FrameKind(kind), payload)

    def _exactly(self, count: int) -> bytes | None:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            received = self._sock.recv_into(view)
            if received == 0:
                return None
            view = view[received:]
        return bytes(data)

    def shutdown(self) -> None:
        """Wake a thread that receives."""
        with contextlib.suppress(OSError):  # the other side closed first
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


class _Collectives(Protocol):
    """The part of torch's process groups that is used."""

    def allreduce(self, tensors: list[Tensor], options: AllreduceOptions = ..., /) -> Work: ...
    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], /) -> Work: ...


class Communicator:
    """Collectives of one rank; with one rank they return their argument."""

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        group: _Collectives | None = None,
        *,
        in_rank_order: bool = False,
        store: Store | None = None,
    ) -> None:
        """`in_rank_order`: a sum does not depend on how many numbers are summed with it; dearer with many ranks.
        `store`: where the ranks met.
        """
        assert (group is None) == (size == 1), size
        self._store = store
        # Where it is set it does each sum, and is given what would have done it.
        self.around: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] | None = None
        self.rank = rank
        self.size = size
        self._group = group
        self._in_rank_order = in_rank_order

    def meet(self, name: str, check: Callable[[], None] = lambda: None) -> None:
        """Return when every rank has called this, for which they have far longer than for a collective.

        Raises WorkerLost after that time, and what `check` raises meanwhile.
        """
        if self._store is None:
            return
        with _Collective(self.rank):
            self._store.set(f"{name}/{self.rank}", "")
            until = time.monotonic() + LOAD_TIMEOUT_S
            while not self._store.check([f"{name}/{rank}" for rank in range(self.size)]):
                check()
                if time.monotonic() > until:
                    raise WorkerLost(
                        f"tensor-parallel rank {self.rank}: others are not {name} after {LOAD_TIMEOUT_S:g} s"
                    )
                time.sleep(_LOOK_S)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.around is not None and self._group is not None:
            return self.around(x, self._sum)
        return self._sum(x)

    def _sum(self, x: Tensor) -> Tensor:
        if self._group is not None and self._in_rank_order:
            parts = self._gather(x)
            x.copy_(parts[0])
            for part in parts[1:]:
                x.add_(part)
        elif self._group is not None:
            with _Collective(self.rank):
                self._group.allreduce([x]).wait()
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Join [rows, n] of each rank to [rows, n * size], in rank order."""
        if self._group is None:
            return x
        import torch

        return torch.cat(self._gather(x), -1)

    def _gather(self, x: Tensor) -> list[Tensor]:
        """Return each rank's tensor."""
        import torch

        assert self._group is not None
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with _Collective(self.rank):
            self._group.allgather([parts], [x]).wait()
        return parts

    def minimum(self, value: int, device: torch.device) -> int:
        """Return the smallest of the ranks' values."""
        if self._group is None:
            return value
        import torch
        import torch.distributed as dist

        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
        tensor = torch.tensor([value], device=device)
        with _Collective(self.rank):
            self._group.allreduce([tensor], options).wait()
        return int(tensor.item())


class _Collective:
    """A collective that fails means that a rank is gone: say so."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise WorkerLost(f"tensor-parallel rank {self.rank}: a collective failed: {error}") from error


def connect(store: Store, rank: int, size: int, device: torch.device, *, in_rank_order: bool = False) -> Communicator:
    """Join the other ranks; returns when all of them have."""
    import torch.distributed as dist

    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    with _Collective(rank):
        if device.type == "cuda":
            dist.init_process_group("nccl", store=store, rank=rank, world_size=size, timeout=timeout, device_id=device)
            assert dist.group.WORLD is not None
            return Communicator(rank, size, dist.group.WORLD, store=store)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # stubs lag
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]  # listens on loopback alone
        options._timeout = timeout
        group = dist.ProcessGroupGloo(store, rank, size, options)
        return Communicator(rank, size, group, in_rank_order=in_rank_order, store=store)  # type: ignore[arg-type]


def join_store(port: int, size: int) -> Store:
    """Join rank 0's rendezvous from a follower."""
    import torch.distributed as dist

    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    return dist.TCPStore(LOOPBACK, port, size, is_master=False, timeout=timeout)  # type: ignore[attr-defined]


def _host_store(size: int) -> tuple[Store, int]:
    """Open rank 0's rendezvous on a free port of loopback alone."""
    import torch.distributed as dist

    listener = socket.create_server((LOOPBACK, 0))
    port: int = listener.getsockname()[1]
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    store: Store = dist.TCPStore(  # type: ignore[attr-defined]
        LOOPBACK,
        port,
        size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


class RankGroup:
    """Rank 0's hold on ranks 1..: their processes, sockets and failures."""

    def __init__(
        self,
        size: int,
        on_message: Callable[[int, bytes], None] | None,
        on_lost: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.size = size
        self._on_lost = on_lost
        self.store, self._port = _host_store(size)
        self._on_message = on_message
        self.on_disk: Callable[[DiskResult], None] | None = None  # in a thread of the group
        self.on_adapter: Callable[[AdapterResult], None] | None = None  # in a thread of the group
        self._sockets: list[FrameSocket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        self._failures: list[str] = []
        self._closing = False

    @property
    def pids(self) -> list[int]:
        """Return the process ids of the other ranks."""
        return [process.pid for process in self._processes]

    @classmethod
    def start(
        cls,
        config: EngineConfig,
        *,
        num_blocks: int | None = None,
        handler: str = "",
        handler_config: bytes = b"",
        on_message: Callable[[int, bytes], None] | None = None,
        on_lost: Callable[[str], None] = lambda reason: None,
    ) -> RankGroup:
        """Spawn ranks 1.. and wait until they run; they build their engines while rank 0 builds its own.

        `handler` names a function (engine, handler_config, send) -> FollowerHandler that each follower calls.
        `on_message(rank, payload)` gets what followers send, in a thread of the group. There `on_lost(reason)` is told
        that one has ended: a step on a GPU may wait for it and notice nothing for a minute. Raises ConfigError if the
        model does not split so, WorkerLost if a follower does not start.
        """
        ModelConfig.from_dir(config.model_dir).check_tp_size(
            config.tensor_parallel_size, whole_experts=config.enable_expert_parallel
        )
        group = cls(config.tensor_parallel_size, on_message, on_lost)
        try:
            for rank in range(1, group.size):
                group._spawn(rank, config, num_blocks, handler, handler_config)
            for rank in range(1, group.size):
                group._await_hello(rank)
        except BaseException:
            group.close()
            raise
        for rank in range(1, group.size):
            reader = threading.Thread(target=group._read, args=(rank,), name=f"tp-rank-{rank}", daemon=True)
            group._readers.append(reader)
            reader.start()
        return group

    def _spawn(
        self, rank: int, config: EngineConfig, num_blocks: int | None, handler: str, handler_config: bytes
    ) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "kvferry.engine.follower_process", str(theirs.fileno())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._sockets.append(FrameSocket(ours))
        self._sockets[-1].set_timeout(_START_TIMEOUT_S)
        with theirs:
            self._processes.append(
                subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
            )
        start = StartFollower(
            engine_config=config.model_dump_json(),
            tp_rank=rank,
            tp_size=self.size,
            store_port=self._port,
            num_blocks=num_blocks,
            handler=handler,
            handler_config=handler_config,
        )
        self._sockets[-1].send(FrameKind.START, msgspec.msgpack.encode(start))

    def _await_hello(self, rank: int) -> None:
        sock = self._sockets[rank - 1]
        frame = sock.receive()
        if frame is None or frame[0] != FrameKind.HELLO:
            detail = frame[1].decode(errors="replace") if frame else f"no answer within {_START_TIMEOUT_S:g} s"
            raise WorkerLost(f"tensor-parallel rank {rank} did not start: {detail}")
        sock.set_timeout(None)

    def _read(self, rank: int) -> None:
        while (frame := self._sockets[rank - 1].receive()) is not None:
            kind, payload = frame
            if kind == FrameKind.FAILED:
                self._failures.append(f"rank {rank}: {payload.decode(errors='replace')}")
            elif kind == FrameKind.DISK and self.on_disk is not None:
                self.on_disk(msgspec.msgpack.decode(payload, type=DiskResult))
            elif kind == FrameKind.ADAPTER and self.on_adapter is not None:
                self.on_adapter(msgspec.msgpack.decode(payload, type=AdapterResult))
            elif kind == FrameKind.USER and self._on_message is not None:
                self._on_message(rank, payload)
        if not self._closing:
            self._failures.append(f"rank {rank} ended")
            self._on_lost("; ".join(self._failures))

    def check(self) -> None:
        """Raises WorkerLost if a follower failed."""
        if self._failures:
            raise WorkerLost(f"tensor-parallel group of {self.size}: {'; '.join(self._failures)}")

    def broadcast(self, payload: bytes) -> None:
        """Give every follower's handler `payload`, in order with the steps. Raises WorkerLost."""
        self._send(FrameKind.USER, payload)

    def send_step(self, plan: bytes) -> None:
        self._send(FrameKind.STEP, plan)

    def send_disk(self, task: bytes) -> None:
        """Have every follower carry out a DiskTask, after the steps that were sent."""
        self._send(FrameKind.DISK, task)

    def send_adapter(self, task: bytes) -> None:
        """Have every follower carry out an AdapterTask, beside its steps."""
        self._send(FrameKind.ADAPTER, task)

    def _send(self, kind: FrameKind, payload: bytes) -> None:
        self.check()
        for rank, sock in enumerate(self._sockets, 1):
            try:
                sock.send(kind, payload)
            except OSError as error:
                raise WorkerLost(f"tensor-parallel rank {rank} is gone: {error}") from error

    def close(self) -> None:
        """End the followers: in good order, after a while by force. Idempotent."""
        self._closing = True
        for sock in self._sockets:
            with contextlib.suppress(OSError):  # it is gone already
                sock.send(FrameKind.CLOSE)
        for process in self._processes:
            try:
                process.wait(_CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for sock in self._sockets:
            sock.shutdown()
        for reader in self._readers:
            reader.join()
        for sock in self._sockets:
            sock.close()
        self._sockets, self._processes, self._readers = [], [], []


def describe(error: BaseException) -> str:
    """Describe an error as a follower reports it."""
    return str(error) if isinstance(error, KVFerryError) else f"{type(error).__name__}: {error}"
