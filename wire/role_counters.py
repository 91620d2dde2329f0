"""The figures of a role that a worker's heartbeat sums over both of its roles."""

from __future__ import annotations

from operator import add

from msgspec import Struct
from msgspec.structs import astuple


class RoleCounters(Struct, frozen=True):
    """Figures of one role, under the names that `WorkerStatus` gives them."""

    num_running: int
    num_waiting: int
    waiting_tokens: int
    num_granted_blocks: int
    num_preemptions: int
    prefix_queries: int
    prefix_hits: int
    stale_messages: int
    nonfinite_rows: int

    def __add__(self, other: RoleCounters) -> RoleCounters:
        return RoleCounters(*map(add, astuple(self), astuple(other)))
