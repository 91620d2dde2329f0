"""Tensor parallelism: one process for each rank, rank 0 leading.

    rank 0  RankGroup.start      spawns ranks 1.., each with a socket pair; `connect` joins the collectives
            group.send_step      the step's plan, before rank 0 runs it itself
            group.broadcast      the owner's own payloads, in order with the steps
    rank i  follower.py          reads its socket: a step -> Engine.follow, a payload -> its handler

What stands on the sockets: `frames.py`; the collectives: `communicator.py`. A follower whose socket ends exits at once,
so ranks die together. What a payload means is its owner's concern; sampling happens on rank 0 alone.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

import msgspec

from ...common.adapter import AdapterResult
from ...common.config import EngineConfig
from ...common.errors import WorkerLost
from ...kvcache.disk_tier import DiskResult
from ...models.config import ModelConfig
from .communicator import COLLECTIVE_TIMEOUT_S, host_store
from .frames import FollowerLogs, FrameKind, FrameSocket, StartFollower

_START_TIMEOUT_S = 120.0  # interpreter and torch imports of a follower on a busy machine
_SEND_TIMEOUT_S = COLLECTIVE_TIMEOUT_S  # for a rank to take what it is sent: one that does not stands still as well
_CLOSE_TIMEOUT_S = 5.0  # for a rank to end by itself before it is killed
_LOOK_S = 0.1  # between two looks at whether a rank that is waited for has ended


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
        self.store, self._port = host_store(size)
        self._on_message = on_message
        self.on_disk: Callable[[DiskResult], None] | None = None  # in a thread of the group
        self.on_adapter: Callable[[AdapterResult], None] | None = None  # in a thread of the group
        self._opened: queue.SimpleQueue[bool] = queue.SimpleQueue()  # answers of followers about their disks
        self._sockets: list[FrameSocket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        self.has_failed = False  # a rank, by an error of its own; the others are gone because of it
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
        logs: FollowerLogs | None = None,
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
                group._spawn(rank, config, num_blocks, handler, handler_config, logs)
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
        self,
        rank: int,
        config: EngineConfig,
        num_blocks: int | None,
        handler: str,
        handler_config: bytes,
        logs: FollowerLogs | None,
    ) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "kvferry.engine.follower_process", str(theirs.fileno())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._sockets.append(FrameSocket(ours))
        self._sockets[-1].set_timeout(_START_TIMEOUT_S)
        self._sockets[-1].limit_sends(_SEND_TIMEOUT_S)
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
            logs=logs,
        )
        self._sockets[-1].send(FrameKind.START, msgspec.msgpack.encode(start))

    def _await_hello(self, rank: int) -> None:
        sock = self._sockets[rank - 1]
        frame = sock.receive()
        if frame is None or frame[0] != FrameKind.HELLO:
            detail = frame[1].decode(errors="replace") if frame else self._silence(rank)
            raise WorkerLost(f"tensor-parallel rank {rank} did not start: {detail}")
        sock.set_timeout(None)

    def _silence(self, rank: int) -> str:
        """Say why nothing came of a rank's process: it has ended, or it waits for something."""
        try:
            code = self._processes[rank - 1].wait(_CLOSE_TIMEOUT_S)  # its socket closes a moment before it has ended
        except subprocess.TimeoutExpired:
            return f"no answer within {_START_TIMEOUT_S:g} s"
        return f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"

    def _read(self, rank: int) -> None:
        while (frame := self._sockets[rank - 1].receive()) is not None:
            kind, payload = frame
            if kind in (FrameKind.FAILED, FrameKind.BROKE):
                self.has_failed = self.has_failed or kind == FrameKind.FAILED
                self._failures.append(f"rank {rank}: {payload.decode(errors='replace')}")
            elif kind == FrameKind.DISK and self.on_disk is not None:
                self.on_disk(msgspec.msgpack.decode(payload, type=DiskResult))
            elif kind == FrameKind.OPEN_DISK:
                self._opened.put(msgspec.msgpack.decode(payload, type=bool))
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

    def open_disks(self, wanted: bytes) -> bool:
        """Have every follower open its file of a DiskSet. Return whether all have found one. Raises WorkerLost."""
        self._send(FrameKind.OPEN_DISK, wanted)
        answers: list[bool] = []
        while len(answers) < len(self._sockets):
            self.check()
            with contextlib.suppress(queue.Empty):
                answers.append(self._opened.get(timeout=_LOOK_S))
        return all(answers)

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
            with contextlib.suppress(OSError):  # it is gone already, or takes nothing
                sock.limit_sends(_CLOSE_TIMEOUT_S)
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
