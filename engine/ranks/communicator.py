"""Sums, joins and exchanges of tensors over the ranks, and how ranks find each other for them.

    rank 0   host_store   opens a rendezvous on a free port of loopback
    rank i   join_store   joins it
    all      connect      returns when every rank has called it: a Communicator for each

Collectives run over loopback on CPU (gloo) and over NCCL on CUDA. One that fails means that a rank is gone.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from ...common.errors import WorkerLost

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch._C._distributed_c10d import AllreduceOptions, Store, Work

LOOPBACK = "127.0.0.1"
COLLECTIVE_TIMEOUT_S = 60.0  # a rank that is silent for so long within one collective is lost
LOAD_TIMEOUT_S = 1800.0  # a rank may read its weights for so much longer than another one
_LOOK_S = 0.01  # between two looks whether all ranks have come


class _Collectives(Protocol):
    """The part of torch's process groups that is used."""

    def allreduce(self, tensors: list[Tensor], options: AllreduceOptions = ..., /) -> Work: ...
    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], /) -> Work: ...
    def alltoall_base(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], /
    ) -> Work: ...


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
        if self._store is not None:
            _meet(self._store, self.rank, self.size, name, check, LOAD_TIMEOUT_S)

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

    def all_gather_rows(self, x: Tensor) -> Tensor:
        """Join [rows, n] of each rank, equally many, to [rows * size, n], in rank order."""
        if self._group is None:
            return x
        import torch

        return torch.cat(self._gather(x))

    def all_to_all(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send rank i `sent[i]` rows of `x`, those for rank 0 first; return `received[i]` rows of each, in rank order.

        How many come is known to whoever calls: nobody tells here.
        """
        if self._group is None:
            return x
        rows = x.new_empty(sum(received), *x.shape[1:])
        with _Collective(self.rank):
            self._group.alltoall_base(rows, x.contiguous(), received, sent).wait()
        return rows

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


def _meet(store: Store, rank: int, size: int, name: str, check: Callable[[], None], limit_s: float) -> None:
    with _Collective(rank):
        store.set(f"{name}/{rank}", "")
        until = time.monotonic() + limit_s
        while not store.check([f"{name}/{other}" for other in range(size)]):
            check()
            if time.monotonic() > until:
                raise WorkerLost(f"tensor-parallel rank {rank}: others are not {name} after {limit_s:g} s")
            time.sleep(_LOOK_S)


def connect(
    store: Store,
    rank: int,
    size: int,
    device: torch.device,
    *,
    in_rank_order: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Communicator:
    """Join the other ranks; returns when all of them have. Raises WorkerLost, and what `check` raises meanwhile."""
    import torch.distributed as dist

    # What joins them cannot be interrupted, and would say of a rank that has failed only that it does not come.
    _meet(store, rank, size, "here", check, COLLECTIVE_TIMEOUT_S)
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


def host_store(size: int) -> tuple[Store, int]:
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


def join_store(port: int, size: int) -> Store:
    """Join rank 0's rendezvous from a follower."""
    import torch.distributed as dist

    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    return dist.TCPStore(LOOPBACK, port, size, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
