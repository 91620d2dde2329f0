"""A simulated worker's other ranks: each has agents and a sender of its own, and sums of its pages.

Where ranks share out the heads, each has its own part of the worker's memory, from which it sends, and into which it
reads and is written to.

Where all ranks hold the same pages, only rank 0 computes. What another rank sends it reads from rank 0's pages, which
are those of every rank by definition. What is sent to it lands in pages of its own, which are looked at when a prompt
is adopted.
"""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING

from kvferry.kvcache.frames import frames_of
from kvferry.transfer.protocol.rank_calls import OwnCalls
from kvferry.transfer.receive.reservation import Reservation
from kvferry.transfer.send.ranks import SENDING, LayerShipper

from .breach import Breach
from .heads import HeadsMemory
from .memory import Memory
from .oracle import Answer
from .turns import TransferTurns

if TYPE_CHECKING:
    from .workers import Worker


class Follower:
    """One of the ranks behind rank 0."""

    def __init__(self, worker: Worker, rank: int) -> None:
        spec, num_blocks = worker.world.scenario.spec, worker.pool.num_blocks
        self._worker, self._rank = worker, rank
        is_copy = not isinstance(worker.memory, HeadsMemory)
        computed = worker.memory_of(rank)
        copy = Memory(spec.num_layers, num_blocks, spec.block_size, windows=spec.windows, frames=frames_of(spec))
        self.memory = copy if is_copy else computed
        life = f"{worker.place}.{worker.incarnation:x}"
        self.incoming = worker.make_agent(f"{life}.0.{rank}", self.memory, rank)
        self.outgoing = worker.make_agent(f"{life}.out.0.{rank}", computed, rank)
        self.sender = worker.make_sender(rank, self.outgoing)
        # A thread of its own, of another process than rank 0's.
        turn_s = worker.world.scenario.turn_s * Random(f"turns {life} {rank}").choice((1, 10, 100))
        turns = TransferTurns(worker, turn_s, self.sender.step)
        self.outgoing.poke = turns.poke
        self.layers = LayerShipper(turns, self.sender, spec, lambda: None)
        self.calls = OwnCalls(SENDING, turns, self.sender, self.sender.reader, self.layers)
        self.check = worker.make_check(rank, self.memory)
        summing = worker.make_summing(rank, self.memory)
        self.sum_blocks = partial(turns.call, summing.sum_blocks)

    def check_adopted(self, reservation: Reservation, answer: Answer) -> None:
        """H2: what was to be written is in this rank's pages, too. Those of its own heads the worker has checked."""
        if isinstance(self._worker.memory, HeadsMemory):
            return
        size, end = self.memory.block_size, reservation.num_tokens
        for number, block in enumerate(reservation.block_ids):
            begin = reservation.num_cached_tokens + number * size
            expected = answer.tags[begin : min(begin + size, end)]
            for layer, page in enumerate(self.memory.block(block)):
                hidden = max(0, self.memory.first_seen(layer, end) - begin)
                if page[hidden : len(expected)] != expected[hidden:]:
                    text = f"rank {self._rank} of {self._worker.place}, adopting {reservation.spec.request_id}, has "
                    text += f"{page} in layer {layer} of block {block} instead of {expected}"
                    raise Breach("H2", text)
