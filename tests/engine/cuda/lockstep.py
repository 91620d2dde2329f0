"""Ranks that are threads of a test, all on one device: collectives among them, and an engine of two.

One of them runs at a time, until it waits for the others: they share a stream, which is one thread's.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kvferry.common.config import EngineConfig
from kvferry.engine.engine import Engine
from kvferry.engine.ranks.communicator import Communicator

CUDA = torch.device("cuda", 0)
_LIMIT_S = 60.0  # for a rank to come to what the others are at


class Meeting:
    """What the ranks share. Whoever runs has its `turn`."""

    def __init__(self, num_ranks: int) -> None:
        self.met = threading.Barrier(num_ranks)
        self.posted: dict[int, Any] = {}
        self.turn = threading.Lock()

    def wait(self) -> None:
        """Let the others run until they wait, too."""
        self.turn.release()
        try:
            self.met.wait(_LIMIT_S)
        finally:
            self.turn.acquire()


class Lockstep:
    """Stands for a group's collectives."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self._rank, self._meeting = rank, meeting

    def _swap(self, own: object) -> list[Any]:
        meeting = self._meeting
        meeting.posted[self._rank] = own
        meeting.wait()
        found = [meeting.posted[rank] for rank in range(meeting.met.parties)]
        meeting.wait()
        return found

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Lockstep:
        first, *others = self._swap(tensors[0].clone())
        if options is not None and options.reduceOp == dist.ReduceOp.MIN:
            tensors[0].copy_(torch.stack([first, *others]).amin(0))
        else:
            tensors[0].copy_(sum(others, first))
        return self

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Lockstep:
        for output, part in zip(outputs[0], self._swap(inputs[0].clone()), strict=True):
            output.copy_(part)
        return self

    def alltoall_base(self, output: Tensor, input: Tensor, received: list[int], sent: list[int]) -> Lockstep:
        parts = [of_rank[self._rank] for of_rank in self._swap(torch.split(input, sent))]
        assert [len(part) for part in parts] == received
        output.copy_(torch.cat(parts))
        return self

    def wait(self) -> None:
        """Nothing is under way."""


class _Group:
    """Stands for rank 0's hold on rank 1."""

    store = object()

    def __init__(self) -> None:
        self.plans = queue.SimpleQueue[bytes | None]()

    def check(self) -> None:
        """The other rank's thread ends with the test."""

    def send_step(self, plan: bytes) -> None:
        self.plans.put(plan)


@contextmanager
def two_ranks(
    monkeypatch: pytest.MonkeyPatch, config: EngineConfig, num_blocks: int, see: Callable[[Engine], None] | None = None
) -> Iterator[Engine]:
    """Yield the first of two ranks' engines. `see` is given the other one when the test is done with both."""
    meeting, group = Meeting(2), _Group()

    def connect(store: object, rank: int, size: int, *_: object, **__: object) -> Communicator:
        return Communicator(rank, size, Lockstep(rank, meeting))  # type: ignore[arg-type]

    def make(rank: int) -> Engine:
        own = group if rank == 0 else None
        return Engine(config, tp_rank=rank, tp_size=2, num_blocks=num_blocks, group=own, store=own or object())  # type: ignore[arg-type]

    def follow() -> None:
        with meeting.turn:
            engine = make(1)
        while (plan := group.plans.get()) is not None:
            with meeting.turn:
                engine.follow(plan)
        if see is not None:
            see(engine)

    monkeypatch.setattr("kvferry.engine.engine.connect", connect)
    monkeypatch.setattr("kvferry.engine.engine.choose_device", lambda *_: CUDA)
    with ThreadPoolExecutor(1) as ranks:
        follower = ranks.submit(follow)
        try:
            with meeting.turn:
                yield make(0)
        except BaseException:
            meeting.met.abort()  # the other rank need not wait for this one
            raise
        finally:
            group.plans.put(None)
        follower.result()
