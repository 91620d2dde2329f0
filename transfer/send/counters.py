"""The figures of one rank's sender that its worker's heartbeat tells."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SendCounters:
    """Figures of one sender."""

    num_unfinished: int  # shipments
    num_bytes: int  # written since start
    num_failures: int
    wire_bytes: int  # written by the transport's own count; 0 where it has none
