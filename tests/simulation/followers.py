"""A simulated worker's other ranks, where all of them hold the same pages: each has agents and a sender of its own.

What a rank sends it reads from rank 0's pages, which are those of every rank by definition. What is sent to it lands in
pages of its own, which are looked at when a prompt is adopted: only rank 0 computes.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from kvferry.transfer.protocol.checksums import ArrivalCheck
from kvferry.transfer.protocol.rank_calls import OwnCalls
from kvferry.transfer.receive.reservation import Reservation
from kvferry.transfer.send.ranks import SENDING, LayerShipper

from .breach import Breach
from .engine import Memory
from .oracle import Answer
from .sums import MemorySums
from .turns import TransferTurns

if TYPE_CHECKING:
    from .workers import Worker


class Follower:
    """One of the ranks behind rank 0."""

    def __init__(self, worker: Worker, rank: int) -> None:
        spec, num_blocks = worker.world.scenario.spec, worker.pool.num_blocks
        self._worker, self._rank = worker, rank
        self.memory = Memory(spec.num_layers, num_blocks, spec.block_size)
        life = f"{worker.place}.{worker.incarnation:x}"
        self.incoming = worker.make_agent(f"{life}.0.{rank}", self.memory, rank)
        self.outgoing = worker.make_agent(f"{life}.out.0.{rank}", worker.memory, rank)
        self.sender = worker.make_sender(rank, self.outgoing)
        # A thread of its own, of another process than rank 0's.
        turn_s = worker.world.scenario.turn_s * Random(f"turns {life} {rank}").choice((1, 10, 100))
        turns = TransferTurns(worker, turn_s, self.sender.step)
        self.outgoing.poke = turns.poke
        self.layers = LayerShipper(turns, self.sender, spec.num_layers, lambda: None)
        self.calls = OwnCalls(SENDING, turns, self.sender, self.sender.reader, self.layers)
        self.check: ArrivalCheck | None = None
        if worker.world.scenario.has_checksums:
            sums = MemorySums(self.memory)
            self.check = ArrivalCheck(sums, spec, rank=rank, tp_size=worker.num_ranks, num_blocks=num_blocks)  # type: ignore[arg-type]

    def check_adopted(self, reservation: Reservation, answer: Answer) -> None:
        """H2: what was to be written is in this rank's pages, too."""
        size, end = self.memory.block_size, reservation.num_tokens
        for number, block in enumerate(reservation.block_ids):
            begin = reservation.num_cached_tokens + number * size
            expected = answer.tags[begin : min(begin + size, end)]
            for layer, page in enumerate(self.memory.block(block)):
                if page[: len(expected)] != expected:
                    text = f"rank {self._rank} of {self._worker.place}, adopting {reservation.spec.request_id}, has "
                    text += f"{page} in layer {layer} of block {block} instead of {expected}"
                    raise Breach("H2", text)
