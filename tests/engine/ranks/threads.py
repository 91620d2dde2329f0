"""Ranks as threads of one process, with collectives that are a server's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from kvferry.engine.ranks.communicator import Communicator, connect

T = TypeVar("T")
JOIN_S = 60.0


def on_ranks(size: int, job: Callable[[Communicator], T], *, in_rank_order: bool = False) -> list[T]:
    """Run the job as each rank of so many, in threads that meet over loopback."""
    import torch.distributed as dist

    store, found, failed = dist.HashStore(), dict[int, T](), list[BaseException]()  # type: ignore[attr-defined]

    def run(rank: int) -> None:
        try:
            with torch.inference_mode():
                found[rank] = job(connect(store, rank, size, torch.device("cpu"), in_rank_order=in_rank_order))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
    if failed:
        raise failed[0]
    return [found[rank] for rank in range(size)]
