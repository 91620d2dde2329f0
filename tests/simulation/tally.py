"""What happened in one or many worlds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Tally:
    """Requests, events, faults, and how often the rarer ways were taken."""

    num_requests: int = 0
    num_events: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        self.num_requests += other.num_requests
        self.num_events += other.num_events
        self.ends += other.ends
        self.faults += other.faults
        self.seen += other.seen
