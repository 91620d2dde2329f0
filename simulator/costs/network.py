"""Transfers between workers: how fast a path is, and when a shipment that overlaps its computation is over.

A prefill worker ships layer by layer while it computes. Its port carries one byte after another, whosever they are:
what several prompts of a step ship, they ship together. The receiving port is as fast: a crowd of senders waits.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...wire.fields import Labels

LATENCY_S = 0.0005  # by RDMA the end of a shipment costs a post, a completion and a notification


@dataclass(slots=True, frozen=True)
class Link:
    """One kind of path."""

    bytes_per_s: float
    latency_s: float  # of a shipment's end: post, completion, notification


@dataclass(slots=True, frozen=True)
class Network:
    """Paths by the narrowest place that both ends share. `within`: (label, link), widest place first."""

    default: Link
    within: tuple[tuple[str, Link], ...] = ()

    def between(self, a: Labels, b: Labels) -> Link:
        mine, others = dict(a), dict(b)
        found = self.default
        for label, link in self.within:
            if label in mine and mine[label] == others.get(label):
                found = link
        return found


class Port:
    """One direction of a worker's network port."""

    __slots__ = ("free_s",)

    def __init__(self) -> None:
        self.free_s = 0.0

    def carry(self, start_s: float, seconds: float) -> float:
        """Bytes that are there at `start_s`. Returns when the last one has left."""
        self.free_s = max(self.free_s, start_s) + seconds
        return self.free_s

    def stream(self, begin_s: float, end_s: float, seconds: float, num_layers: int) -> float:
        """Bytes that come evenly, layer by layer, between `begin_s` and `end_s`; others may use the port meanwhile."""
        first_s = begin_s + (end_s - begin_s) / num_layers
        self.free_s = max(self.free_s, first_s) + seconds
        return max(end_s + seconds / num_layers, self.free_s)
