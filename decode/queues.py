"""Each sequence of a decode worker stands in one queue until it ends; every queue has the oldest first.

    waiting   neither blocks nor a row
    parked    blocks and no row
    running   blocks and a row
    misfits   has outgrown the pool, and waits for its end

Order is `Sequence.age_key`: the first is served first and preempted last. Who goes from queue to queue is the
scheduler's to decide.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from heapq import merge

from ..common.kv_spec import growth_blocks
from ..common.request import Sequence


def _age(seq: Sequence) -> tuple[int, int, str, int]:
    return seq.age_key


class Queues:
    """`Queues` knows where each sequence stands. The lists are for others to read, and to remove misfits from."""

    def __init__(self, max_num_rows: int, block_size: int) -> None:
        self._max_num_rows, self._block_size = max_num_rows, block_size
        self.waiting: list[Sequence] = []
        self.parked: list[Sequence] = []
        self.running: list[Sequence] = []
        self.misfits: list[Sequence] = []  # in the order in which they came

    @property
    def has_row(self) -> bool:
        """Room for one more running sequence."""
        return len(self.running) < self._max_num_rows

    @property
    def num_holding(self) -> int:
        """Return how many hold blocks."""
        return len(self.running) + len(self.parked)

    def growth(self, num_less: int = 0) -> int:
        """Count the blocks that those who hold some, but for so many, need free to grow."""
        return growth_blocks(self.num_holding - num_less, self._block_size)

    @property
    def num_context_tokens(self) -> int:
        """Return the tokens of all running sequences, prompts included."""
        return sum([len(seq.token_ids) for seq in self.running])

    def wait(self, seq: Sequence) -> None:
        """Queue a sequence without blocks."""
        insort(self.waiting, seq, key=_age)

    def park(self, seq: Sequence) -> None:
        """Queue a sequence with blocks for a row."""
        insort(self.parked, seq, key=_age)

    def run(self, seq: Sequence) -> None:
        """Give a row to a sequence with blocks."""
        insort(self.running, seq, key=_age)

    def hold(self, seq: Sequence) -> None:
        """Give a row to a sequence with blocks, or queue it for one where there is none."""
        if self.has_row:
            self.run(seq)
        else:
            self.park(seq)

    def take_holder(self, seq: Sequence) -> None:
        """Take a sequence out that holds blocks, whether it has a row or not."""
        (self.running if seq in self.running else self.parked).remove(seq)

    def take_blockless(self, seq: Sequence) -> bool:
        """Take a sequence out if it is in a queue of those without blocks. False: it is in none."""
        for queue in (self.waiting, self.misfits):
            if seq in queue:
                queue.remove(seq)
                return True
        return False

    def youngest_first(self) -> Iterator[Sequence]:
        """Yield the sequences that hold blocks, the youngest first."""
        return merge(self.running[::-1], self.parked[::-1], key=_age, reverse=True)

    def all(self) -> list[Sequence]:
        """Return all sequences that have not ended."""
        return [*self.running, *self.parked, *self.waiting, *self.misfits]

    def check(self) -> None:
        """Assert that each queue is in order, and that who waits has no blocks, nor counts what lay in some."""
        for queue in (self.waiting, self.parked, self.running):
            assert queue == sorted(queue, key=_age)
        for seq in self.waiting:
            assert not (seq.block_table or seq.num_computed_tokens or seq.num_published_blocks or seq.num_fed_again)


def oldest(*queues: list[Sequence]) -> Sequence | None:
    """Return the oldest sequence of these queues; None: they are empty."""
    return min((queue[0] for queue in queues if queue), key=_age, default=None)
